"""The layers of a decoder whose sums are not passed by every path from the text: the spine without its side paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from .avoidance import Surroundings
from .dataflow import Flow, Vertex
from .errors import AnatomyNotFound
from .layer_count import LayerCount
from .layering import Chain, Layer
from .mixers import is_attention
from .side_paths import Judge, SidePath, state_values, text_flow, without
from .sites import past_sums
from .spine import entries, spine


@dataclass(frozen=True, eq=False)
class SpineStream:
    """A stream that was found from its end.

    Attributes:
        whole: the flow with the side paths.
        flow: without them: in it every state of the stream dominates the sink.
        chain: its dominator chain.
        source: where the stream begins.
        layers: one per layer, ascending.
        edges: where side paths enter: the value, and what a layer makes of it and of the stream.
        around: the top graph, and which of its inputs are text.
    """

    whole: Flow
    flow: Flow
    chain: Chain
    source: Vertex
    layers: list[Layer]
    edges: list[tuple[Vertex, Vertex]]
    around: Surroundings
    declared: LayerCount | None

    def harmless_paths(self) -> tuple[SidePath, ...]:
        """The side paths.

        Raises:
            AnatomyNotFound: one of them may carry what a guard edits.
        """
        outputs = [layer.output for layer in self.layers]
        states = dict.fromkeys(state_values(self.source), 0)
        for number, output in enumerate(outputs):
            states |= dict.fromkeys(state_values(output), number + 1)
        stream = {vertex.index for vertex in self.flow.dominator_chain(self.source, self.chain.sink)}
        judge = Judge(self.whole, self.around, states, stream)
        found = []
        for value, first in self.edges:
            layer = sum(output.index < first.index for output in outputs)
            path = judge.judge(value, first, layer) if layer < len(outputs) else "no layer follows"
            if isinstance(path, str):
                where = f"layer {layer}" if layer < len(outputs) else "the end of the graph"
                raise AnatomyNotFound(
                    f"{value.name!r} enters {where} past the {len(outputs)} layers' residual sums, and {path}: "
                    f"{past_sums(self.declared)}; such decoders cannot be guarded"
                )
            found.append(path)
        return tuple(found)


def stream_by_spine(
    flow: Flow, top: ir.Graph, sources: Sequence[Vertex], sink: Vertex, declared: LayerCount | None
) -> SpineStream | None:
    """The stream found from its end; `None` where that shows no decoder, or nothing but what dominators show too.

    Args:
        flow: of the body.
        top: the top graph.
        sources: where the stream may begin.
        sink: where it ends.
        declared: what the config declares; without it every attention must be in a layer of its own.
    """
    states = spine(flow, sink)
    source = next((vertex for vertex in states if vertex in sources), None)
    if source is None or source.value is None:
        return None
    around = Surroundings(top, [], [source.value], _width(source))
    states = states[states.index(source) :]
    edges = list(entries(flow, states, text_flow(flow, around)))
    if not edges:
        return None
    reduced = without(flow, [(value.index, first.index) for value, first in edges])
    chain = Chain(reduced, source, sink)
    try:
        layers = chain.layers(declared)
    except AnatomyNotFound:
        return None
    wanted = declared.count if declared is not None else _attentions(reduced, source, sink)
    return (
        SpineStream(flow, reduced, chain, source, layers, edges, around, declared)
        if 0 < len(layers) == wanted
        else None
    )


def _attentions(flow: Flow, source: Vertex, sink: Vertex) -> int:
    return sum(is_attention(flow, flow.vertices[index]) for index in flow.between(source, sink))


def _width(source: Vertex) -> int:
    shape = source.value.shape if source.value is not None else None
    width = shape[-1] if shape is not None and len(shape) else None
    return width if isinstance(width, int) else -1  # then tables are not known by it
