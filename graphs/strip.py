"""Take a guard out of a graph again: what `verify` compares with. Never a way to ship.

Only the guard's own names are used, so a graph that was tampered with does not become the source by it: the comparison
that follows is node for node.
"""

from __future__ import annotations

import onnx_ir as ir

from .errors import GuardIncomplete
from .plan import COORDINATES_OUTPUT, SUPERVISOR_INPUT
from .scribe import PREFIX


def strip_guard(model: ir.Model) -> None:
    """Undo `rewrite` in place.

    Raises:
        GuardIncomplete: there is no guard in the graph, or its nodes do not lead back to an unguarded value.
    """
    graph = model.graph
    own = [node for node in graph if (node.name or "").startswith(PREFIX)]
    if not own:
        raise GuardIncomplete("the decoder carries no guard; it was never guarded, or the guard was removed")
    graph_outputs = [value for value in graph.outputs if value.name == COORDINATES_OUTPUT]
    for value in graph_outputs:
        graph.outputs.remove(value)
    members = set(own)
    for node in own:
        for value in node.outputs:
            if any(reader not in members for reader in value.consumers()) or value.is_graph_output():
                _reconnect(graph, value, members)
    for value in [value for value in graph.inputs if value.name == SUPERVISOR_INPUT]:
        _drop_uses(value, members)
        graph.inputs.remove(value)
    graph.remove(own, safe=False)
    for node in own:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
    for name in [name for name in graph.initializers if name.startswith(PREFIX)]:
        graph.initializers.pop(name)
    for key in [key for key in model.metadata_props if key.startswith("vlmguard.")]:
        model.metadata_props.pop(key)


def _reconnect(graph: ir.Graph, guarded: ir.Value, members: set[ir.Node]) -> None:
    """Whoever reads the guarded value reads the raw one again; the last node of a guard has it as its first input."""
    node = guarded.producer()
    raw = node.inputs[0] if node is not None and node.inputs else None
    if raw is None or raw.producer() in members:
        raise GuardIncomplete(f"guard node {guarded.name!r} does not lead back to the value it guards; export again")
    name = guarded.name
    for reader, index in tuple(guarded.uses()):
        if reader not in members:
            reader.replace_input_with(index, raw)
    for index, output in enumerate(graph.outputs):
        if output is guarded:
            graph.outputs[index] = raw
            guarded.name, raw.name = f"{name}/guarded", name


def _drop_uses(value: ir.Value, members: set[ir.Node]) -> None:
    for reader, index in tuple(value.uses()):
        if reader in members:
            reader.replace_input_with(index, None)
