"""Taps: extra outputs that show hidden states, for extraction and for the proof. Never part of what is shipped."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from .anatomy import ResidualSite, find_node
from .dataflow import skip_norm_bias
from .errors import AnatomyNotFound
from .plan import GuardPlan
from .positions import last_token, mask_input
from .rewrite import GuardReport
from .scribe import Scribe

STATES_OUTPUT = "vlmguard.states"


def tap_last_token(model: ir.Model, sites: Sequence[ResidualSite]) -> None:
    """Add one output `vlmguard.states` `[batch, len(sites), d]` float32: each layer's state at the last token.

    The gathering happens inside the graph, so memory does not grow with layers times sequence.
    """
    graph = model.graph
    scribe = Scribe(graph, "taps")
    streams = [_stream(graph, site, scribe) for site in sites]
    pairs = last_token(scribe, streams[0], mask_input(graph)).pairs
    axis = scribe.integers(1)
    rows = []
    for site, stream in zip(sites, streams, strict=True):
        name = f"layer_{site.layer_index}"
        state = scribe.op(f"{name}_last", "GatherND", [stream, pairs])
        if site.dtype != "float32":
            state = scribe.cast(f"{name}_float32", state, "float32")
        rows.append(scribe.op(f"{name}_row", "Unsqueeze", [state, axis]))
    states = scribe.op("states", "Concat", rows, axis=1)
    states.name, states.dtype = STATES_OUTPUT, ir.DataType.FLOAT
    states.shape = ir.Shape(["vlmguard_batch", len(sites), None])
    scribe.place_last()
    graph.outputs.append(states)


def tap_guard(model: ir.Model, plan: GuardPlan, report: GuardReport) -> list[tuple[str, str]]:
    """Show a guarded graph's states before and after each guard; `(raw, guarded)` output names in site order.

    Both are float32 `[batch, sequence, d]`. At a fused skip-norm they are the sums with the old and the new branch.
    """
    graph = model.graph
    values = {output.name: output for node in graph for output in node.outputs}
    values |= {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
    scribe = Scribe(graph, "taps")
    names = []
    for planned, site in zip(plan.sites, report.sites, strict=True):
        pair = []
        for what, name in (("raw", site.raw), ("guarded", site.guarded)):
            stream = values[name]
            if site.kind == "skip_norm":
                node = find_node(graph, planned.site.anchor)
                assert node is not None
                # what the node reads now: the residual that was planned may itself be guarded since
                residual = next(value for value in node.inputs[:2] if value is not values[site.guarded])
                assert residual is not None
                parts = _summed(node, residual, stream)
                stream = _add_up(scribe, f"layer_{site.layer_index}_{what}", parts)
            tap = scribe.cast(f"layer_{site.layer_index}_{what}_float32", stream, "float32")
            tap.name, tap.dtype = f"vlmguard.{what}.{site.layer_index}", ir.DataType.FLOAT
            tap.shape = ir.Shape([None, None, None])
            graph.outputs.append(tap)
            pair.append(tap.name)
        names.append((pair[0], pair[1]))
    scribe.place_last()
    return names


def _stream(graph: ir.Graph, site: ResidualSite, scribe: Scribe) -> ir.Value:
    """The sum as a value: its own name, or (inside a fused skip-norm) added up again from what the node reads."""
    node = find_node(graph, site.anchor)
    if node is None:
        raise AnatomyNotFound(f"layer {site.layer_index}: no node makes {site.anchor!r}; was this graph dissected?")
    if site.kind == "add":
        return node.outputs[0]
    if site.value:
        return next(value for value in node.outputs if value.name == site.value)
    residual, branch = node.inputs[:2]
    assert residual is not None and branch is not None
    return _add_up(scribe, f"layer_{site.layer_index}_sum", _summed(node, residual, branch))


def _summed(node: ir.Node, residual: ir.Value, branch: ir.Value) -> list[ir.Value]:
    """What a skip-norm sums: `SkipLayerNormalization` may add a bias of its own."""
    bias = skip_norm_bias(node)
    return [residual, branch] if bias is None else [residual, branch, bias]


def _add_up(scribe: Scribe, name: str, parts: list[ir.Value]) -> ir.Value:
    total = parts[0]
    for number, part in enumerate(parts[1:]):
        total = scribe.op(f"{name}_{number}", "Add", [total, part])
    return total
