"""Gate taps: extra outputs of a guarded graph that show whether each guard's gate is open. Never part of what is shipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir

from .subgraphs import DecoderSubgraph, branches, branching, surface, top


def tap_gates(model: ir.Model, report: Mapping[str, Any]) -> dict[int, str]:
    """Make the gates of a guarded graph outputs of it.

    Args:
        model: the graph; changed in place.
        report: what was done to it, as `GuardReport.to_json` records it.

    Returns:
        Layer -> name of its output, float32 of 0 and 1, `[batch, sequence or 1, 1]`. Empty where the guard has no gate
        (`project`, `fold`) or a gate is not in the graph; the graph is then unchanged.
    """
    bodies = {body.name: body for body in _bodies(model)}
    found: dict[int, dict[DecoderSubgraph, ir.Value]] = {}
    for site in report["sites"]:
        body = bodies.get(site["body"])
        gate = None if body is None else body.values().get(site.get("gate", ""))
        if body is None or gate is None:
            return {}
        found.setdefault(site["layer"], {})[body] = gate
    names = {layer: f"vlmguard.gate.{layer}" for layer in found}
    for layer, values in found.items():
        surface(model, values, names[layer], ir.Shape([None, None, None]))
    return names


def _bodies(model: ir.Model) -> Iterator[DecoderSubgraph]:
    """The top graph and the branches of each `If`."""
    yield top(model)
    for node in branching(model.graph):
        yield from branches(node)
