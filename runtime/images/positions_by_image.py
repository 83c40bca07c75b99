"""Positions for rotary embeddings with four axes, as HunYuan-VL takes them: token, column, row and image, each numbered.

Text tokens have their number four times. An image's tokens are rows of its grid with a separator behind each, and one token
in front of the grid and one behind it; those of the grid have their number, their column, their row, and the number of
their image. Text after an image goes on with the tokens' numbers.

The numbers equal those of `get_rope_index` of HunYuan-VL in transformers.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np

from ...graphs.errors import GuardError

AXES = 4


def positions_by_image(
    is_image: np.ndarray, mask: np.ndarray, grids: np.ndarray, over_batch: bool = False
) -> np.ndarray:
    """Positions of whole prompts.

    Args:
        is_image: where the image tokens are, `[batch, sequence]` bool.
        mask: 1 for tokens, 0 for padding on any side, `[batch, sequence]`.
        grids: patches over time, height and width of every image, in the order of the prompts, `[images, 3]` int64.
        over_batch: whether images are numbered over all prompts, as transformers does; else within each prompt, so that a
            prompt's positions do not depend on the other prompts.

    Returns:
        `[4, batch, sequence]` int64; 0 for padding.

    Raises:
        GuardError: the runs of image tokens are not those of the grids.
    """
    positions = np.zeros((AXES, *mask.shape), np.int64)
    image = 0
    for prompt, real in enumerate(mask.astype(bool)):
        first = 0 if over_batch else image
        numbers = np.tile(np.arange(real.sum()), (AXES, 1))
        for of_image, run in groupby(range(numbers.shape[1]), is_image[prompt, real].__getitem__):
            if not of_image:
                continue
            tokens = list(run)
            height, width = _grid(grids, image, len(tokens), prompt)
            begin = tokens[0] + (len(tokens) - height * width) // 2
            end = begin + height * width
            numbers[1, begin:end] = np.tile(np.arange(width), height)
            numbers[2, begin:end] = np.repeat(np.arange(height), width)
            numbers[3, begin:end] = image - first
            image += 1
        positions[:, prompt, real] = numbers
    if image != len(grids):
        raise GuardError(f"the prompts have image tokens for {image} of {len(grids)} images; add the placeholders")
    return positions


def _grid(grids: np.ndarray, image: int, tokens: int, prompt: int) -> tuple[int, int]:
    """Rows, and columns with the separators, of the tokens that these patches were merged to."""
    if image < len(grids):
        _, height, width = map(int, grids[image])
        for merge in range(1, min(height, width) + 1):
            rows, columns = height // merge, width // merge + 1
            if tokens in (rows * columns, rows * columns + 2):
                return rows, columns
    raise GuardError(
        f"prompt {prompt} has a run of {tokens} image tokens that is no grid of image {image} of {len(grids)}; expand each "
        "image placeholder to its own image's tokens"
    )
