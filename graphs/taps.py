"""Taps: extra outputs that show hidden states, for extraction and for the proof. Never part of what is shipped."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from .anatomy import ResidualSite, find_node
from .bodies import Body, find_bodies, surface
from .dataflow import skip_norm_bias
from .errors import AnatomyNotFound
from .plan import GuardPlan
from .positions import LastToken, mask_input
from .rewrite import GuardReport
from .scribe import Scribe

STATES_OUTPUT = "vlmguard.states"


def tap_last_token(model: ir.Model, sites: Sequence[ResidualSite]) -> None:
    """Add one output `vlmguard.states` `[batch, layers of sites, d]` float32: each layer's state at the last token.

    The gathering happens inside the graph, so memory does not grow with layers times sequence.
    """
    tapped = {}
    for body in find_bodies(model, list(dict.fromkeys(site.body for site in sites))):
        own = [site for site in sites if site.body == body.name]
        scribe = Scribe(body.graph, "taps", home=model.graph, path=body.path)
        streams = [_stream(body.graph, site, scribe) for site in own]
        last = LastToken(scribe, streams[0], mask_input(model.graph))
        axis = scribe.integers(1)
        rows = []
        for site, stream in zip(own, streams, strict=True):
            name = f"layer_{site.layer_index}"
            state = scribe.op(f"{name}_last", "GatherND", [stream, last.pairs])
            if site.dtype != "float32":
                state = scribe.cast(f"{name}_float32", state, "float32")
            rows.append(scribe.op(f"{name}_row", "Unsqueeze", [state, axis]))
        tapped[body] = scribe.op("states", "Concat", rows, axis=1)
        scribe.place_last()
    layers = len({site.layer_index for site in sites})
    surface(model, tapped, STATES_OUTPUT, ir.Shape(["vlmguard_batch", layers, None]))


def tap_guard(model: ir.Model, plan: GuardPlan, report: GuardReport) -> list[tuple[str, str]]:
    """Show a guarded graph's states before and after each guard; `(raw, guarded)` output names, by layer.

    Both are float32 `[batch, sequence, d]`. At a fused skip-norm they are the sums with the old and the new branch.
    """
    bodies = find_bodies(model, plan.bodies)
    names: dict[int, tuple[str, str]] = {}
    tapped: dict[str, dict[Body, ir.Value]] = {}
    for body in bodies:
        values = body.values()
        scribe = Scribe(body.graph, "taps", home=model.graph, path=body.path)
        for planned, site in zip(plan.sites, report.sites, strict=True):
            if site.body != body.name:
                continue
            names[site.layer_index] = f"vlmguard.raw.{site.layer_index}", f"vlmguard.guarded.{site.layer_index}"
            for what, name, output in zip(
                ("raw", "guarded"), (site.raw, site.guarded), names[site.layer_index], strict=True
            ):
                stream = values[name]
                if site.kind == "skip_norm":
                    node = find_node(body.graph, planned.site.anchor)
                    assert node is not None
                    # what the node reads now: the residual that was planned may itself be guarded since
                    residual = next(value for value in node.inputs[:2] if value is not values[site.guarded])
                    assert residual is not None
                    parts = _summed(node, residual, stream)
                    stream = _add_up(scribe, f"layer_{site.layer_index}_{what}", parts)
                tap = scribe.cast(f"layer_{site.layer_index}_{what}_float32", stream, "float32")
                tapped.setdefault(output, {})[body] = tap
        scribe.place_last()
    for output, given in tapped.items():
        surface(model, given, output, ir.Shape([None, None, None]))
    return [names[layer] for layer in plan.layers]


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
