"""Graphs beside the decoder: encoders and embeddings, which hold no part of a decoder.

An app opens them by other names than the decoder's, so the graph itself is examined: whether it has logits or a cache, and
whether an attention sees text.
"""

from __future__ import annotations

import onnx_ir as ir

from .anatomy import DecoderAnatomy, dissect, find_sink, prepare
from .avoidance import Surroundings
from .decoder_state import is_longer, is_state_name, state_pairs
from .errors import AnatomyNotFound
from .influence import spread


def decoder_in(model: ir.Model, decoder: ir.Model, anatomy: DecoderAnatomy, is_head: bool = False) -> str:
    """Why a graph is, or holds, a part of a decoder; "" where it does not.

    Args:
        model: the graph; functions are inlined in it.
        decoder, anatomy: the decoder that it stands beside.
        is_head: whether the runtime runs it behind the decoder; it may output logits if it takes the last states alone.
    """
    prepare(model)
    if any(value.name == "logits" for value in model.graph.outputs) or _answers(model, decoder, anatomy.width):
        inputs = [value.name for value in model.graph.inputs if value.name not in model.graph.initializers]
        if not is_head or inputs != [find_sink(decoder.graph).name]:
            return "outputs logits"
    cache = _cache(model)
    if cache is not None:
        return f"keeps a cache ({cache!r})"
    if _attends_to_text(model, anatomy.width):
        return "has an attention that sees text"
    return "holds decoder layers" if _has_layers(model, anatomy.width) else ""


def _answers(model: ir.Model, decoder: ir.Model, width: int) -> bool:
    """Whether an output has as many numbers per token as the decoder's logits."""
    shape = find_sink(decoder.graph).shape
    vocabulary = shape[-1] if shape is not None and len(shape) else None
    if not isinstance(vocabulary, int) or vocabulary == width:
        return False
    return any(
        value.shape is not None and len(value.shape) > 1 and value.shape[-1] == vocabulary
        for value in model.graph.outputs
    )


def _cache(model: ir.Model) -> str | None:
    """The name of a KV cache: by its form, an input that an output continues, or by the names that exporters give caches."""
    named = (value.name or "" for value in (*model.graph.inputs, *model.graph.outputs))
    known = next((name for name in named if is_state_name(name)), None)
    return known or next((pair.past for pair in state_pairs(model.graph) if is_longer(model.graph, pair)), None)


def _attends_to_text(model: ir.Model, width: int) -> bool:
    around = Surroundings(model.graph, [], [], width)
    seen = spread(around.influence, dict.fromkeys(around.text_cells(), 1), {})
    return any(what == "mixer" and seen[cell] for cell, what in around.weights.items())


def _has_layers(model: ir.Model, width: int) -> bool:
    """Whether the anatomy finds a decoder of this width in it."""
    try:
        found = dissect(model)
    except AnatomyNotFound:
        return False
    return found.width == width and any(value.name == found.source for value in model.graph.inputs)
