"""What a checkpoint is cut into: the three graphs that every row of `families` is traced as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...graphs.decoder_state import COMMUNITY_PAST, COMMUNITY_PRESENT
from ..families.family import BATCH, PAST, SEQUENCE, TOTAL, Arrays, Family, Shape, Shapes, Turn

if TYPE_CHECKING:
    import torch

VISION_ENCODER = "vision_encoder"
EMBED_TOKENS = "embed_tokens"
DECODER = "decoder_model_merged"


@dataclass(frozen=True)
class Part:
    """One graph to trace: what runs, on which sample, and what its file promises to callers."""

    name: str
    run: Callable[..., Mapping[str, Any]]  # run(model, **sample)
    sample: Mapping[str, Any]
    inputs: Shapes  # in the file
    outputs: Shapes
    float32_inputs: tuple[str, ...] = ()


def parts_of(family: Family, model: Any) -> tuple[Part, Part, Part]:
    """The three graphs of this model, in the order they run in."""
    return _vision_encoder(family, model), _embed_tokens(model), _decoder(family, model)


def tensors(model: Any, arrays: Arrays) -> dict[str, torch.Tensor]:
    """The arrays as the model takes them: floats in the weights' type."""
    import torch

    given = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor for name, tensor in given.items()}


def _vision_encoder(family: Family, model: Any) -> Part:
    inputs = family.vision.inputs(model)
    sample = family.vision.sample(model, np.random.default_rng(0))
    sample = {name: sample[name] for name in inputs}  # what only the caller needs is left out
    return Part(
        name=VISION_ENCODER,
        run=family.vision.run,
        sample=tensors(model, sample),
        inputs=inputs,
        outputs=family.vision.outputs(model),
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
        outputs = family.decoder.run(model, **inputs)
        return {"logits": outputs.logits, "past_key_values": outputs.past_key_values}

    mask = np.ones((batch, past + sequence), np.int64)
    mask[0, :2] = 0
    turn = Turn(ids=np.zeros_like(mask), mask=mask, length=sequence)
    # Without the config, which would make layers with a sliding window forget: a caller's cache is as long as its mask
    # in every layer, and the attention mask hides what is outside the window.
    cache = DynamicCache()
    for layer in range(text.num_hidden_layers):
        keys, values = torch.zeros(2, batch, heads, past, head_width, dtype=model.dtype)
        cache.update(keys, values, layer)

    def per_layer(prefix: str, length: str) -> dict[str, Shape]:
        layers = range(text.num_hidden_layers)
        shape = (BATCH, heads, length, head_width)
        return {f"{prefix}.{layer}.{kind}": shape for layer in layers for kind in ("key", "value")}

    return Part(
        name=DECODER,
        run=run,
        sample={
            "inputs_embeds": torch.zeros(batch, sequence, text.hidden_size, dtype=model.dtype),
            "attention_mask": torch.from_numpy(mask),
            **tensors(model, family.decoder.feeds(model.config, turn)),
            "past_key_values": cache,
        },
        inputs={
            "inputs_embeds": (BATCH, SEQUENCE, text.hidden_size),
            "attention_mask": (BATCH, TOTAL),
            **family.decoder.inputs(model),
            **per_layer(COMMUNITY_PAST, PAST),
        },
        # The logits stay in the weights' type: widening them restores nothing, and doubles a long prefill's largest
        # tensor. Callers that sample in float32 convert the one row they need.
        outputs={"logits": (BATCH, SEQUENCE, text.vocab_size), **per_layer(COMMUNITY_PRESENT, TOTAL)},
    )


def _text(model: Any) -> Any:
    return model.config.get_text_config()
