"""The stream before and after a site's guard. No other module handles the form of a fused skip-norm.

At a plain site the stream is one value. A fused `Skip*LayerNormalization` computes the sum and its norm in one node, so there
the stream is the sum of what the node reads, and the guard edits one summand (`rewrite`).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from .dataflow import Flow, Vertex, is_skip_norm, skip_norm_bias
from .errors import AnatomyNotFound
from .node_builder import NodeBuilder
from .sites import ResidualSite, find_node


def stream_parts(
    graph: ir.Graph, site: ResidualSite, value: ir.Value, read: ir.Value | None = None
) -> tuple[ir.Value, ...] | None:
    """The values that add up to the stream, `value` first.

    Args:
        graph: the body that the site lies in, guarded or not.
        site: of the unguarded graph.
        value: the stream itself, or at a fused skip-norm the branch: before or behind the guard.
        read: at a fused skip-norm, what the node reads now in the place of the branch; default: `value`.

    Returns:
        One value, or at a fused skip-norm the branch, the residual that the node reads now (an earlier guard may have
        replaced the planned one), and the node's bias if it has one. `None` if the node is gone or does not read `read`.
    """
    if not site.is_fused:
        return (value,)
    node, read = find_node(graph, site.anchor), value if read is None else read
    if node is None or all(summand is not read for summand in node.inputs[:2]):
        return None
    residual = next((summand for summand in node.inputs[:2] if summand is not None and summand is not read), None)
    bias = skip_norm_bias(node)
    return None if residual is None else (value, residual, *(() if bias is None else (bias,)))


def unguarded_stream(graph: ir.Graph, site: ResidualSite, builder: NodeBuilder) -> ir.Value:
    """The stream of a site that carries no guard as one value, added up by new nodes where the graph has none.

    Raises:
        AnatomyNotFound: no node makes the sum.
    """
    node = find_node(graph, site.anchor)
    if node is None:
        raise AnatomyNotFound(f"layer {site.layer_index}: no node makes {site.anchor!r}; was this graph dissected?")
    if not site.is_fused:
        return node.outputs[0]
    if site.value:  # the node also outputs the sum
        return next(value for value in node.outputs if value.name == site.value)
    branch = node.inputs[1]
    assert branch is not None
    parts = stream_parts(graph, site, branch)
    assert parts is not None
    return add_up(builder, f"layer_{site.layer_index}_sum", parts)


def add_up(builder: NodeBuilder, name: str, parts: Sequence[ir.Value]) -> ir.Value:
    """The sum of some values, in their order."""
    total, *others = parts
    for number, part in enumerate(others):
        total = builder.op(f"{name}_{number}", "Add", [total, part])
    return total


def vertex_behind(flow: Flow, site: ResidualSite, guarded: ir.Value) -> Vertex | None:
    """The guarded stream in the dataflow; `None` where a fused skip-norm does not read the guarded branch."""
    if not site.is_fused:
        return flow.vertex(guarded)
    node = _reader(site, guarded)
    return None if node is None else flow.sum_vertex(node)


def values_behind(site: ResidualSite, guarded: ir.Value) -> Sequence[ir.Value]:
    """The values that hold the guarded stream: at a fused skip-norm all that the node makes of the sum."""
    if not site.is_fused:
        return (guarded,)
    node = _reader(site, guarded)
    return () if node is None else node.outputs


def _reader(site: ResidualSite, guarded: ir.Value) -> ir.Node | None:
    """The fused node, if it reads the guarded branch as a summand, and is the only one of its name."""
    readers = [node for node in guarded.consumers() if is_skip_norm(node) and node.outputs[0].name == site.anchor]
    return readers[0] if len(readers) == 1 and guarded in readers[0].inputs[:2] else None
