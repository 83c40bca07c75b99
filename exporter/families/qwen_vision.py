"""The image towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, run so that one graph takes any number of images of any size.

transformers loops over the images: the place of a patch, the patches that see each other, and the learned positions to
interpolate come from Python lists. Here all of them are computed from the patch's number, so the graph takes any number of
patches and images. The tower's results are unchanged:

- images, frames and (Qwen2.5-VL) windows, which transformers splits, are separated by a mask
- windows need no reordering of the patches: attention does not depend on order, and the mask contains the windows

The mask has one entry for every pair of patches, like the attention scores themselves wherever attention is not fused.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Places:
    """Places of the patches; every attribute is `[patches]` int64.

    Attributes:
        frame: the number of the first patch of its frame, which no other frame of any image has.
        row, column: within the frame.
        height, width: of the frame, in patches.
    """

    frame: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    height: torch.Tensor
    width: torch.Tensor


def places(grids: torch.Tensor, patches: int, merge: int) -> Places:
    """Find each patch's place from its number.

    Args:
        grids: patches over time, height and width of every image, `[images, 3]` int64.
        patches: how many there are in all.
        merge: patches per side that become one token; they come square by square.
    """
    import torch

    sizes = grids.prod(dim=1)
    ends = sizes.cumsum(dim=0)
    number = torch.arange(patches, device=grids.device)
    image = (number[:, None] >= ends).sum(dim=1)
    _, height, width = grids[image].unbind(dim=1)
    begin = (ends - sizes)[image]
    within_frame = (number - begin) % (height * width)
    square, corner = within_frame // merge**2, within_frame % merge**2
    squares_per_row = width // merge
    return Places(
        frame=number - within_frame,
        row=square // squares_per_row * merge + corner // merge,
        column=square % squares_per_row * merge + corner % merge,
        height=height,
        width=width,
    )


def image_features(tower: Any, pixel_values: torch.Tensor, grids: torch.Tensor) -> list[torch.Tensor]:
    """Results of `tower(pixel_values, grid_thw=grids)`: merged features, then those for DeepStack (Qwen3-VL).

    Args:
        tower: `model.model.visual`.
        pixel_values: `[patches, channels * temporal * patch * patch]`.
        grids: `[images, 3]` int64.

    Returns:
        One tensor `[patches / merge**2, width]` each.
    """
    import torch

    where = places(grids, pixel_values.shape[0], tower.config.spatial_merge_size)
    states = tower.patch_embed(pixel_values)
    if hasattr(tower, "pos_embed"):
        states = states + learned_positions(tower, where).to(states.dtype)
    rotation = tower.rotary_pos_emb(states, torch.stack([where.row, where.column], dim=1))
    same_frame = _alike(where.frame)
    same_window = same_frame
    if hasattr(tower, "fullatt_block_indexes"):
        edge = window_edge(tower)
        same_window = same_frame & _alike(where.row // edge) & _alike(where.column // edge)

    injected: Sequence[int] = getattr(tower, "deepstack_visual_indexes", ())
    features = []
    for number, block in enumerate(tower.blocks):
        sees_all = number in getattr(tower, "fullatt_block_indexes", (number,))
        mask = same_frame if sees_all else same_window
        states = states + attend(block.attn, block.norm1(states), rotation, mask)
        states = states + block.mlp(block.norm2(states))
        if number in injected:
            features.append(tower.deepstack_merger_list[list(injected).index(number)](states))
    return [tower.merger(states), *features]


def window_edge(tower: Any) -> int:
    """Patches per side of a window: whole squares of merged patches."""
    merge = tower.spatial_merge_size
    return tower.window_size // merge // tower.patch_size * merge


def attend(attention: Any, states: torch.Tensor, rotation: Any, mask: torch.Tensor) -> torch.Tensor:
    """The tower's attention.

    Args:
        attention: the module.
        states: `[patches, width]`.
        rotation: cosine and sine of the rotary embedding.
        mask: `[patches, patches]`, whether a patch sees another.
    """
    from torch.nn.functional import scaled_dot_product_attention

    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
    query, key, value = attention.qkv(states).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    query, key = rotate(query, key, *rotation)
    heads = (part.transpose(0, 1)[None] for part in (query, key, value))
    mixed = scaled_dot_product_attention(*heads, attn_mask=mask, scale=attention.scaling)
    return attention.proj(mixed[0].transpose(0, 1).flatten(1))


def learned_positions(tower: Any, where: Places) -> torch.Tensor:
    """The learned table of positions, stretched to each image's grid and read between its entries: `[patches, width]`."""
    import torch

    side = tower.num_grid_per_side
    top, bottom, down = _between(where.row, where.height, side)
    left, right, along = _between(where.column, where.width, side)
    entries = torch.stack([top * side + left, top * side + right, bottom * side + left, bottom * side + right], dim=1)
    weights = torch.stack([(1 - down) * (1 - along), (1 - down) * along, down * (1 - along), down * along], dim=1)
    return (tower.pos_embed(entries) * weights[..., None]).sum(dim=1)


def _between(index: torch.Tensor, length: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two entries of a table of `side` on either side of place `index` of `length`, and how far it is to the second."""
    place = index.float() * (side - 1) / (length - 1).clamp(min=1)
    first = place.floor()
    return first.long(), (first.long() + 1).clamp(max=side - 1), place - first


def _alike(group: torch.Tensor) -> torch.Tensor:
    """`[patches, patches]` bool: which patches are of one group."""
    return group[:, None] == group
