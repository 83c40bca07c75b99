"""LLaVA-NeXT's arrangement of a picture's tiles as one row of tokens, computed within a graph: `pack`.

The processor cuts a picture into a whole view and tiles of the best of a few resolutions. The tokens are those of the whole
view, then the tiles' as one large grid, row by row, without the bars that made the picture fit that grid, each row with a
separator behind it. transformers does this with the picture's size as Python numbers; here it is arithmetic on the number of
each place in the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def pack(
    features: torch.Tensor,
    image_size: torch.Tensor,
    resolutions: Sequence[Sequence[int]],
    tile: int,
    separator: torch.Tensor | None,
) -> torch.Tensor:
    """The tokens of one picture, `[tokens, width]`.

    Args:
        features: of the whole view and of each tile, at least one, `[1 + tiles, side * side, width]`.
        image_size: height and width of the picture in pixels, `[2]`.
        resolutions: height and width that the tiles together may have, pixels.
        tile: height and width of a tile, pixels.
        separator: `[width]`; `None` puts none.
    """
    import torch

    side = int(features.shape[1] ** 0.5)
    tiles, more = features.shape[0] - 1, int(separator is not None)
    best = best_resolution(image_size, resolutions)
    height, width = best[0] // tile * side, best[1] // tile * side
    bar_above, bar_left = _bars(image_size, height, width)
    # As many places as a grid of these tiles can have, rows one below the other; those beyond the last row are left out.
    place = torch.arange(tiles * side * (side + more))
    row, column = place // (width + more), place % (width + more)
    token = (row // side * (width // side) + column // side + 1) * side * side + row % side * side + column % side
    inside = (column >= bar_left) & (column < width - bar_left)
    table = features.flatten(0, 1)
    if separator is not None:
        token = torch.where(column == width, table.shape[0], token)
        inside |= column == width
        table = torch.cat([table, separator[None].to(table)])
    kept = inside & (row >= bar_above) & (row < height - bar_above)
    return torch.cat([features[0], table[token[kept]]])


def best_resolution(image_size: torch.Tensor, resolutions: Sequence[Sequence[int]]) -> torch.Tensor:
    """transformers' `select_best_resolution`: shows the most of the picture, then wastes the least; `[2]` int64."""
    import torch

    size, choices = image_size.double(), torch.tensor([list(choice) for choice in resolutions])
    scale = (choices / size).amin(dim=1)
    shown = torch.minimum((size * scale[:, None]).floor().prod(dim=1), size.prod())
    wasted = choices.prod(dim=1) - shown
    return choices[torch.where(shown == shown.max(), wasted, torch.inf).argmin()]


def _bars(image_size: torch.Tensor, height: torch.Tensor, width: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many rows above and below, and columns left and right, are no picture."""
    import torch

    tall, wide = image_size.double().unbind()
    # transformers rounds to 7 decimals before it cuts the fraction off.
    seen_height = (tall * (width / wide) + 5e-8).floor().long()
    seen_width = (wide * (height / tall) + 5e-8).floor().long()
    flat = wide / tall > width / height
    none = torch.zeros_like(height)
    return torch.where(flat, (height - seen_height) // 2, none), torch.where(flat, none, (width - seen_width) // 2)
