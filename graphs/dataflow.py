"""The value graph of an ONNX graph, and the dominator chain between two of its vertices.

A vertex is a value that a node makes. Only the flow of activations counts: constants, initializers and what is computed
from them alone make no edge, nor do shapes (`Shape`, `Size`). A control-flow node is one node with everything that its
bodies capture. `SkipLayerNormalization` and its kin compute two things in one node, so they become two vertices: SUM
(output 3, or virtual where that output is absent) and NORM (output 0, the norm of the same sum).

The dominator chain from a source to a sink is the list of vertices that EVERY path passes. In a decoder each residual
sum lies on it, and nothing inside a branch or a norm does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

SKIP_NORMS = frozenset({"SkipSimplifiedLayerNormalization", "SkipLayerNormalization"})
CONTRIB_DOMAIN = "com.microsoft"
SKIP_NORM_SUM_OUTPUT = 3
SHAPE_OPS = frozenset({"Shape", "Size"})


@dataclass(frozen=True, eq=False)
class Vertex:
    """One value of the flow.

    Attributes:
        index: place in topological order.
        node: the node that makes it; `None` for a graph input.
        value: the value, or `None` for the virtual sum of a skip-norm node.
        is_sum: whether it is the SUM half of a skip-norm node.
    """

    index: int
    node: ir.Node | None
    value: ir.Value | None
    is_sum: bool = False

    @property
    def op_type(self) -> str:
        return self.node.op_type if self.node is not None else "input"

    @property
    def name(self) -> str:
        """Name for messages and plans: the value's name, or the node's first output for a virtual sum."""
        if self.value is not None:
            return self.value.name or "(unnamed)"
        assert self.node is not None
        return f"sum of {self.node.outputs[0].name}"


class Flow:
    """The value graph of one `ir.Graph` (without its subgraphs): vertices in topological order, and their edges.

    Args:
        graph: the top graph, or a branch of an `If`.
        outer: for a branch, the flow of the graph around it: what it captures from there counts as an input.
    """

    def __init__(self, graph: ir.Graph, outer: Flow | None = None) -> None:
        self.graph = graph
        self.vertices: list[Vertex] = []
        self.predecessors: list[tuple[int, ...]] = []
        self._vertex_of: dict[ir.Value, int] = {}
        self._last_between: tuple[int, int, list[int]] = (-1, -1, [])
        self.inputs: list[ir.Value] = [value for value in graph.inputs if value.name not in graph.initializers]
        if outer is not None:
            self.inputs += [value for value in dict.fromkeys(captured(graph)) if outer.is_dynamic(value)]
        for value in self.inputs:
            self._add(None, value, ())
        for node in graph:
            self._add_node(node)
        self.successors: list[list[int]] = [[] for _ in self.vertices]
        for index, sources in enumerate(self.predecessors):
            for source in sources:
                self.successors[source].append(index)

    def vertex(self, value: ir.Value | None) -> Vertex | None:
        """The vertex of a value, or `None` if it is not activation data (a constant, a shape)."""
        index = self._vertex_of.get(value) if value is not None else None
        return None if index is None else self.vertices[index]

    def sum_vertex(self, node: ir.Node) -> Vertex:
        """The SUM vertex of a skip-norm node."""
        norm = self.vertex(node.outputs[0])
        assert norm is not None and is_skip_norm(node)
        (index,) = self.predecessors[norm.index]
        return self.vertices[index]

    def is_dynamic(self, value: ir.Value | None) -> bool:
        """Whether a value depends on the graph's inputs."""
        return value is not None and value in self._vertex_of

    def between(self, source: Vertex, sink: Vertex) -> list[int]:
        """Indices of the vertices on some path from source to sink, both included, in topological order.

        Every edge leads to a higher index, so only vertices between the two are visited: neighbours in a long graph are cheap.
        """
        low, high = source.index, sink.index
        if self._last_between[:2] != (low, high):  # callers repeat the same pair
            forward = _reach([low], self.successors, low, high)
            backward = _reach([high], self.predecessors, low, high)
            self._last_between = low, high, sorted(forward & backward)
        return self._last_between[2]

    def before(self, sink: Vertex) -> set[int]:
        """Indices of the vertices that the sink is computed from, and its own."""
        return _reach([sink.index], self.predecessors, 0, sink.index)

    def reached_from(self, source: Vertex) -> set[int]:
        """Indices of the vertices that are computed from a vertex, its own included."""
        return _reach([source.index], self.successors, source.index, len(self.vertices))

    def dominator_chain(self, source: Vertex, sink: Vertex) -> list[Vertex]:
        """The vertices that every path from source to sink passes, in order; empty if there is no path.

        One sweep in topological order: a vertex is on every path exactly when no edge is open across it.
        """
        inside = self.between(source, sink)
        members = set(inside)
        chain: list[Vertex] = []
        open_edges = 0
        for index in inside:
            open_edges -= sum(p in members for p in self.predecessors[index])
            if open_edges == 0:
                chain.append(self.vertices[index])
            open_edges += sum(s in members for s in self.successors[index])
        return chain

    def _add(self, node: ir.Node | None, value: ir.Value | None, sources: Iterable[int], is_sum: bool = False) -> int:
        index = len(self.vertices)
        self.vertices.append(Vertex(index, node, value, is_sum))
        self.predecessors.append(tuple(sorted(set(sources))))
        if value is not None:
            self._vertex_of[value] = index
        return index

    def _add_node(self, node: ir.Node) -> None:
        if node.op_type in SHAPE_OPS and node.domain == "":
            return
        sources = {self._vertex_of[value] for value in reads(node) if value in self._vertex_of}
        if not sources:
            return  # computed from constants or shapes alone
        if is_skip_norm(node):
            total = node.outputs[SKIP_NORM_SUM_OUTPUT] if len(node.outputs) > SKIP_NORM_SUM_OUTPUT else None
            total = total if total is not None and (total.name or total.uses()) else None
            at = self._add(node, total, sources, is_sum=True)
            self._add(node, node.outputs[0], (at,))
            return
        for value in node.outputs:
            self._add(node, value, sources)


def is_skip_norm(node: ir.Node | None) -> bool:
    return node is not None and node.op_type in SKIP_NORMS and node.domain == CONTRIB_DOMAIN


def skip_norm_bias(node: ir.Node) -> ir.Value | None:
    """`SkipLayerNormalization(input, skip, gamma, beta, bias)` may add a bias to the sum; the simplified one too (input 3)."""
    at = 4 if node.op_type == "SkipLayerNormalization" else 3
    return node.inputs[at] if len(node.inputs) > at else None


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """Values that a node reads: its inputs, and for control flow those that its bodies capture."""
    yield from (value for value in node.inputs if value is not None)
    for body in bodies(node):
        yield from captured(body)


def is_sorted(graph: ir.Graph) -> bool:
    """Whether every node stands behind the nodes of the same graph that it reads from."""
    ahead = set(graph)
    for node in graph:
        if any(value.producer() in ahead for value in reads(node)):
            return False
        ahead.discard(node)
    return True


def bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """The subgraphs of a control-flow node."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def captured(body: ir.Graph) -> Iterator[ir.Value]:
    """Values from outside that a body uses, its nested bodies included."""
    own = {*body.inputs, *body.initializers.values()}
    for node in body:
        own.update(node.outputs)
    for node in body:
        yield from (value for value in reads(node) if value not in own)
    yield from (value for value in body.outputs if value not in own)


def _reach(start: list[int], edges: list[list[int]] | list[tuple[int, ...]], low: int, high: int) -> set[int]:
    seen, stack = set(start), list(start)
    while stack:
        for index in edges[stack.pop()]:
            if low <= index <= high and index not in seen:
                seen.add(index)
                stack.append(index)
    return seen
