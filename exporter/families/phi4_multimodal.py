"""Phi-4 Multimodal's vision encoder, which transformers runs within the model's embedding: as a `get_image_features`.

    image_pixel_values   [1, 1 + tiles, channels, crop, crop]   the whole picture, then its tiles, row by row
    image_attention_mask [1, 1 + tiles, patches, patches]       0 where a tile lies outside of the picture
    image_sizes          [1, 2]                                 height and width of all tiles together, pixels

The tokens are those of the tiles as one grid, without its padding, a separator behind each row, another token, and the grid of
the whole picture. transformers builds them with Python numbers; here they are arithmetic on a token's number.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MODEL_TYPE, MODEL_CLASS = "phi4_multimodal", "Phi4MultimodalForCausalLM"


def with_image_features(model: Any) -> Any:
    """The model, with a `get_image_features` if it is a Phi-4 Multimodal."""
    if type(model).__name__ == MODEL_CLASS:
        model.get_image_features = partial(get_image_features, model)
    return model


def get_image_features(
    model: Any,
    image_pixel_values: torch.Tensor,
    image_sizes: torch.Tensor,
    image_attention_mask: torch.Tensor,
    *,
    return_dict: bool = True,
) -> Any:
    """An object whose `pooler_output` has the rows of one picture, as transformers' functions of this name return.

    Args:
        model: of transformers.
        image_pixel_values, image_sizes, image_attention_mask: as the image processor gives them for one picture.
        return_dict: as for transformers; without effect.
    """
    import torch

    embed = model.model.embed_tokens_extend.image_embed
    tiles = embed.get_img_features(image_pixel_values[0], attention_mask=image_attention_mask[0].bool())
    token, separator = tiles.shape[1], embed.sub_img_feature_extensor.reshape(1, -1)
    side = int(token**0.5)
    ratio = image_sizes[0] // embed.crop_size
    table = torch.cat([tiles.flatten(0, 1), separator.to(tiles)])
    height, width = _seen(image_attention_mask[0, 1:], ratio)
    grid = table[_grid(side, ratio[1], height, width, image_pixel_values.shape[1] - 1, table.shape[0] - 1)]
    rows = torch.cat([tiles[0].unflatten(0, (side, side)), separator.expand(side, 1, -1).to(tiles)], dim=1)
    tokens = torch.cat([grid, embed.global_img_feature_extensor[0].to(tiles), rows.flatten(0, 1)])
    projected = embed.img_projection_down(torch.nn.functional.gelu(embed.img_projection_up(tokens)))
    return SimpleNamespace(pooler_output=[projected])


def _seen(mask: torch.Tensor, ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of the tiles' grid that are picture, from the tiles of its first column and of its first row."""
    import torch

    number = torch.arange(mask.shape[0])
    inside = number < ratio.prod()
    height = (mask[:, 0::2, 0].sum(dim=1) * (inside & (number % ratio[1] == 0))).sum()
    width = (mask[:, 0, 0::2].sum(dim=1) * (inside & (number < ratio[1]))).sum()
    return height.long(), width.long()


def _grid(side: int, across: Any, height: Any, width: Any, tiles: int, separator: int) -> torch.Tensor:
    """Numbers of the tokens of the tiles' grid, row by row, a separator behind each row.

    Args:
        side: tokens per side of a tile.
        across: tiles in a row.
        height, width: tokens that are picture.
        tiles: number of tiles; the whole picture comes before them.
        separator: its number.
    """
    import torch

    place = torch.arange(tiles * side * (side + 1))  # as many as these tiles can have
    row, column = place // (width + 1), place % (width + 1)
    tile = row // side * across + column // side + 1
    token = tile * side**2 + row % side * side + column % side
    return torch.where(column == width, separator, token)[row < height]
