"""The parts of a checkpoint: three graphs for a multimodal row of `families`, one graph for a text row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ...graphs.decoder_state import COMMUNITY_PAST
from ...graphs.errors import ModelUnreadable
from ..families.family import BATCH, SEQUENCE, TOTAL, Arrays, Family, Shapes, Turn, Vision
from ..families.grid_tracing import has_grid, on_grid, run_on_grid, take_patches
from .traced_state import StateTensor, find_state, fresh_cache

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
    state: tuple[StateTensor, ...] = ()
    held: bool = True  # whether axes of one name are held to one length while it is traced
    finish: Callable[[ir.Graph], None] | None = None  # makes the promised inputs of the traced ones
    instead: Part | None = None  # what to trace where this cannot be

    @property
    def state_names(self) -> dict[str, str]:
        """The state's names in the trace, with the side, and in the file."""
        names = {}
        for tensor in self.state:
            names[f"input.{COMMUNITY_PAST}.{tensor.leaf}"] = tensor.past
            names[f"output.{COMMUNITY_PAST}.{tensor.leaf}"] = tensor.present
        return names


def parts_of(family: Family, model: Any) -> tuple[Part, ...]:
    """The graphs of this model, in the order they run in: three, or one of a text-only model.

    Raises:
        ModelUnreadable: its state follows neither prompts nor tokens.
    """
    if family.vision is None:
        return (_text_decoder(family, model),)
    return *around_decoder(family, model), _decoder(family, model)


def around_decoder(family: Family, model: Any) -> tuple[Part, Part]:
    """The vision encoder and the embeddings of a multimodal model."""
    assert family.vision is not None
    return _vision_encoder(family.vision, model), _embed_tokens(family, model)


def tensors(model: Any, arrays: Arrays) -> dict[str, torch.Tensor]:
    """The arrays as the model takes them: floats in the weights' type."""
    import torch

    given = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor for name, tensor in given.items()}


def _vision_encoder(vision: Vision, model: Any) -> Part:
    inputs, outputs = vision.inputs(model), vision.outputs(model)
    sample = vision.sample(model, np.random.default_rng(0)) if vision.traced is None else vision.traced
    sample = {name: sample[name] for name in inputs}  # what only the caller needs is left out
    part = Part(
        name=VISION_ENCODER,
        run=vision.run,
        sample=tensors(model, sample),
        inputs=inputs,
        outputs=outputs,
        # Whatever the weights are: float32 is what image processors give, in Python as in transformers.js.
        float32_inputs=tuple(name for name, array in sample.items() if array.dtype.kind == "f"),
        held=vision.held,
    )
    if vision.traced is None or not has_grid(sample):
        return part
    gridded = replace(part, run=run_on_grid, sample=tensors(model, on_grid(sample)), finish=take_patches)
    return replace(part, instead=gridded)


def _embed_tokens(family: Family, model: Any) -> Part:
    import torch

    sample = torch.zeros(2, 4, dtype=torch.int64)
    with torch.no_grad():
        shapes = {
            name: (BATCH, SEQUENCE, *rows.shape[2:]) for name, rows in family.decoder.embeds(model, sample).items()
        }
    return Part(
        name=EMBED_TOKENS,
        run=lambda model, input_ids: family.decoder.embeds(model, input_ids),
        sample={"input_ids": sample},
        inputs={"input_ids": (BATCH, SEQUENCE)},
        outputs=shapes,
    )


def _decoder(family: Family, model: Any) -> Part:
    """The decoder of a multimodal model, from what the embedding graph gives."""
    import torch

    def embeds(batch: int, tokens: int) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            rows = family.decoder.embeds(model, torch.zeros(batch, tokens, dtype=torch.int64))
        return {name: torch.zeros_like(part) for name, part in rows.items()}

    return _with_cache(DECODER, family, model, embeds)


def _text_decoder(family: Family, model: Any) -> Part:
    """A text-only model, from token ids."""
    import torch

    def ids(batch: int, tokens: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(batch, tokens, dtype=torch.int64)}

    return _with_cache(TEXT_DECODER, family, model, ids)


def _with_cache(part: str, family: Family, model: Any, text_of: Callable[[int, int], dict[str, torch.Tensor]]) -> Part:
    """One graph for prefill (state of length 0), decode, and anything between.

    Batch 2 and a padded row on purpose: with one unpadded row torch finds the mask useless and drops it, and bakes
    batch = 1. A state that is not empty, because an empty cache has no tensors to trace.

    Args:
        text_of: a sample of the inputs that carry the text, by name, for a number of prompts and of tokens.
    """
    import torch

    def call(cache: Any, mask: np.ndarray, new: int) -> dict[str, Any]:
        turn = Turn(ids=np.zeros_like(mask), mask=mask, length=new)
        return {
            **text_of(len(mask), new),
            "attention_mask": torch.from_numpy(mask),
            **tensors(model, family.decoder.feeds(model.config, turn)),
            COMMUNITY_PAST: cache,
        }

    def prefill(batch: int, tokens: int) -> Any:
        with torch.no_grad():
            inputs = call(fresh_cache(model), np.ones((batch, tokens), np.int64), tokens)
            outputs = family.decoder.run(model, **inputs)
        if getattr(outputs, "past_key_values", None) is None:
            raise ModelUnreadable(
                f"{model.name_or_path}: {model.config.model_type} returns no past_key_values; only decoders whose forward "
                "returns their cache under that name are exported"
            )
        return outputs.past_key_values

    def run(model: Any, **inputs: Any) -> dict[str, Any]:
        outputs = family.decoder.run(model, **inputs)
        return {"logits": outputs.logits, COMMUNITY_PAST: outputs.past_key_values}

    state = find_state(prefill, model)
    mask = np.ones((_BATCH, _PAST + _NEW), np.int64)
    mask[0, :2] = 0
    return Part(
        name=part,
        run=run,
        sample=call(prefill(_BATCH, _PAST), mask, _NEW),
        inputs={
            **{name: (BATCH, SEQUENCE, *rows.shape[2:]) for name, rows in text_of(_BATCH, _NEW).items()},
            "attention_mask": (BATCH, TOTAL),
            **family.decoder.inputs(model),
            **{tensor.past: tensor.shape for tensor in state},
        },
        # The logits stay in the weights' type: widening them restores nothing, and doubles a long prefill's largest
        # tensor. Callers that sample in float32 convert the one row they need.
        outputs={
            "logits": (BATCH, SEQUENCE, _vocabulary(model)),
            **{tensor.present: tensor.shape_after for tensor in state},
        },
        state=state,
    )


def _vocabulary(model: Any) -> int:
    """Number of logits, which may differ from the number of embeddings, and be less than the rows of a padded head."""
    unpadded, head = getattr(_text(model), "unpadded_vocab_size", None), model.get_output_embeddings()
    rows = head.weight.shape[0] if head is not None else _text(model).vocab_size
    return min(rows, unpadded) if isinstance(unpadded, int) else rows


def _text(model: Any) -> Any:
    return model.config.get_text_config()
