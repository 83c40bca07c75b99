"""LLaVA-OneVision: any resolution, as a grid of tiles and a small copy of the whole picture.

The vision encoder sees tiles, `pixel_values [num_images, 3, height, width]`, and gives `tokens + 1` rows for each: the
last is the model's row separator. A picture that is one tile takes all of them, as transformers does where a prompt has
several pictures, and as transformers.js always does. For a picture of several tiles the caller lays the grid out, cuts
its padding off and puts a separator after every row, which is `pack`: shapes depend on the picture, so no graph can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .family import IMAGE_FEATURES, Arrays, Family
from .fixed_size import fixed_size_vision, image_shape
from .llava import projected_features

if TYPE_CHECKING:
    import torch


def features_and_separator(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """`[tiles, tokens + 1, width]`."""
    import torch

    features = projected_features(model, pixel_values)
    separator = model.model.image_newline.to(features.dtype).expand(features.shape[0], 1, -1)
    return torch.cat([features, separator], dim=1)


def sample(model: Any, random: np.random.Generator) -> Arrays:
    """A wide picture and a tall one, each as a base tile and its grid, one after the other."""
    channels, height, width = image_shape(model)
    sizes = np.array([[height, 2 * width - 1], [2 * height, width // 2]])
    tiles = sum(1 + math.prod(grid_of(size, model.config)) for size in sizes)
    pixels = random.standard_normal((tiles, channels, height, width)).astype(np.float32)
    return {"pixel_values": pixels, "image_sizes": sizes}


def place(config: Any, given: Arrays, seen: Arrays) -> np.ndarray:
    """The rows of all pictures, `[image tokens, width]`; `given["image_sizes"] [pictures, 2]` are their own sizes."""
    rows, start = [], 0
    for size in given["image_sizes"]:
        tiles = 1 + math.prod(grid_of(size, config))
        rows.append(pack(config, seen[IMAGE_FEATURES][start : start + tiles], size))
        start += tiles
    return np.concatenate(rows)


def pack(config: Any, features: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """`LlavaOnevisionModel.pack_image_features` for one picture of `size` (height, width)."""
    separator, tiles = features[0, -1], features[:, :-1]
    side = config.vision_config.image_size // config.vision_config.patch_size
    rows, columns = grid_of(size, config)
    grid = tiles[1:].reshape(rows, columns, side, side, -1).transpose(0, 2, 1, 3, 4)
    grid = _unpadded(grid.reshape(rows * side, columns * side, -1), size)
    ratio = math.sqrt(grid.shape[0] * grid.shape[1] / (_most_tiles(config) * side**2))
    if ratio > 1.1:
        grid = _resized(grid, int(grid.shape[0] // ratio), int(grid.shape[1] // ratio))
    ends = np.broadcast_to(separator, (len(grid), 1, len(separator)))
    return np.concatenate([tiles[0], np.concatenate([grid, ends], axis=1).reshape(-1, len(separator))])


def grid_of(size: Sequence[int], config: Any) -> tuple[int, int]:
    """Rows and columns of tiles for a picture of `size`: the resolution that keeps most of it and wastes least."""
    tall, wide = (int(length) for length in size)

    def kept_and_wasted(resolution: Sequence[int]) -> tuple[int, int]:
        scale = min(resolution[1] / wide, resolution[0] / tall)
        kept = min(int(wide * scale) * int(tall * scale), wide * tall)
        return kept, kept - resolution[0] * resolution[1]

    best = max(config.image_grid_pinpoints, key=kept_and_wasted)  # the first of equals
    return best[0] // config.vision_config.image_size, best[1] // config.vision_config.image_size


def _unpadded(grid: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Without the bars that made the picture fit the grid; `[height, width, channels]`."""
    tall, wide = (int(length) for length in size)
    height, width = grid.shape[:2]
    if wide / tall > width / height:
        bar = (height - int(round(tall * (width / wide), 7))) // 2
        return grid[bar : height - bar]
    bar = (width - int(round(wide * (height / tall), 7))) // 2
    return grid[:, bar : width - bar]


def _most_tiles(config: Any) -> int:
    return int(getattr(config, "vision_aspect_ratio", "anyres_max_9").removeprefix("anyres_max_"))


def _resized(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, corners not aligned, no antialiasing: torch's `interpolate(mode="bilinear")`."""

    def along(axis: int, grid: np.ndarray, length: int) -> np.ndarray:
        have = grid.shape[axis]
        at = np.maximum((np.arange(length) + 0.5) * (have / length) - 0.5, 0).astype(np.float32)
        low = at.astype(np.int64)
        high = np.minimum(low + 1, have - 1)
        weight = (at - low).reshape(-1, *[1] * (grid.ndim - axis - 1)).astype(grid.dtype)
        return grid.take(low, axis) * (1 - weight) + grid.take(high, axis) * weight

    return along(1, along(0, grid, height), width)


LLAVA_ONEVISION = Family(
    model_type="llava_onevision",
    model_class="LlavaOnevisionForConditionalGeneration",
    image_towers=("siglip_vision_model",),
    vision=replace(fixed_size_vision(features_and_separator), sample=sample, place=place),
)
