"""Taps: extra outputs that show hidden states, for extraction, proof and report. Never part of what is shipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import onnx_ir as ir

from .call_inputs import call_inputs
from .node_builder import NodeBuilder
from .plan import GuardPlan
from .positions import LastToken
from .rewrite import GuardedSite, GuardReport
from .site_streams import add_up, stream_parts, unguarded_stream
from .sites import ResidualSite
from .subgraphs import DecoderSubgraph, find_bodies, surface

STATES_OUTPUT = "vlmguard.states"
RAW_OUTPUT = "vlmguard.raw_states"


def tap_last_token(model: ir.Model, sites: Sequence[ResidualSite]) -> None:
    """Add one output `vlmguard.states` `[batch, layers of sites, d]` float32: each layer's state at the last token.

    The gathering happens inside the graph, so memory does not grow with layers times sequence.
    """
    tapped = {}
    for body in find_bodies(model, list(dict.fromkeys(site.body for site in sites))):
        own = [site for site in sites if site.body == body.name]
        builder = NodeBuilder(body.graph, "taps", home=model.graph, path=body.path)
        streams = [unguarded_stream(body.graph, site, builder) for site in own]
        last = LastToken(builder, streams[0], call_inputs(model.graph))
        tapped[body] = _rows(builder, last, "states", own, streams)
        builder.place_last()
    _show(model, tapped, STATES_OUTPUT, sites)


def tap_guard_last_token(model: ir.Model, sites: Sequence[ResidualSite], report: GuardReport) -> None:
    """Of a guarded graph: two outputs more, float32, at the last token.

    `vlmguard.states` `[batch, layers of sites, d]`: each layer's state as the next layer reads it, behind its guard if it has
    one. `vlmguard.raw_states` `[batch, guarded layers, d]`: what each guard reads.

    Args:
        sites: of the graph before it was guarded.
        report: of what was done to it; one of its layers at least is among the sites.
    """
    states, raw = {}, {}
    guarded = [site for site in sites if site.layer_index in report.layers]
    for body in find_bodies(model, list(dict.fromkeys(site.body for site in sites))):
        guarded_sites = {site.layer_index: site for site in report.sites if site.body == body.name}
        values = body.values()
        builder = NodeBuilder(body.graph, "taps", home=model.graph, path=body.path)
        behind, before = [], []
        own = [site for site in sites if site.body == body.name]
        for site in own:
            if (guard := guarded_sites.get(site.layer_index)) is None:
                behind.append(unguarded_stream(body.graph, site, builder))
                continue
            before.append(_at_guard(body.graph, values, site, guard, "raw", builder))
            behind.append(_at_guard(body.graph, values, site, guard, "guarded", builder))
        last = LastToken(builder, behind[0], call_inputs(model.graph))
        states[body] = _rows(builder, last, "states", own, behind)
        raw[body] = _rows(builder, last, "raw", [site for site in own if site in guarded], before)
        builder.place_last()
    _show(model, states, STATES_OUTPUT, sites)
    _show(model, raw, RAW_OUTPUT, guarded)


def tap_guard(model: ir.Model, plan: GuardPlan, report: GuardReport) -> list[tuple[str, str]]:
    """Show a guarded graph's states before and after each guard; `(raw, guarded)` output names, by layer.

    Both are float32 `[batch, sequence, d]`. At a fused skip-norm they are the sums with the old and the new branch.
    """
    bodies = find_bodies(model, plan.bodies)
    names: dict[int, tuple[str, str]] = {}
    tapped: dict[str, dict[DecoderSubgraph, ir.Value]] = {}
    for body in bodies:
        values = body.values()
        builder = NodeBuilder(body.graph, "taps", home=model.graph, path=body.path)
        for planned, site in zip(plan.sites, report.sites, strict=True):
            if site.body != body.name:
                continue
            names[site.layer_index] = f"vlmguard.raw.{site.layer_index}", f"vlmguard.guarded.{site.layer_index}"
            for what, output in zip(_SIDES, names[site.layer_index], strict=True):
                stream = _at_guard(body.graph, values, planned.site, site, what, builder)
                tap = builder.cast(f"layer_{site.layer_index}_{what}_float32", stream, "float32")
                tapped.setdefault(output, {})[body] = tap
        builder.place_last()
    for output, given in tapped.items():
        surface(model, given, output, ir.Shape([None, None, None]))
    return [names[layer] for layer in plan.layers]


_Side = Literal["raw", "guarded"]
_SIDES: tuple[_Side, ...] = get_args(_Side)


def _at_guard(
    graph: ir.Graph,
    values: Mapping[str, ir.Value],
    site: ResidualSite,
    guard: GuardedSite,
    side: _Side,
    builder: NodeBuilder,
) -> ir.Value:
    """The stream before or behind a guard, as one value."""
    guarded = values[guard.guarded]
    parts = stream_parts(graph, site, values[guard.raw] if side == "raw" else guarded, guarded)
    assert parts is not None
    return add_up(builder, f"layer_{guard.layer_index}_{side}", parts)


def _rows(
    builder: NodeBuilder, last: LastToken, name: str, sites: Sequence[ResidualSite], streams: Sequence[ir.Value]
) -> ir.Value:
    """Streams at the last token, `[batch, layers, d]` float32."""
    axis, rows = builder.integers(1), []
    for site, stream in zip(sites, streams, strict=True):
        layer = f"{name}_layer_{site.layer_index}"
        state = builder.op(f"{layer}_last", "GatherND", [stream, last.pairs])
        if site.dtype != "float32":
            state = builder.cast(f"{layer}_float32", state, "float32")
        rows.append(builder.op(f"{layer}_row", "Unsqueeze", [state, axis]))
    return builder.op(name, "Concat", rows, axis=1)


def _show(model: ir.Model, rows: Mapping[DecoderSubgraph, ir.Value], name: str, sites: Sequence[ResidualSite]) -> None:
    layers = len({site.layer_index for site in sites})
    surface(model, rows, name, ir.Shape(["vlmguard_batch", layers, None]))
