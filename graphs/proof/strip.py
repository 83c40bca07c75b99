"""Take a guard out of a graph again: what `verify` compares with. Never a way to ship.

Only the guard's own names are used, so a graph that was tampered with does not become the source by it: the comparison
that follows is node for node.
"""

from __future__ import annotations

import onnx_ir as ir

from ..errors import GuardIncomplete
from ..genai_deepstack import take_out_split
from ..genai_token_types import take_out_token_types
from ..lowerings.fold import SCOPE, original_name
from ..node_builder import PREFIX
from ..plan import COORDINATES_OUTPUT, is_supervisor_input
from ..runtime_controls import DEFAULTS, PAST_GATE_INPUT, PRESENT_GATE_OUTPUT, SCORES_OUTPUT, take_back_inputs
from ..subgraphs import branches, branching, take_out, unsurface

_OWN = (PREFIX, "vlmguard.")


def strip_guard(model: ir.Model) -> None:
    """Undo `rewrite` in place, and `insert_token_types` and `split_embeds`, which a layout may add.

    Raises:
        GuardIncomplete: there is no guard in the graph, or its nodes do not lead back to an unguarded value.
    """
    fit_back(model)
    graph = model.graph
    own = [node for node in graph.all_nodes() if (node.name or "").startswith(PREFIX)]
    if not (own or unfold(model)):
        raise GuardIncomplete("the decoder carries no guard; it was never guarded, or the guard was removed")
    for output in (COORDINATES_OUTPUT, SCORES_OUTPUT, PRESENT_GATE_OUTPUT):
        unsurface(model, output)
    members = set(own)
    for body in (graph, *(branch.graph for node in branching(graph) for branch in branches(node))):
        _strip_body(body, [node for node in body if node in members], members)
    # also remove a constant of the guard that was turned into an input: the comparison then shows that it is missing
    names = {value.name or "" for value in graph.inputs}
    fed = {name for name in names if name.startswith(PREFIX) or is_supervisor_input(name)}
    take_back_inputs(graph, {PAST_GATE_INPUT, *DEFAULTS, *fed})
    for name in [name for name in graph.initializers if name.startswith(PREFIX)]:
        graph.initializers.pop(name)
    for key in [key for key in model.metadata_props if key.startswith("vlmguard.")]:
        model.metadata_props.pop(key)


def fit_back(decoder: ir.Model) -> None:
    """Undo in place what makes a decoder fit onnxruntime-genai; nothing happens in any other.

    Raises:
        GuardIncomplete: its nodes are not as they were inserted.
    """
    take_out_token_types(decoder)
    take_out_split(decoder)


def names_left(model: ir.Model) -> list[str]:
    """Names in a stripped graph that only a guard may bear: of nodes, values, initializers, metadata and functions."""
    names: set[str] = set(model.metadata_props) | {str(key) for key in model.functions}
    for graph in model.graphs():
        names |= {value.name or "" for value in (*graph.inputs, *graph.outputs)} | set(graph.initializers)
        names |= set(graph.metadata_props)
        for node in graph:
            names |= {node.name or "", *(value.name or "" for value in node.outputs)}
    return sorted(name for name in names if name.startswith(_OWN))


def unfold(model: ir.Model) -> int:
    """Give folded weights their originals' places and names again; how many there were.

    The originals' NUMBERS are gone where nothing else reads them: the nodes are the source's then, those weights are not.
    """
    graph = model.graph
    folded = [(name, value) for name, value in graph.initializers.items() if name.startswith(SCOPE)]
    for name, value in folded:
        original = original_name(name)
        if original in graph.initializers:
            value.replace_all_uses_with(graph.initializers[original])
            graph.initializers.pop(name)
        else:
            graph.initializers.pop(name)
            value.name = original
            graph.register_initializer(value)
    return len(folded)


def _strip_body(graph: ir.Graph, own: list[ir.Node], members: set[ir.Node]) -> None:
    """Undo it in one body."""
    for node in own:
        for value in node.outputs:
            if any(reader not in members for reader in value.consumers()) or value.is_graph_output():
                _reconnect(graph, value, members)
    take_out(graph, own)


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
