"""LLaVA 1.5, BakLLaVA, llava-interleave: a CLIP or SigLIP tower, a projector, any language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .family import Family
from .fixed_size import fixed_size_vision

if TYPE_CHECKING:
    import torch


def projected_features(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """`LlavaModel.get_image_features`, as [images, tokens, width].

    The original ends in `list(features)`, one tensor per image, and so cannot be traced for any number of images.
    """
    import torch

    llava, config = model.model, model.config
    hidden_states = llava.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    layers = config.vision_feature_layer
    chosen = [hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":
        chosen = [states[:, 1:] for states in chosen]  # without the class token
    return llava.multi_modal_projector(torch.cat(chosen, dim=-1))


LLAVA = Family(
    model_type="llava",
    model_class="LlavaForConditionalGeneration",
    # Pixtral's model type is "llava" too, but its tower takes images of any size.
    image_towers=("clip_vision_model", "siglip_vision_model"),
    vision=fixed_size_vision(projected_features),
)
