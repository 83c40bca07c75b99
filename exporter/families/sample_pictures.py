"""Pictures as the runtime prepares them for a checkpoint's vision encoder: for tracing and comparing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ...runtime.images.vision import open_preprocessor
from .family import Arrays
from .sub_pictures import has_sub_pictures

# Height and width of the pictures that every vision encoder is compared on: wide, tall, and nearly square.
SIZES = ((224, 336), (360, 240), (280, 520), (244, 240))
# Molmo 2: the numbers of the patches that become one token, among those of all pictures.
_POOLED = "image_token_pooling"
# How much larger further ones are, which may have more tiles, or fewer, where a graph takes any number of them.
_FACTORS = (4, 0.25)


def sample_pictures(folder: Path) -> list[Arrays]:
    """Pictures of random colours by the names that transformers' image processors use: one of each of
    `SIZES`, and a larger and a smaller one where those of `SIZES` are all cut into the same number of tiles.

    Raises:
        ModelUnreadable: the folder declares no image processor, or one that cannot be run here.
    """
    processor = open_preprocessor(folder)

    def prepare(size: tuple[int, int], seed: int) -> Arrays:
        return dict(processor.prepare(_noise(size, seed)).arrays)

    pictures = [prepare(size, seed) for seed, size in enumerate(SIZES)]
    height, width = SIZES[-1]
    for factor in _FACTORS:
        further = prepare((int(height * factor), int(width * factor)), len(pictures))
        is_cut = any(_has_tiles(picture) or has_sub_pictures(picture) for picture in (further, *pictures))
        if is_cut and _has_other_axis(further, pictures):
            pictures.append(further)
    return pictures


def joined(pictures: Sequence[Arrays]) -> Arrays:
    """What transformers takes for prompts with one of these pictures each: one after the other, filled up with zeros."""
    # one number for a picture (its crops, say) is one of a row of numbers
    arrays = {name: _joined([np.atleast_1d(picture[name]) for picture in pictures]) for name in pictures[0]}
    if has_sub_pictures(arrays):  # whose patches are one row
        arrays["pixel_values"] = np.concatenate([picture["pixel_values"] for picture in pictures], axis=-1)
    if _POOLED in arrays:
        arrays[_POOLED] = np.concatenate(_counted_on(pictures))
    return arrays


def _counted_on(pictures: Sequence[Arrays]) -> list[np.ndarray]:
    """Each picture's `_POOLED`, counted on from the patches of the pictures before it; -1, for none, stays."""
    patches = [int(np.prod(picture["pixel_values"].shape[:2])) for picture in pictures]
    before = np.cumsum([0, *patches[:-1]])
    return [np.where(p[_POOLED] >= 0, p[_POOLED] + offset, -1) for p, offset in zip(pictures, before, strict=True)]


def _has_tiles(picture: Arrays) -> bool:
    """Whether the picture is cut: `[1, tiles, 3, height, width]`, or `[tiles, 3, height, width]` with more than one tile."""
    arrays = map(np.asarray, picture.values())
    return any(array.ndim == 5 or (array.ndim == 4 and len(array) > 1) for array in arrays)


def _has_other_axis(picture: Arrays, others: Sequence[Arrays]) -> bool:
    """Whether one of its axes differs from one that has the same length in all the others, which have the same arrays."""
    if picture.keys() != others[0].keys():
        return False
    lengths = (
        (length, {np.shape(other[name])[axis] for other in others})
        for name, array in picture.items()
        for axis, length in enumerate(np.shape(array))
    )
    return any(len(same) == 1 and length not in same for length, same in lengths)


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    largest = np.max([array.shape[1:] for array in arrays], axis=0)
    fills = (
        [(0, 0), *((0, int(most - size)) for size, most in zip(a.shape[1:], largest, strict=True))] for a in arrays
    )
    return np.concatenate([np.pad(array, fill) for array, fill in zip(arrays, fills, strict=True)])


def _noise(size: tuple[int, int], seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 255, (*size, 3), np.uint8))
