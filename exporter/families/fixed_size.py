"""Image towers that take pictures of one fixed size, a fixed number of tokens each: what most rows have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .family import IMAGE_FEATURES, IMAGES, Arrays, Shapes, Vision

if TYPE_CHECKING:
    import torch


def fixed_size_vision(features: Callable[[Any, torch.Tensor], torch.Tensor]) -> Vision:
    """`pixel_values [num_images, channels, height, width]` -> `image_features [num_images, tokens, width]`."""

    def outputs(model: Any) -> Shapes:
        import torch

        with torch.no_grad():
            _, tokens, width = features(model, torch.zeros(1, *image_shape(model), dtype=model.dtype)).shape
        return {IMAGE_FEATURES: (IMAGES, tokens, width)}

    return Vision(
        inputs=lambda model: {"pixel_values": (IMAGES, *image_shape(model))},
        outputs=outputs,
        run=lambda model, pixel_values: {IMAGE_FEATURES: features(model, pixel_values)},
        sample=random_pictures,
    )


def random_pictures(model: Any, random: np.random.Generator) -> Arrays:
    """Two pictures of noise."""
    return {"pixel_values": random.standard_normal((2, *image_shape(model))).astype(np.float32)}


def image_shape(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images the tower takes."""
    vision = model.config.vision_config
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(vision, "num_channels", 3), height, width


def own_image_features(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """transformers' `get_image_features`, where it gives one tensor `[images, tokens, width]`."""
    return model.model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
