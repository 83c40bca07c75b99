"""Why no decoder layer was found in a graph, with what was found."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import onnx_ir as ir

from .dataflow import Flow, Vertex
from .layer_count import LayerCount
from .mixers import OTHER_MIXERS, is_mixer, is_sum_of
from .sites import past_sums

_MOST_NAMED = 40  # names in a sentence


def names_of(values: Iterable[ir.Value]) -> str:
    """Names for a sentence, the first of them."""
    names = [str(value.name) for value in values]
    return ", ".join(names[:_MOST_NAMED]) + (" ..." if len(names) > _MOST_NAMED else "") or "nothing"


def reason_for_nothing(flow: Flow, has_source: bool, declared: LayerCount | None) -> str:
    """Why no layer was found.

    Args:
        has_source: whether the graph has an embedding lookup or takes embeddings.
        declared: what the config declares.
    """
    mixers = [v for v in flow.vertices if is_mixer(flow, v)]
    if not mixers:
        return (
            f"no attention found among {len(flow.vertices)} values, so there are no decoder layers; "
            "is this the decoder graph?"
        )
    if not has_source:
        return (
            f"{_counted(mixers)} but no embedding lookup or inputs_embeds among the inputs "
            f"{names_of(flow.graph.inputs)}; is this a decoder graph?"
        )
    everything = set(range(len(flow.vertices)))
    if any(_sums_between(flow, first, second, everything) for first, second in pairwise(mixers)):
        return (
            f"{len(mixers)} attention nodes follow one another without a single sum that all paths pass: "
            f"{past_sums(declared)}; such decoders cannot be guarded"
        )
    return (
        f"{_counted(mixers)} but no residual sum that every path from the embedding to the output passes; "
        "this is not a pre-norm or post-norm decoder"
    )


def _counted(mixers: list[Vertex]) -> str:
    """How many of which: convolutions and loops mix tokens too, and are no attention."""
    others = sorted({vertex.op_type for vertex in mixers if vertex.op_type in OTHER_MIXERS})
    attentions = sum(vertex.op_type not in OTHER_MIXERS for vertex in mixers)
    parts = [f"{attentions} attention node{'s' * (attentions > 1)}"] if attentions else []
    return " and ".join([*parts, *([f"nodes that mix tokens ({', '.join(others)})"] if others else [])])


def _sums_between(flow: Flow, first: Vertex, second: Vertex, everything: set[int]) -> bool:
    """Whether the way from one attention to the next leads through a sum."""
    return any(is_sum_of(flow, flow.vertices[index], everything) for index in flow.between(first, second))
