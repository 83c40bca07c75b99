"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: images of any size, three positions per token, and in Qwen3-VL DeepStack.

The signature is that of onnx-community's Qwen2-VL:

    pixel_values   [num_patches, channels * temporal * patch * patch]
    image_grid_thw [num_images, 3] int64       patches over time, height and width
    image_features [num_image_tokens, width]
    position_ids   [3, batch, sequence] int64  time, row and column of a token (`runtime/images/positions_mrope.py`)

Qwen3-VL adds features of inner layers of the tower to the stream after the first layers of the decoder. There is no settled
signature for that; the names are those of two exporters that carry it:

    deepstack_features_{i} [num_image_tokens, width]   vision encoder (microsoft/olive-recipes)
    deepstack_embeds_{i}   [batch, sequence, width]    decoder (TensorRT Edge-LLM): features at image tokens, else zero

Dense, because then the decoder only adds: text is all zeros, and no graph has to look for image tokens.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...runtime.images.deepstack import embeds_name, features_name, scatter
from ...runtime.images.positions_mrope import mrope_positions, text_positions
from .family import BATCH, IMAGE_FEATURES, IMAGES, SEQUENCE, Arrays, Decoder, Family, Shapes, Turn, Vision
from .qwen_vision import image_features

if TYPE_CHECKING:
    import torch

PATCHES = "num_patches"
IMAGE_TOKENS = "num_image_tokens"


# The vision encoder


def vision_inputs(model: Any) -> Shapes:
    """Patches of all images in a row, and each image's grid."""
    return {"pixel_values": (PATCHES, patch_width(model.config)), "image_grid_thw": (IMAGES, 3)}


def vision_outputs(model: Any) -> Shapes:
    """One row per image token, for the embeddings and for each layer of DeepStack."""
    shape = (IMAGE_TOKENS, model.config.get_text_config().hidden_size)
    return {IMAGE_FEATURES: shape, **{features_name(number): shape for number in injections(model.config)}}


def run_vision(model: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tower, traced for any number of images of any size."""
    merged, *injected = image_features(model.model.visual, pixel_values, image_grid_thw)
    return {IMAGE_FEATURES: merged, **{features_name(number): rows for number, rows in enumerate(injected)}}


def two_images(model: Any, random: np.random.Generator) -> Arrays:
    """Noise in two shapes, one of them wider than one window of Qwen2.5-VL."""
    merge = model.config.vision_config.spatial_merge_size
    grids = np.array([[1, 3 * merge, 2 * merge], [1, 2 * merge, 5 * merge]], np.int64)
    patches = int(grids.prod(axis=1).sum())
    return {
        "pixel_values": random.standard_normal((patches, patch_width(model.config))).astype(np.float32),
        "image_grid_thw": grids,
    }


def start_and_end(config: Any) -> tuple[list[int], list[int]]:
    """`<|vision_start|>` and `<|vision_end|>`."""
    return [config.vision_start_token_id], [config.vision_end_token_id]


def patch_width(config: Any) -> int:
    """Numbers per patch."""
    vision = config.vision_config
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2


def injections(config: Any) -> range:
    """One number for each layer of the decoder that DeepStack adds something after: the first few."""
    return range(len(getattr(config.vision_config, "deepstack_visual_indexes", ())))


# The decoder


def decoder_inputs(model: Any) -> Shapes:
    """Three positions per token, and what DeepStack adds."""
    width = model.config.get_text_config().hidden_size
    injected = {embeds_name(number): (BATCH, SEQUENCE, width) for number in injections(model.config)}
    return {"position_ids": (3, BATCH, SEQUENCE), **injected}


def decoder_feeds(config: Any, turn: Turn) -> Arrays:
    """The values for `decoder_inputs`, by the rules that apps use."""
    return {"position_ids": _positions(config, turn), **_injected(config, turn)}


def decoder_reference(config: Any, turn: Turn) -> Arrays:
    """transformers computes the prompt's positions itself; at later steps its forward requires them."""
    if turn.length < turn.ids.shape[1]:
        return {"position_ids": _positions(config, turn)}
    return {"mm_token_type_ids": _is_image(config, turn).astype(np.int64)}


def run_deepstack(model: Any, **inputs: Any) -> Any:
    """`Qwen3VLForConditionalGeneration.forward`, starting with the image features."""
    text = model.model.language_model
    injected = [inputs.pop(embeds_name(number)) for number in injections(model.config)]
    # The original adds at the image tokens only, which it looks for; here the rest is zeros.
    text._deepstack_process = lambda states, _, dense: states + dense
    try:
        outputs = text(**inputs, deepstack_visual_embeds=injected, use_cache=True)
    finally:
        del text._deepstack_process  # uncovers the class's own
    logits = model.lm_head(outputs.last_hidden_state)
    return SimpleNamespace(logits=logits, past_key_values=outputs.past_key_values)


def _positions(config: Any, turn: Turn) -> np.ndarray:
    if not turn.given:
        return text_positions(turn.mask)[..., -turn.length :]
    merge = config.vision_config.spatial_merge_size
    positions = mrope_positions(_is_image(config, turn), turn.mask, turn.given["image_grid_thw"], merge)
    return positions[..., -turn.length :]


def _injected(config: Any, turn: Turn) -> Arrays:
    shape = (*turn.ids.shape, config.get_text_config().hidden_size)
    dense = {embeds_name(number): np.zeros(shape, np.float32) for number in injections(config)}
    if turn.seen:
        dense = scatter(turn.seen, _is_image(config, turn))
    return {name: rows[:, -turn.length :] for name, rows in dense.items()}


def _is_image(config: Any, turn: Turn) -> np.ndarray:
    """Positions of the prompts' image tokens, without image tokens in the answer."""
    found = turn.ids == config.image_token_id
    if not turn.given:
        return found
    tokens = turn.given["image_grid_thw"].prod(axis=1) // config.vision_config.spatial_merge_size**2
    return found & (found.cumsum(axis=1) <= tokens[:, None])


_VISION = Vision(inputs=vision_inputs, outputs=vision_outputs, run=run_vision, sample=two_images, around=start_and_end)
_DECODER = Decoder(inputs=decoder_inputs, feeds=decoder_feeds, reference=decoder_reference)

QWEN2_VL = Family(
    model_type="qwen2_vl",
    model_class="Qwen2VLForConditionalGeneration",
    image_towers=("qwen2_vl_vision", "qwen2_vl"),
    vision=_VISION,
    decoder=_DECODER,
)
QWEN2_5_VL = Family(
    model_type="qwen2_5_vl",
    model_class="Qwen2_5_VLForConditionalGeneration",
    image_towers=("qwen2_5_vl_vision", "qwen2_5_vl"),
    vision=_VISION,
    decoder=_DECODER,
)
QWEN3_VL = Family(
    model_type="qwen3_vl",
    model_class="Qwen3VLForConditionalGeneration",
    image_towers=("qwen3_vl_vision", "qwen3_vl"),
    vision=_VISION,
    decoder=Decoder(inputs=decoder_inputs, feeds=decoder_feeds, reference=decoder_reference, run=run_deepstack),
)
