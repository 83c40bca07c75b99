"""Samples to pick on the page: labelled prompts and their pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...exporter.evaluation.evaluate import EVALUATION_FILES
from ...exporter.prompts.formats import LABELS
from ...exporter.prompts.labelled import BUILTIN, LabelledPrompt, find_file, read_prompts
from ...exporter.prompts.thinning import by_setting_and_label
from ...runtime.images.open_picture import open_image

_OF_EACH = 2  # prompts of each setting and label
_MOST_PICTURES = 8
NO_PICTURE, BLANK = "none", "blank"


@dataclass(frozen=True)
class Samples:
    """Prompts, and pictures by the name of their address."""

    prompts: tuple[LabelledPrompt, ...]
    pictures: Mapping[str, Path]

    def to_json(self) -> dict[str, Any]:
        names: dict[Path | None, str] = {path: name for name, path in self.pictures.items()}
        return {
            "prompts": [
                {
                    "prompt": row.prompt,
                    "label": row.label,
                    "setting": row.setting,
                    "picture": BLANK if row.setting == "blank" else names.get(row.image, NO_PICTURE),
                }
                for row in self.prompts
            ],
            "pictures": [{"name": name, "title": path.stem.replace("_", " ")} for name, path in self.pictures.items()],
        }


def choose_samples(prompts: str | None, homes: Sequence[Path]) -> Samples:
    """A few prompts of each kind, spread over their file, and their pictures.

    Args:
        prompts: labelled prompts, as `vlmguard evaluate` takes them; `None` takes those found beside one of the `homes`, else
            built-in ones.

    Raises:
        PromptsUnusable: the file cannot be read.
    """
    found = prompts or next(filter(None, (find_file(home, EVALUATION_FILES) for home in homes)), None)
    rows = read_prompts(found if found is not None else f"{BUILTIN}:test")
    chosen = by_setting_and_label(rows, _OF_EACH, LABELS)
    paths = dict.fromkeys(row.image for row in (*chosen, *rows) if row.image is not None)
    shown = list(paths)[:_MOST_PICTURES]
    return Samples(
        tuple(row for row in chosen if row.image is None or (row.image in shown and not row.more_images)),
        {f"picture-{number}": path for number, path in enumerate(shown)},
    )


def png(picture: Image.Image | Path) -> bytes:
    """As `GuardedVLM` sees it (upright, on white), without loss: whatever the format was, a browser shows it."""
    content = io.BytesIO()
    open_image(picture).save(content, "PNG")
    return content.getvalue()
