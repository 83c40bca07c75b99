"""Pictures as a checkpoint's own image processor gives them, for tracing and comparing: `open_processor`, `prepared`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...graphs.errors import ModelUnreadable, first_line
from .family import Arrays

# Height and width of the pictures that every vision encoder is compared on: wide, tall, and nearly square.
SIZES = ((224, 336), (360, 240), (280, 520), (244, 240))
_WHAT_TO_DO = "copy its preprocessor_config.json again, or guard the text decoder with --exporter genai"


def open_processor(folder: Path) -> Any:
    """transformers' image processor of a checkpoint, in the form that needs Pillow alone where there is one.

    Raises:
        ModelUnreadable: it declares none, or one that cannot be opened here.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil", trust_remote_code=False)
    except Exception as failure:  # whatever transformers raises is a fact about this folder
        raise ModelUnreadable(
            f"{folder}: its image processor cannot be opened ({first_line(failure)}); {_WHAT_TO_DO}"
        ) from failure


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    """A picture of random colours, `(height, width)`."""
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 255, (*size, 3), np.uint8))


def prepared(processor: Any, pictures: Sequence[Image.Image]) -> Arrays:
    """The processor's output for prompts with one picture each.

    Raises:
        ModelUnreadable: it cannot prepare them.
    """
    failure: Exception | None = None
    for images in (list(pictures), [[picture] for picture in pictures]):  # some require a list per prompt
        try:
            made = processor(images=images, return_tensors="np")
            return {
                name: array for name, array in ((n, np.asarray(a)) for n, a in made.items()) if array.dtype != object
            }
        except Exception as error:  # whatever transformers raises is a fact about this processor
            failure = failure or error
    assert failure is not None
    raise ModelUnreadable(
        f"{type(processor).__name__} cannot prepare pictures ({first_line(failure)}); {_WHAT_TO_DO}"
    ) from failure
