"""Which rule for positions that depend on images a decoder follows, by the number of positions that a token has."""

from __future__ import annotations

import numpy as np

from .positions_by_image import AXES, positions_by_image
from .positions_mrope import mrope_positions


def positions_by_axes(
    axes: int, is_image: np.ndarray, mask: np.ndarray, grids: np.ndarray, merge: int
) -> np.ndarray | None:
    """Positions of whole prompts, `[axes, batch, sequence]` int64; `None` where they count tokens.

    Args:
        axes: positions of a token: 3 (M-RoPE), 4 (HunYuan-VL), else it has one.
        is_image: where the image tokens are, `[batch, sequence]` bool.
        mask: 1 for tokens, 0 for padding, `[batch, sequence]`.
        grids: patches over time, height and width of every image, `[images, 3]` int64.
        merge: patches per side that become one token.
    """
    if axes == AXES:
        return positions_by_image(is_image, mask, grids)
    return mrope_positions(is_image, mask, grids, merge) if axes == 3 else None
