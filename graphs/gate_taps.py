"""Gate taps: extra outputs of a guarded graph that show whether each guard's gate is open. Never part of what is shipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from .node_builder import PREFIX
from .subgraphs import DecoderSubgraph, branches, branching, surface, top


def tap_gates(model: ir.Model, layers: Sequence[int]) -> dict[int, str]:
    """Make the gates of a guarded graph outputs of it.

    Args:
        layers: those that are guarded.

    Returns:
        Layer to the name of its output, float32 of 0 and 1, `[batch, sequence or 1, 1]`. Empty where the guard has no gate
        (`project`) or none that is a value of the graph (`fold`); the graph is then what it was.
    """
    gates = [_gate(model, layer) for layer in layers]
    if not all(gates):
        return {}
    names = {layer: f"vlmguard.gate.{layer}" for layer in layers}
    for name, values in zip(names.values(), gates, strict=True):
        surface(model, values, name, ir.Shape([None, None, None]))
    return names


def _gate(model: ir.Model, layer: int) -> dict[DecoderSubgraph, ir.Value]:
    """What the lowerings call `gate`, in each body of the decoder; empty if a body lacks it."""
    for bodies in _places(model):
        values = {body: body.values().get(f"{PREFIX}{body.path}layer_{layer}/gate") for body in bodies}
        found = {body: value for body, value in values.items() if value is not None}
        if found and len(found) == len(bodies):
            return found
    return {}


def _places(model: ir.Model) -> Iterator[list[DecoderSubgraph]]:
    """The top graph, then the branches of each `If`: the bodies that may hold a decoder."""
    yield [top(model)]
    for node in branching(model.graph):
        yield list(branches(node))
