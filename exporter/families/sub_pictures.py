"""MiniCPM-V's vision encoder, whose picture is a row of sub-pictures: the whole one and its slices, each of a size of its own.

    pixel_values [1, channels, patch, patches * patch]   the patches of all sub-pictures
    target_sizes [sub-pictures, 2]                       rows and columns of patches of each

transformers loops over the sub-pictures, and orders patches by windows with Python lists. Here each patch finds its place by
arithmetic on its number, and a mask keeps the attention within a sub-picture.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

from .masked_attention import attention_within

if TYPE_CHECKING:
    import torch

SIZES = "target_sizes"


class Places(NamedTuple):
    """Of each patch, `[patches]` int64: the first patch of its sub-picture, its number there, and that sub-picture's sides."""

    start: torch.Tensor
    within: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor


def has_sub_pictures(inputs: Mapping[str, Any]) -> bool:
    """Whether these are the inputs of such an encoder."""
    return SIZES in inputs


def places(sizes: torch.Tensor, patches: int) -> Places:
    """Where each patch lies.

    Args:
        sizes: rows and columns of each sub-picture, `[sub-pictures, 2]`.
        patches: of all of them.
    """
    import torch

    sizes = sizes.long()
    ends = sizes.prod(dim=1).cumsum(dim=0)
    number = torch.arange(patches)
    owner = (number[:, None] >= ends).sum(dim=1)
    height, width = sizes[owner].unbind(dim=1)
    start = ends[owner] - height * width
    return Places(start, number - start, height, width)


def window_order(sizes: torch.Tensor, patches: int, edge: int) -> torch.Tensor:
    """The patches window by window, `[patches]`; every sub-picture's sides are multiples of a window's, `edge`."""
    start, within, _, width = places(sizes, patches)
    window, corner = within // edge**2, within % edge**2
    per_row = width // edge
    row, column = window // per_row * edge + corner // edge, window % per_row * edge + corner % edge
    return start + row * width + column


def nearest_positions(sizes: torch.Tensor, side: int, patches: int) -> torch.Tensor:
    """transformers' `get_vision_nearest_position_ids`: each patch's entry in a square table of positions, `[patches]`."""
    import torch

    _, within, height, width = places(sizes, patches)
    bounds = torch.arange(1 / side, 1.0, 1 / side)

    def bucket(number: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        return ((number / length)[:, None] >= bounds).sum(dim=1)

    return bucket(within // width, height) * side + bucket(within % width, width)


@contextmanager
def sub_pictures_by_arithmetic(model: Any, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Within, such an encoder computes any number of sub-pictures without loops."""
    pixels = inputs["pixel_values"]
    patch = pixels.shape[2]
    patches = (pixels.shape[3] - patch) // patch + 1  # as a convolution counts them
    with ExitStack() as stack:
        replaced = stack.enter_context
        name = "get_vision_nearest_position_ids"
        for module in sorted({type(part).__module__ for part in model.modules()}):
            if hasattr(sys.modules[module], name):
                function = partial(_positions, patches=patches)
                replaced(mock.patch.object(sys.modules[module], name, function))
        windowed = []
        for part in model.modules():
            if hasattr(part, "get_window_index"):
                windowed.append(part.self_attn)
                index = partial(_windows, patches=patches, edge=part.window_kernel_size[0])
                replaced(mock.patch.object(part, "get_window_index", index))
                attend = partial(_by_window, part.self_attn.forward, part.window_kernel_size[0] ** 2)
                replaced(mock.patch.object(part.self_attn, "forward", attend))
            elif hasattr(part, "merge_kernel_size") and hasattr(part, "mlp"):
                replaced(mock.patch.object(part, "forward", partial(_merged, part)))
        for part in model.modules():
            if type(part) in map(type, windowed) and part not in windowed:
                replaced(mock.patch.object(part, "forward", partial(_within_sub_pictures, part.forward)))
        yield


def _positions(sizes: torch.Tensor, side: int, kwargs: Any = None, *, patches: int) -> torch.Tensor:
    return nearest_positions(sizes, side, patches)


def _windows(sizes: torch.Tensor, kwargs: Any = None, *, patches: int, edge: int) -> tuple[torch.Tensor, Any, int]:
    import torch

    return window_order(sizes, patches, edge), torch.arange(patches // edge**2 + 1) * edge**2, edge**2


def _by_window(forward: Any, size: int, hidden_states: torch.Tensor, **more: Any) -> tuple[torch.Tensor, None]:
    """Attention within windows of consecutive patches, `[1, patches, width]`, each a row of a batch."""
    import torch

    states, _ = forward(hidden_states.reshape(-1, size, hidden_states.shape[-1]), torch.tensor([0, size]), size)
    return states.reshape(hidden_states.shape), None


def _within_sub_pictures(forward: Any, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor, **more: Any) -> Any:
    import torch

    owner = (torch.arange(hidden_states.shape[1])[:, None] >= cu_seqlens[1:]).sum(dim=1)
    with attention_within(owner[:, None] == owner):
        return forward(hidden_states=hidden_states, cu_seqlens=cu_seqlens[[0, -1]], **more)


def _merged(merger: Any, hidden_states: torch.Tensor, target_sizes: torch.Tensor) -> list[torch.Tensor]:
    rows, (edge, _) = hidden_states[0], merger.merge_kernel_size
    for mlp in merger.mlp:
        order = window_order(target_sizes, rows.shape[0], edge)
        rows = mlp(rows[order].reshape(-1, edge**2 * rows.shape[-1]))
        target_sizes = target_sizes // edge
    return [rows]
