"""Place of a decoder's nodes: at the top of the graph, or in every branch of an `If`.

Merged decoders (optimum, and most transformers.js models on the hub) hold the decoder twice, without and with a past, in
the two branches of one `If`. The weights are the top graph's; the branches capture them. What holds for one body must
hold for all: a guard in one branch alone would be a guard that the second token avoids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from .dataflow import Flow, Vertex
from .errors import AnatomyNotFound


@dataclass(frozen=True, eq=False)
class DecoderSubgraph:
    """One graph that holds the decoder.

    Attributes:
        name: "" for the top graph, else the branch's: `then_branch`, `else_branch`.
        graph: its nodes.
        owner: the `If` that it is a branch of.
    """

    name: str
    graph: ir.Graph
    owner: ir.Node | None = None

    @property
    def path(self) -> str:
        """Prefix of its node names after the guard's: "" or `then_branch/`."""
        return f"{self.name}/" if self.name else ""

    def values(self) -> dict[str, ir.Value]:
        """Every value that its nodes can read, by name; its own before those of the top graph."""
        found: dict[str, ir.Value] = {}
        if self.owner is not None and self.owner.graph is not None:
            found |= _named(self.owner.graph)  # type: ignore[arg-type]
        return found | _named(self.graph)

    def flow(self) -> Flow:
        """Its value graph; what comes in from the top graph counts as an input."""
        if self.owner is None:
            return Flow(self.graph)
        assert isinstance(self.owner.graph, ir.Graph)
        return Flow(self.graph, Flow(self.owner.graph))


def top(model: ir.Model) -> DecoderSubgraph:
    return DecoderSubgraph("", model.graph)


def find_bodies(model: ir.Model, names: Sequence[str]) -> list[DecoderSubgraph]:
    """The bodies of these names, in their order; those that are not there are left out."""
    known = {"": top(model)} | {body.name: body for node in branching(model.graph) for body in branches(node)}
    return [known[name] for name in names if name in known]


def branching(graph: ir.Graph) -> Iterator[ir.Node]:
    """The `If` nodes of a graph that hold nodes of a decoder's size; the largest comes last, so that it wins a name."""
    found = [node for node in graph if node.op_type == "If" and node.domain == ""]
    yield from sorted(found, key=lambda node: sum(len(body.graph) for body in branches(node)))


def branches(node: ir.Node) -> Iterator[DecoderSubgraph]:
    """The branches of an `If`, by name."""
    for name, attribute in sorted(node.attributes.items()):
        if attribute.type == ir.AttributeType.GRAPH:
            yield DecoderSubgraph(name, attribute.as_graph(), node)


def branches_on_path(flow: Flow, sink: Vertex) -> list[tuple[DecoderSubgraph, ir.Value]]:
    """The branches of the `If` that the sink comes out of, each with its own value for it; empty if there is none."""
    before = flow.before(sink)
    for node in reversed(list(branching(flow.graph))):
        for index, output in enumerate(node.outputs):
            vertex = flow.vertex(output)
            if vertex is not None and vertex.index in before:
                _require_outputs(node)
                return [(body, body.graph.outputs[index]) for body in branches(node)]
    return []


def _require_outputs(node: ir.Node) -> None:
    for body in branches(node):
        if len(body.graph.outputs) != len(node.outputs):
            raise AnatomyNotFound(
                f"{body.name} of the If {node.name!r} has {len(body.graph.outputs)} outputs, the If {len(node.outputs)}; "
                "export it again"
            )


def surface(model: ir.Model, values: Mapping[DecoderSubgraph, ir.Value], name: str, shape: ir.Shape) -> None:
    """Make a float32 value that every body computes an output of the model.

    A branch's value becomes a new output of its `If`, at the same index in every branch.

    Args:
        model: the graph.
        values: one per body.
        name: of the output.
        shape: of the output.
    """
    owners = {body.owner for body in values}
    assert len(owners) == 1, "one body, or all branches of one If"
    (owner,) = owners
    if owner is None:
        (output,) = values.values()
        output.name = name
    else:
        assert {body.name for body in values} == {body.name for body in branches(owner)}, "every branch, or none"
        for body, value in values.items():
            value.name = f"{name}/{body.name}"
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), shape
            body.graph.outputs.append(value)
        owner.resize_outputs(len(owner.outputs) + 1)
        output = owner.outputs[-1]
        output.name = name
    output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), shape
    model.graph.outputs.append(output)


def unsurface(model: ir.Model, name: str) -> None:
    """Undo `surface`."""
    for output in [value for value in model.graph.outputs if value.name == name]:
        model.graph.outputs.remove(output)
        owner = output.producer()
        if owner is None or owner.op_type != "If" or owner.domain:
            continue
        index = output.index() or 0
        for body in branches(owner):
            if index < len(body.graph.outputs):  # a file that was tampered with may have fewer
                body.graph.outputs.pop(index)
        for earlier, later in pairwise(owner.outputs[index:]):  # only the last output of a node can be taken away
            later.replace_all_uses_with(earlier, replace_graph_outputs=True)
            earlier.name, earlier.type, earlier.shape = later.name, later.type, later.shape
        owner.resize_outputs(len(owner.outputs) - 1)


def take_out(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Remove nodes, in place, also from the readers of what they read. Their own readers were redirected before."""
    graph.remove(nodes, safe=False)
    for node in nodes:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)


def _named(graph: ir.Graph) -> dict[str, ir.Value]:
    values = [*graph.inputs, *graph.initializers.values(), *(output for node in graph for output in node.outputs)]
    return {value.name: value for value in values if value.name}
