"""What a checkpoint is cut into: one row per model family, and the three graphs every row is traced as.

    pixel_values ─► vision_encoder ─► image_features ┐
                                                     ├─► (caller puts the features at the image tokens)
    input_ids ────► embed_tokens ───► inputs_embeds ─┘                      │
                            logits, present.* ◄── decoder_model_merged ◄────┘

To support another family, add a row to `FAMILIES`. A row only says what differs: where image features come from and
which image towers that was tried with. Embeddings, decoder and head are found the same way in every transformers model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..graphs.errors import GuardError

if TYPE_CHECKING:
    import torch

# The names of the axes whose length is not fixed; every other axis of an input is as long as in the sample.
IMAGES = "num_images"
BATCH = "batch_size"
SEQUENCE = "sequence_length"
PAST = "past_sequence_length"
TOTAL = "total_sequence_length"  # always PAST + SEQUENCE

VISION_ENCODER = "vision_encoder"
EMBED_TOKENS = "embed_tokens"
DECODER = "decoder_model_merged"


@dataclass(frozen=True)
class Family:
    """One supported kind of checkpoint, matched by its config's `model_type`."""

    model_type: str
    model_class: str  # in transformers
    image_features: Callable[[Any, torch.Tensor], torch.Tensor]
    image_towers: tuple[str, ...]  # `vision_config.model_type` of the towers that take images of one fixed size


@dataclass(frozen=True)
class Part:
    """One graph to trace: what runs, on which sample, and what its file promises to callers."""

    name: str
    run: Callable[..., Mapping[str, Any]]  # run(model, **sample)
    sample: Mapping[str, Any]
    inputs: Mapping[str, tuple[str | int, ...]]  # name -> shape, in the file
    outputs: Mapping[str, tuple[str | int, ...]]
    float32_inputs: tuple[str, ...] = ()


def llava_image_features(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
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


FAMILIES: tuple[Family, ...] = (
    Family(
        # llava-1.5, bakllava, llava-interleave. pixtral says "llava" too, but its tower takes images of any size.
        model_type="llava",
        model_class="LlavaForConditionalGeneration",
        image_features=llava_image_features,
        image_towers=("clip_vision_model", "siglip_vision_model"),
    ),
)


def find_family(config: Mapping[str, Any], checkpoint: str) -> Family:
    """The one row for this `config.json`; refuses what no row was written for."""
    model_type = config.get("model_type")
    family = next((row for row in FAMILIES if row.model_type == model_type), None)
    if family is None:
        supported = ", ".join(row.model_type for row in FAMILIES)
        raise GuardError(
            f"{checkpoint}: its config.json says model_type {model_type!r}; supported: {supported}. "
            f"Export it to ONNX with its own tools and guard that folder instead"
        )
    tower = (config.get("vision_config") or {}).get("model_type", family.image_towers[0])
    if tower not in family.image_towers:
        raise GuardError(
            f"{checkpoint}: its image tower is {tower!r}; supported for {model_type}: "
            f"{', '.join(family.image_towers)}. "
            f"Export it to ONNX with its own tools and guard that folder instead"
        )
    return family


def parts_of(family: Family, model: Any) -> tuple[Part, Part, Part]:
    """The three graphs of this model, in the order they run in."""
    return _vision_encoder(family, model), _embed_tokens(model), _decoder(model)


def image_shape(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images the tower takes."""
    vision = model.config.vision_config
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(vision, "num_channels", 3), height, width


def _vision_encoder(family: Family, model: Any) -> Part:
    import torch

    def run(model: Any, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"image_features": family.image_features(model, pixel_values)}

    pixel_values = torch.zeros(2, *image_shape(model), dtype=model.dtype)
    with torch.no_grad():
        _, tokens, width = run(model, pixel_values)["image_features"].shape
    return Part(
        name=VISION_ENCODER,
        run=run,
        sample={"pixel_values": pixel_values},
        inputs={"pixel_values": (IMAGES, *image_shape(model))},
        outputs={"image_features": (IMAGES, tokens, width)},
        # Whatever the weights are: float32 is what image processors give, in Python as in transformers.js.
        float32_inputs=("pixel_values",),
    )


def _embed_tokens(model: Any) -> Part:
    import torch

    def run(model: Any, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"inputs_embeds": model.get_input_embeddings()(input_ids)}

    return Part(
        name=EMBED_TOKENS,
        run=run,
        sample={"input_ids": torch.zeros(2, 4, dtype=torch.int64)},
        inputs={"input_ids": (BATCH, SEQUENCE)},
        outputs={"inputs_embeds": (BATCH, SEQUENCE, _text(model).hidden_size)},
    )


def _decoder(model: Any) -> Part:
    """One graph for prefill (past of length 0), decode, and anything between.

    Batch 2 and a padded row on purpose: with one unpadded row torch finds the mask useless and drops it, and bakes
    batch = 1. A past that is not empty, because an empty cache has no tensors to trace.
    """
    import torch
    from transformers import DynamicCache

    batch, sequence, past = 2, 4, 3
    text = _text(model)
    heads = text.num_key_value_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    def run(model: Any, **inputs: Any) -> dict[str, Any]:
        outputs = type(model).forward(model, use_cache=True, **inputs)
        return {"logits": outputs.logits, "past_key_values": outputs.past_key_values}

    attention_mask = torch.ones(batch, past + sequence, dtype=torch.int64)
    attention_mask[0, :2] = 0
    cache = DynamicCache(config=text)
    for layer in range(text.num_hidden_layers):
        keys, values = torch.zeros(2, batch, heads, past, head_width, dtype=model.dtype)
        cache.update(keys, values, layer)

    def per_layer(prefix: str, length: str) -> dict[str, tuple[str | int, ...]]:
        layers = range(text.num_hidden_layers)
        shape = (BATCH, heads, length, head_width)
        return {f"{prefix}.{layer}.{kind}": shape for layer in layers for kind in ("key", "value")}

    return Part(
        name=DECODER,
        run=run,
        sample={
            "inputs_embeds": torch.zeros(batch, sequence, text.hidden_size, dtype=model.dtype),
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past:],
            "past_key_values": cache,
        },
        inputs={
            "inputs_embeds": (BATCH, SEQUENCE, text.hidden_size),
            "attention_mask": (BATCH, TOTAL),
            "position_ids": (BATCH, SEQUENCE),
            **per_layer("past_key_values", PAST),
        },
        # The logits stay in the weights' type: widening them restores nothing, and doubles a long prefill's largest
        # tensor. Callers that sample in float32 convert the one row they need.
        outputs={"logits": (BATCH, SEQUENCE, text.vocab_size), **per_layer("present", TOTAL)},
    )


def _text(model: Any) -> Any:
    return model.config.get_text_config()
