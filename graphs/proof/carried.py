"""Values on the side paths of a guarded graph, examined with the states after the guards.

The anatomy judged them in the unguarded graph. A guarded graph may have been edited by hand since, so the proof trusts the
names of the side paths alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import onnx_ir as ir

from ..anatomy import ResidualStream
from ..avoidance import Surroundings
from ..dataflow import Flow, Vertex
from ..rewrite import GuardReport
from ..side_paths import Judge, SidePath, without
from ..sites import ResidualSite, find_node
from ..subgraphs import DecoderSubgraph


def without_side_paths(flow: Flow, values: Mapping[str, ir.Value], paths: Iterable[SidePath]) -> Flow:
    """The flow of a body but for the edges by which side paths enter; those that are gone are no edges.

    Args:
        values: of the body, by name.
    """
    return without(flow, [(value.index, first.index) for _, value, first in _edges(flow, values, paths)])


def carrying(
    body: DecoderSubgraph, flow: Flow, stream: ResidualStream, report: GuardReport, around: Surroundings
) -> list[str]:
    """Side paths of a body that may carry states that a guard edits, as text.

    Args:
        body, flow: of the guarded graph; its source and sink are there.
        stream: of the unguarded graph.
        report: of the rewrite.
        around: of the top graph, with the inputs that are text.
    """
    values = body.values()
    source, sink = flow.vertex(values[stream.source]), flow.vertex(values[stream.sink])
    assert source is not None and sink is not None
    edges = list(_edges(flow, values, stream.side_paths))
    if len(edges) < len(stream.side_paths):
        return ["a side path is no longer in the graph"]
    if not edges:
        return []
    guarded = {site.layer_index: site.guarded for site in report.sites if site.body == stream.body}
    states = {values[stream.source]: 0}
    for site in stream.sites:
        found = _states(body.graph, values, site, guarded.get(site.layer_index, site.value))
        states |= dict.fromkeys(found, site.layer_index + 1)
    chain = without_side_paths(flow, values, stream.side_paths).dominator_chain(source, sink)
    judge = Judge(flow, around, states, {vertex.index for vertex in chain})
    wrong = []
    for path, value, first in edges:
        judged = judge.judge(value, first, path.layer)
        if judged != path:
            reason = judged if isinstance(judged, str) else f"it carries {judged.carries} of {judged.made_by}"
            wrong.append(f"{path.value!r} enters layer {path.layer} past the guards, and {reason}")
    return wrong


def _states(graph: ir.Graph, values: Mapping[str, ir.Value], site: ResidualSite, name: str) -> list[ir.Value]:
    """The values that are the stream behind a layer; a fused skip-norm outputs the sum, its norm, or both."""
    node = find_node(graph, site.anchor) if site.is_fused else None
    if node is not None:
        return [value for value in node.outputs if value.name]
    return [values[name]] if name in values else []


def _edges(
    flow: Flow, values: Mapping[str, ir.Value], paths: Iterable[SidePath]
) -> Iterator[tuple[SidePath, Vertex, Vertex]]:
    for path in paths:
        value, first = flow.vertex(values.get(path.value)), flow.vertex(values.get(path.into))
        if value is not None and first is not None:
            yield path, value, first
