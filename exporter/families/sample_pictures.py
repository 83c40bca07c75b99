"""Pictures as the runtime prepares them for a checkpoint's vision encoder: for tracing and comparing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ...runtime.images.vision import open_preprocessor
from .family import Arrays

# Height and width of the pictures that every vision encoder is compared on: wide, tall, and nearly square.
SIZES = ((224, 336), (360, 240), (280, 520), (244, 240))


def sample_pictures(folder: Path) -> list[Arrays]:
    """Pictures of random colours, one of each of `SIZES`, by the names that transformers' image processors use.

    Raises:
        ModelUnreadable: the folder declares no image processor, or one that cannot be run here.
    """
    processor = open_preprocessor(folder)
    return [dict(processor.prepare(_noise(size, seed)).arrays) for seed, size in enumerate(SIZES)]


def joined(pictures: Sequence[Arrays]) -> Arrays:
    """What transformers takes for prompts with one of these pictures each: one after the other, filled up with zeros."""
    # one number for a picture (its crops, say) is one of a row of numbers
    return {name: _joined([np.atleast_1d(picture[name]) for picture in pictures]) for name in pictures[0]}


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    largest = np.max([array.shape[1:] for array in arrays], axis=0)
    fills = (
        [(0, 0), *((0, int(most - size)) for size, most in zip(a.shape[1:], largest, strict=True))] for a in arrays
    )
    return np.concatenate([np.pad(array, fill) for array, fill in zip(arrays, fills, strict=True)])


def _noise(size: tuple[int, int], seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 255, (*size, 3), np.uint8))
