"""LLaVA-OneVision: any resolution, as a grid of tiles and a small copy of the whole picture.

The vision encoder sees tiles, `pixel_values [num_images, 3, height, width]`, and gives `tokens + 1` rows for each: the
last is the model's row separator. A picture that is one tile takes all of them, as transformers does where a prompt has
several pictures, and as transformers.js always does. For a picture of several tiles the caller lays the grid out, cuts
its padding off and puts a separator after every row (`placing.llava_onevision`): shapes depend on the picture, so no
graph can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...runtime.images import placing
from ...runtime.images.images_anyres import best_resolution
from ...runtime.images.prepared_picture import PreparedPicture
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
    return all_laid_out(config, given, seen, _tiles(config))


def all_laid_out(config: Any, given: Arrays, seen: Arrays, most_tiles: int | None) -> np.ndarray:
    """`placing.laid_out` for each picture of several.

    Args:
        config: of the model.
        given: what the image processor gave, with `image_sizes [images, 2]`.
        seen: `image_features [tiles, tokens, width]` of all pictures.
        most_tiles: as for `placing.laid_out`.
    """
    rows, start = [], 0
    for size in given["image_sizes"]:
        grid = grid_of(size, config)
        features = {IMAGE_FEATURES: seen[IMAGE_FEATURES][start : start + 1 + math.prod(grid)]}
        rows.append(placing.laid_out(PreparedPicture({"image_sizes": size[None]}, grid), features, most_tiles))
        start += 1 + math.prod(grid)
    return np.concatenate(rows)


def grid_of(size: Sequence[int], config: Any) -> tuple[int, int]:
    """Rows and columns of tiles for a picture of `size`: the resolution that keeps most of it and wastes least."""
    height, width = best_resolution(size, config.image_grid_pinpoints)
    return height // config.vision_config.image_size, width // config.vision_config.image_size


def _tiles(config: Any) -> int:
    ratio = getattr(config, "vision_aspect_ratio", f"anyres_max_{placing.ONEVISION_TILES}")
    return int(ratio.removeprefix("anyres_max_"))


LLAVA_ONEVISION = Family(
    model_type="llava_onevision",
    model_class="LlavaOnevisionForConditionalGeneration",
    image_towers=("siglip_vision_model",),
    vision=replace(fixed_size_vision(features_and_separator), sample=sample, place=place),
)
