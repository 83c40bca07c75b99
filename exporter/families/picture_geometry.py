"""The geometry of ONE picture, computed within a graph: what transformers' `vision_utils` computes for many in Python.

Towers that take patches of pictures of any size ask these functions where each patch lies. transformers loops over the
pictures, which no tracer follows. For one picture it is arithmetic on the patch's number. Each function takes what the one of
the same name takes, and the number of patches, which only the pixels' shape has; `grid_thw [1, 3]` has the frames, rows and
columns of patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def replacements(patches: int, windows: list[torch.Tensor]) -> Mapping[str, Any]:
    """By the name in `vision_utils`, for a picture of so many patches (symbolic while a graph is traced).

    Args:
        windows: gets the mask of the windows, `[patches, patches]` bool, where the tower attends within windows.
    """
    of_patches = (
        get_vision_position_ids,
        get_vision_interpolation_indices_and_weights,
        get_vision_frame_index,
        get_vision_temporal_merge_index,
        get_vision_pixel_shuffle_index,
    )
    named = {function.__name__: partial(function, patches=patches) for function in of_patches}
    return {
        **named,
        "get_vision_window_index": partial(get_vision_window_index, patches=patches, windows=windows),
        "get_vision_cu_seqlens": get_vision_cu_seqlens,
        "get_vision_attention_seqlens": lambda *args, **more: (get_vision_cu_seqlens(*args, **more), None),
    }


def get_vision_cu_seqlens(grid_thw: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
    """One segment of attention, from the first patch to the last: `[2]` int32. A picture has one frame."""
    import torch

    return torch.nn.functional.pad(grid_thw.prod(dim=1), (1, 0)).to(torch.int32)


def get_vision_window_index(
    grid_thw: torch.Tensor,
    spatial_merge_size: int,
    window_size: int,
    patch_size: int,
    *,
    patches: int,
    windows: list[torch.Tensor],
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens in their given order, and three bounds, which distinguish windows from the two bounds of a whole picture.

        Attention does not depend on order, so a mask replaces the split of the picture into windows.

    Args:
        grid_thw, spatial_merge_size, window_size, patch_size, more: as for the function of transformers that this replaces.
        patches: number of patches.
        windows: the mask of the windows, `[patches, patches]` bool, is appended.
    """
    import torch

    edge = window_size // spatial_merge_size // patch_size * spatial_merge_size
    row, column = _places(grid_thw, spatial_merge_size, patches)
    same_row = row[:, None] // edge == row // edge
    windows.append(same_row & (column[:, None] // edge == column // edge))
    return torch.arange(patches // spatial_merge_size**2), torch.nn.functional.pad(grid_thw.prod(dim=1), (2, 0))


def get_vision_position_ids(
    grid_thw: torch.Tensor, spatial_merge_size: Any, include_temporal: bool = False, *, patches: int, **more: Any
) -> torch.Tensor:
    """Row and column of each patch, `[patches, 2]` int64; with `include_temporal` its frame before them.

    Args:
        grid_thw, spatial_merge_size, include_temporal, more: as for the function of transformers that this replaces.
        patches: number of patches.
    """
    import torch

    row, column = _places(grid_thw, int(spatial_merge_size), patches)
    axes = [row, column]
    if include_temporal:
        axes = [torch.arange(patches) // (grid_thw[0, 1] * grid_thw[0, 2]), *axes]
    return torch.stack(axes, dim=-1)


def get_vision_interpolation_indices_and_weights(
    grid_thw: torch.Tensor,
    num_grid_per_side: int,
    mode: str = "bilinear",
    align_corners: bool = False,
    spatial_merge_size: int = 1,
    padding: str = "border",
    *,
    patches: int,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which entries of a square table of positions each patch reads, and with what weights: `[patches, 4 or 16]` each.

    Args:
        grid_thw, num_grid_per_side, mode, align_corners, spatial_merge_size, padding, more: as for the function of
            transformers that this replaces.
        patches: number of patches.
    """
    from transformers.vision_utils import _interpolation_axis_taps_weights as taps_of

    side = num_grid_per_side
    row, column = _places(grid_thw, spatial_merge_size, patches)
    how = (side, mode, align_corners, padding)
    rows, row_weights = taps_of(row, grid_thw[0, 1].expand(patches), *how)
    columns, column_weights = taps_of(column, grid_thw[0, 2].expand(patches), *how)
    entries = (rows[:, :, None] * side + columns[:, None, :]).flatten(1)
    return entries, (row_weights[:, :, None] * column_weights[:, None, :]).flatten(1)


def get_vision_frame_index(grid_thw: torch.Tensor, *args: Any, patches: int, **more: Any) -> torch.Tensor:
    """Each patch's entry in a table of frames, of which a picture has none: `[patches]`."""
    import torch

    return torch.zeros(patches, dtype=torch.int64)


def get_vision_temporal_merge_index(
    grid_thw: torch.Tensor, kernel_height: int, kernel_width: int, *, patches: int, **more: Any
) -> torch.Tensor:
    """The patches that become one token, `[tokens, 1, kernel_height * kernel_width]`; the axis of length 1 is the frame.

    Args:
        grid_thw, kernel_height, kernel_width, more: as for the function of transformers that this replaces.
        patches: number of patches, which come row by row.
    """
    import torch

    token, corner = torch.arange(patches // (kernel_height * kernel_width)), torch.arange(kernel_height * kernel_width)
    width = grid_thw[0, 2]
    per_row = width // kernel_width
    row = (token // per_row * kernel_height)[:, None] + corner // kernel_width
    column = (token % per_row * kernel_width)[:, None] + corner % kernel_width
    return (row * width + column)[:, None]


def temporal_merge(
    hidden_states: torch.Tensor, grid_thw: torch.Tensor, kernel_height: int, kernel_width: int, *args: Any, **more: Any
) -> torch.Tensor:
    """Kimi K2.5's merging of squares of patches (transformers 5.24): `[tokens, kernel_height * kernel_width, width]`.

    Args:
        hidden_states: `[patches, width]`.
        grid_thw, kernel_height, kernel_width, args, more: as for the method of transformers that this replaces.
    """
    patches = get_vision_temporal_merge_index(grid_thw, kernel_height, kernel_width, patches=hidden_states.shape[0])
    return hidden_states[patches].mean(dim=1)


def get_vision_pixel_shuffle_index(
    grid_thw: torch.Tensor, merge_size: int, *, patches: int, **more: Any
) -> torch.Tensor:
    """The patches, which come row by row, square by square of `merge_size` to a side: `[patches]`."""
    return get_vision_temporal_merge_index(grid_thw, merge_size, merge_size, patches=patches).flatten()


def pixel_unshuffle(hidden_states: torch.Tensor, grid_thw: torch.Tensor, merge_sizes: torch.Tensor) -> torch.Tensor:
    """VideoLLaMA 3's merging of squares of patches, which come one after the other: the mean of those in a square's middle."""
    merge = int(merge_sizes[0])
    middle = [(merge - 1) // 2, merge // 2]
    squares = hidden_states.reshape(-1, merge, merge, hidden_states.shape[-1])
    return squares[:, middle][:, :, middle].mean(dim=(1, 2))


def _places(grid_thw: torch.Tensor, merge: int, patches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each patch within its frame; patches come square by square of `merge` to a side."""
    import torch

    height, width = grid_thw[0, 1], grid_thw[0, 2]
    within = torch.arange(patches) % (height * width)
    square, corner = within // merge**2, within % merge**2
    squares_per_row = width // merge
    row = square // squares_per_row * merge + corner // merge
    column = square % squares_per_row * merge + corner % merge
    return row, column
