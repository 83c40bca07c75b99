"""Which token stands for a row of image features: by the many names that configs have for it."""

from __future__ import annotations

from typing import Any

# In order of precedence: the first key in the config is used.
SPELLINGS = ("image_token_id", "image_token_index", "media_placeholder_token_id", "img_context_token_id", "im_patch_id")


def image_token_id(config: Any) -> int | None:
    """The config's image token; `None` where it names none."""
    for part in (config, config.get_text_config()):
        found = (getattr(part, name, None) for name in SPELLINGS)
        token = next((number for number in found if isinstance(number, int)), None)
        if token is not None:
            return token
    return None
