"""Positions for multimodal rotary embeddings (M-RoPE), as Qwen2-VL, Qwen2.5-VL and Qwen3-VL take them.

Every token has three positions: time, row and column. Text tokens have the same number three times. Image tokens have the
position where the image starts, plus their place in its grid; the text after the image continues after the largest of them.
So an image takes fewer positions than tokens, and later positions are lower than the number of tokens.

The numbers equal those of `get_rope_index` of these models in transformers, for images (videos are not supported).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from ...graphs.errors import GuardError


def mrope_positions(is_image: np.ndarray, mask: np.ndarray, grids: np.ndarray, merge: int) -> np.ndarray:
    """Positions of whole prompts.

    Args:
        is_image: where the image tokens are, `[batch, sequence]` bool.
        mask: 1 for tokens, 0 for padding on any side, `[batch, sequence]`.
        grids: patches over time, height and width of every image, in the order of the prompts, `[images, 3]` int64.
        merge: patches per side that become one token.

    Returns:
        `[3, batch, sequence]` int64: time, row, column; 0 for padding.

    Raises:
        GuardError: the runs of image tokens are not those of the grids.
    """
    positions = np.zeros((3, *mask.shape), np.int64)
    tokens_of = grids // (1, merge, merge)
    next_image = 0
    for row, real in enumerate(mask.astype(bool)):
        columns, begin = [np.zeros((3, 0), np.int64)], 0
        for image, length in _runs(is_image[row, real]):
            if not image:
                columns.append(np.broadcast_to(np.arange(begin, begin + length), (3, length)))
                begin += length
                continue
            grid = tokens_of[next_image] if next_image < len(tokens_of) else None
            if grid is None or grid.prod() != length:
                raise GuardError(
                    f"prompt {row} has a run of {length} image tokens where image {next_image} of {len(grids)} has "
                    f"{0 if grid is None else grid.prod()}; expand each image placeholder to its own image's tokens"
                )
            columns.append(np.indices(grid).reshape(3, -1) + begin)
            begin += int(grid[1:].max())
            next_image += 1
        positions[:, row, real] = np.concatenate(columns, axis=1)
    if next_image != len(grids):
        raise GuardError(f"the prompts have image tokens for {next_image} of {len(grids)} images; add the placeholders")
    return positions


def text_positions(mask: np.ndarray, axes: int = 3) -> np.ndarray:
    """Positions `[axes, batch, sequence]` of prompts without images: each token's number on every axis; 0 for padding."""
    numbers = np.where(mask, np.cumsum(mask, axis=1) - 1, 0)
    return np.broadcast_to(numbers, (axes, *mask.shape)).astype(np.int64)


def _runs(is_image: np.ndarray) -> Iterator[tuple[bool, int]]:
    """`[text, text, image, image, image]` -> (False, 2), (True, 3)."""
    for image, run in groupby(is_image.tolist()):
        yield image, len(list(run))
