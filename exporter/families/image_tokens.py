"""The token that stands for a row of image features, under its many names in configs."""

from __future__ import annotations

from typing import Any

from ...runtime.chat.folder_configs import IMAGE_TOKEN_KEYS


def image_token_id(config: Any) -> int | None:
    """The config's image token; `None` where it names none."""
    for part in (config, config.get_text_config(), getattr(config, "vision_config", None)):
        found = (getattr(part, name, None) for name in IMAGE_TOKEN_KEYS)
        token = next((number for number in found if isinstance(number, int)), None)
        if token is not None:
            return token
    return None
