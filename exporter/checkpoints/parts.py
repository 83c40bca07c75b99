"""What a checkpoint is cut into: three graphs of a multimodal row of `families`, one graph of a text row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...graphs.decoder_state import COMMUNITY_PAST, COMMUNITY_PRESENT
from ..families.family import BATCH, PAST, SEQUENCE, TOTAL, Arrays, Family, Shape, Shapes, Turn, Vision
from ..families.text import cached_shapes

if TYPE_CHECKING:
    import torch

VISION_ENCODER = "vision_encoder"
EMBED_TOKENS = "embed_tokens"
DECODER = "decoder_model_merged"
TEXT_DECODER = "model"  # a text-only model is one graph, with its embeddings

_BATCH, _NEW, _PAST = 2, 4, 3  # of the sample that decoders are traced on


@dataclass(frozen=True)
class Part:
    """One graph to trace: what runs, on which sample, and what its file promises to callers."""

    name: str
    run: Callable[..., Mapping[str, Any]]  # run(model, **sample)
    sample: Mapping[str, Any]
    inputs: Shapes  # in the file
    outputs: Shapes
    float32_inputs: tuple[str, ...] = ()


def parts_of(family: Family, model: Any) -> tuple[Part, ...]:
    """The graphs of this model, in the order they run in: three, or one of a text-only model.

    Raises:
        ModelUnreadable: a text-only model keeps a state that is no KV cache.
    """
    if family.vision is None:
        return (_text_decoder(family, model),)
    return _vision_encoder(family.vision, model), _embed_tokens(model), _decoder(family, model)


def tensors(model: Any, arrays: Arrays) -> dict[str, torch.Tensor]:
    """The arrays as the model takes them: floats in the weights' type."""
    import torch

    given = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor for name, tensor in given.items()}


def _vision_encoder(vision: Vision, model: Any) -> Part:
    inputs = vision.inputs(model)
    sample = vision.sample(model, np.random.default_rng(0))
    sample = {name: sample[name] for name in inputs}  # what only the caller needs is left out
    return Part(
        name=VISION_ENCODER,
        run=vision.run,
        sample=tensors(model, sample),
        inputs=inputs,
        outputs=vision.outputs(model),
        # Whatever the weights are: float32 is what image processors give, in Python as in transformers.js.
        float32_inputs=tuple(name for name, array in sample.items() if array.dtype.kind == "f"),
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


def _decoder(family: Family, model: Any) -> Part:
    """The decoder of a multimodal model, from embeddings."""
    import torch

    text = _text(model)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    embeds = torch.zeros(_BATCH, _NEW, text.hidden_size, dtype=model.dtype)
    shapes = [(text.num_key_value_heads, width, width)] * text.num_hidden_layers
    return _with_cache(DECODER, family, model, "inputs_embeds", embeds, (BATCH, SEQUENCE, text.hidden_size), shapes)


def _text_decoder(family: Family, model: Any) -> Part:
    """A text-only model, from token ids."""
    import torch

    ids = torch.zeros(_BATCH, _NEW, dtype=torch.int64)
    return _with_cache(TEXT_DECODER, family, model, "input_ids", ids, (BATCH, SEQUENCE), cached_shapes(model))


def _with_cache(
    part: str,
    family: Family,
    model: Any,
    text_input: str,
    sample: torch.Tensor,
    shape: Shape,
    cached: Sequence[tuple[int, int, int]],
) -> Part:
    """One graph for prefill (past of length 0), decode, and anything between.

    Batch 2 and a padded row on purpose: with one unpadded row torch finds the mask useless and drops it, and bakes
    batch = 1. A past that is not empty, because an empty cache has no tensors to trace.

    Args:
        text_input, sample, shape: the input that carries the text.
        cached: heads, width of a key and width of a value, per layer of the cache.
    """
    import torch
    from transformers import DynamicCache

    def run(model: Any, **inputs: Any) -> dict[str, Any]:
        outputs = family.decoder.run(model, **inputs)
        return {"logits": outputs.logits, "past_key_values": outputs.past_key_values}

    mask = np.ones((_BATCH, _PAST + _NEW), np.int64)
    mask[0, :2] = 0
    turn = Turn(ids=np.zeros_like(mask), mask=mask, length=_NEW)
    # Without the config, which would make layers with a sliding window forget: a caller's cache is as long as its mask
    # in every layer, and the attention mask hides what is outside the window.
    cache = DynamicCache()
    for layer, (heads, key_width, value_width) in enumerate(cached):
        keys, values = (
            torch.zeros(_BATCH, heads, _PAST, width, dtype=model.dtype) for width in (key_width, value_width)
        )
        cache.update(keys, values, layer)

    def per_layer(prefix: str, length: str) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        for layer, (heads, *widths) in enumerate(cached):
            for kind, width in zip(("key", "value"), widths, strict=True):
                shapes[f"{prefix}.{layer}.{kind}"] = (BATCH, heads, length, width)
        return shapes

    return Part(
        name=part,
        run=run,
        sample={
            text_input: sample,
            "attention_mask": torch.from_numpy(mask),
            **tensors(model, family.decoder.feeds(model.config, turn)),
            "past_key_values": cache,
        },
        inputs={
            text_input: shape,
            "attention_mask": (BATCH, TOTAL),
            **family.decoder.inputs(model),
            **per_layer(COMMUNITY_PAST, PAST),
        },
        # The logits stay in the weights' type: widening them restores nothing, and doubles a long prefill's largest
        # tensor. Callers that sample in float32 convert the one row they need.
        outputs={"logits": (BATCH, SEQUENCE, _text(model).vocab_size), **per_layer(COMMUNITY_PRESENT, TOTAL)},
    )


def _text(model: Any) -> Any:
    return model.config.get_text_config()
