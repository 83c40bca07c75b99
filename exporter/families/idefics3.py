"""Idefics3 and SmolVLM: pictures as tiles, all tiles of one prompt in one row, shorter rows filled with empty tiles.

`pixel_values [batch, num_images, 3, size, size]`, `pixel_attention_mask [batch, num_images, size, size]` (bool)
-> `image_features [tiles, tokens, width]`, of the tiles that are not empty, in reading order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .family import BATCH, IMAGE_FEATURES, IMAGES, Arrays, Family, Shapes, Vision
from .fixed_size import image_shape

if TYPE_CHECKING:
    import torch

TILES = "num_tiles"


def inputs(model: Any) -> Shapes:
    channels, height, width = image_shape(model)
    return {
        "pixel_values": (BATCH, IMAGES, channels, height, width),
        "pixel_attention_mask": (BATCH, IMAGES, height, width),
    }


def outputs(model: Any) -> Shapes:
    vision = model.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 // model.config.scale_factor**2
    return {IMAGE_FEATURES: (TILES, tokens, model.config.get_text_config().hidden_size)}


def run(model: Any, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """`Idefics3Model.get_image_features`, without its list of one tensor per prompt."""
    import torch

    patch = model.config.vision_config.patch_size
    pixels, mask = pixel_values.flatten(0, 1), pixel_attention_mask.flatten(0, 1)
    filled = (pixels != 0).flatten(1).any(-1).nonzero().squeeze(-1)
    torch._check(filled.shape[0] > 0)
    pixels, mask = pixels[filled], mask[filled]
    patches = mask.to(torch.int64).unfold(1, patch, patch).unfold(2, patch, patch).sum(dim=(-1, -2)) > 0
    states = model.model.vision_model(pixel_values=pixels, patch_attention_mask=patches, return_dict=True)
    return {IMAGE_FEATURES: model.model.connector(states.last_hidden_state)}


def sample(model: Any, random: np.random.Generator) -> Arrays:
    """One prompt with two tiles, the second half padding; one prompt with one tile, and an empty one to fill its row."""
    channels, height, width = image_shape(model)
    pixels = random.standard_normal((2, 2, channels, height, width)).astype(np.float32)
    mask = np.ones((2, 2, height, width), bool)
    mask[0, 1, height // 2 :] = False
    pixels[1, 1], mask[1, 1] = 0, False
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


IDEFICS3 = Family(
    model_type="idefics3",
    model_class="Idefics3ForConditionalGeneration",
    image_towers=("idefics3_vision",),
    vision=Vision(inputs=inputs, outputs=outputs, run=run, sample=sample),
)
SMOLVLM = Family(
    model_type="smolvlm",
    model_class="SmolVLMForConditionalGeneration",
    image_towers=("smolvlm_vision",),
    vision=IDEFICS3.vision,
)
