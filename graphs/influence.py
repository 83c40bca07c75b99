"""Everything that a value of a graph can depend on: numbers and sizes, through every operator and every body.

`dataflow.Flow` follows activations alone, which is what finding layers needs. A proof that nothing avoids a guard needs more:
what leaves as a size comes back as a number (`Range -> Size`, `NonZero -> Shape`, a loop's trip count). So a value has up
to three cells here: its NUMBERS, and where they depend on numbers its ROWS (the length of its first axis) and its SIZES (of
any axis). `Shape` reads rows and sizes alone. The sizes of inputs (batch, sequence length) depend on no numbers and have no
cell, so ordinary shape computations stay free.

The branches of an `If` are part of the graph; a `Loop` or a `Scan` is summed up; any other operator with bodies mixes
everything that it reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import onnx_ir as ir

from .dataflow import bodies, reads
from .ranks import Ranks
from .size_rules import READ_SIZES, made_extent, rows_become, sized_by_numbers, sized_by_sizes

Kind = Literal["numbers", "rows", "sizes"]
_KINDS: tuple[Kind, ...] = ("numbers", "rows", "sizes")
_EXTENTS: tuple[Kind, ...] = ("rows", "sizes")
# Of a body: what its outputs depend on, as places among its inputs, or as values from outside.
_Root = tuple[int | ir.Value, Kind]


class Influence:
    """The cells of a graph and what each is computed from, in topological order.

    Args:
        graph: the top graph; its functions are inlined, its nodes sorted (`anatomy.prepare`).

    Attributes:
        cells: `(value, kind)` of every cell.
        predecessors: by cell, the cells that it is computed from; all of smaller index.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.cells: list[tuple[ir.Value, Kind]] = []
        self.predecessors: list[tuple[int, ...]] = []
        self._index: dict[tuple[ir.Value, Kind], int] = {}
        self._ranks = Ranks()
        for value in graph.inputs:  # those with a default too: an app may feed them
            self._add(value, "numbers", ())
        self._walk(graph)

    def find(self, value: ir.Value | None, kind: Kind = "numbers") -> int | None:
        """The cell of a value's numbers or sizes; `None`: they depend on no input's numbers."""
        return self._index.get((value, kind)) if value is not None else None

    def of(self, values: Iterable[ir.Value | None], *kinds: Kind) -> set[int]:
        """The cells of some values, of these kinds or of all."""
        found = (self.find(value, kind) for value in values for kind in kinds or _KINDS)
        return {cell for cell in found if cell is not None}

    def _add(self, value: ir.Value, kind: Kind, sources: Iterable[int], is_root: bool = True) -> None:
        origin = tuple(sorted(set(sources)))
        if origin or is_root:
            self._index[value, kind] = len(self.cells)
            self.cells.append((value, kind))
            self.predecessors.append(origin)

    def _make(self, value: ir.Value, numbers: Iterable[int], sizes: Iterable[int], rows: Iterable[int] = ()) -> None:
        self._add(value, "numbers", numbers, is_root=False)
        self._add(value, "rows", rows, is_root=False)
        self._add(value, "sizes", sizes, is_root=False)

    def _walk(self, graph: ir.Graph) -> None:
        for node in graph:
            if node.domain in ("", "ai.onnx") and node.op_type == "If":
                self._branch(node)
            elif node.domain in ("", "ai.onnx") and node.op_type in ("Loop", "Scan"):
                self._repeat(node)
            elif any(True for _ in bodies(node)):
                self._mix(node)
            else:
                self._compute(node)

    def _mix(self, node: ir.Node) -> None:
        """A node with bodies whose rules are not known: everything that it reads, in everything that it makes."""
        everything = self.of(reads(node))
        for value in node.outputs:
            self._make(value, everything, everything)

    def _compute(self, node: ir.Node) -> None:
        self._ranks.add(node)
        if node.op_type in READ_SIZES and node.domain in ("", "ai.onnx"):
            for value in node.outputs:
                self._make(value, self.of(node.inputs, *_EXTENTS), ())  # a rank is fixed
            return
        extents: dict[Kind, set[int]] = {"rows": set(), "sizes": self.of(sized_by_sizes(node), "sizes")}
        extents[made_extent(node)] |= self.of(sized_by_numbers(node))
        wanted = set(sized_by_sizes(node))
        for place, value in enumerate(node.inputs):
            cell = self.find(value, "rows") if value in wanted else None
            extent = rows_become(node, place, self._ranks) if cell is not None else None
            if cell is not None and extent is not None:
                extents[extent].add(cell)
        for value in node.outputs:
            self._make(value, self.of(node.inputs), extents["sizes"], extents["rows"])

    def _branch(self, node: ir.Node) -> None:
        branches = list(bodies(node))
        for body in branches:
            self._walk(body)
        condition = self.of(node.inputs)
        for place, value in enumerate(node.outputs):
            ends = [body.outputs[place] for body in branches if place < len(body.outputs)]
            self._make(value, self.of(ends) | condition, self.of(ends, "sizes") | condition, self.of(ends, "rows"))

    def _repeat(self, node: ir.Node) -> None:
        """A `Loop` (inputs: trip count, condition, states) or a `Scan` (states, what it goes through)."""
        is_loop = node.op_type == "Loop"
        first_input, first_output = (2, 1) if is_loop else (0, 0)
        scanned = node.attributes.get("num_scan_inputs")
        states = len(node.inputs) - (2 if is_loop else scanned.as_int() if scanned is not None else 0)
        body = next(bodies(node), None)
        if (
            body is None
            or states < 0
            or len(body.inputs) != len(node.inputs)
            or len(body.outputs) != len(node.outputs) + first_output
            or len(node.outputs) < states
        ):
            self._mix(node)  # against ONNX's rules; no runtime runs it
            return
        summary = _Summary(body, self, states, first_input, first_output)
        turns = self.of(node.inputs[:2]) if is_loop else self.of(node.inputs[states:], *_EXTENTS)
        if is_loop:
            turns |= self._outside(summary.roots(body.outputs[0]), node)
        for place, value in enumerate(node.outputs):
            end = body.outputs[place + first_output]
            numbers = self._outside(summary.roots(end), node) | turns
            sizes = self._outside(summary.roots(end, *_EXTENTS), node) | turns
            if place < states:  # a state leaves as it came where there is no turn
                begin = node.inputs[place + first_input]
                numbers, sizes = numbers | self.of([begin]), sizes | self.of([begin], *_EXTENTS)
            self._make(value, numbers, sizes)

    def _outside(self, roots: Iterable[_Root], node: ir.Node) -> set[int]:
        """The cells outside that a body's roots stand for."""
        found: set[int] = set()
        for root, kind in roots:
            if isinstance(root, ir.Value):
                found |= self.of([root], kind)
            elif node.op_type == "Loop" and root < 2:
                found |= self.of(node.inputs[:2])  # the turn's number, and the condition
            else:
                found |= self.of([node.inputs[root]], *_same(kind))
        return found


class _Summary(Influence):
    """Dependencies of the outputs of a loop's body after any number of iterations."""

    def __init__(self, body: ir.Graph, outer: Influence, states: int, first_input: int, first_output: int) -> None:
        self.cells, self.predecessors, self._index, self._ranks = [], [], {}, Ranks()
        self._outer = outer
        self._roots: dict[int, _Root] = {}
        for place, value in enumerate(body.inputs):
            for kind in ("numbers", "sizes"):  # whatever comes in, any size may depend on numbers
                self._root(value, kind, place)
        self._walk(body)
        self._back = [(body.inputs[first_input + state], body.outputs[first_output + state]) for state in range(states)]

    def _root(self, value: ir.Value, kind: Kind, root: int | ir.Value) -> int:
        self._add(value, kind, ())
        self._roots[self._index[value, kind]] = (root, kind)
        return self._index[value, kind]

    def find(self, value: ir.Value | None, kind: Kind = "numbers") -> int | None:
        found = super().find(value, kind)
        if found is None and value is not None and self._outer.find(value, kind) is not None:
            return self._root(value, kind, value)  # captured
        return found

    def roots(self, value: ir.Value, *kinds: Kind) -> set[_Root]:
        """Sources of an output in this iteration or an earlier one."""
        returns = {self._index[inner, kind]: end for inner, end in self._back for kind in ("numbers", "sizes")}
        waiting, seen = list(self.of([value], *kinds)), set[int]()
        while waiting:
            cell = waiting.pop()
            if cell in seen:
                continue
            seen.add(cell)
            waiting += self.predecessors[cell]
            if cell in returns:
                waiting += self.of([returns[cell]], *_same(self.cells[cell][1]))
        return {self._roots[cell] for cell in seen if cell in self._roots}


def _same(kind: Kind) -> tuple[Kind, ...]:
    """One body may use a value as a size where another uses it as rows."""
    return ("numbers",) if kind == "numbers" else _EXTENTS


Skipped = Mapping[int, Collection[int]]
_NOTHING: Skipped = {}


def spread(
    influence: Influence, starts: Mapping[int, int], stops: Mapping[int, int], skipped: Skipped = _NOTHING
) -> list[int]:
    """By cell, a set of bits: the floods that reach it. One pass for all floods.

    Args:
        influence: the dependencies between cells.
        starts: by cell, the floods that start there.
        stops: by cell, the floods that cannot enter it.
        skipped: by cell, predecessors to ignore.
    """
    reached: list[int] = []
    for cell, before in enumerate(influence.predecessors):
        bits = starts.get(cell, 0)
        dry = skipped.get(cell, ())
        for source in before:
            if source not in dry:
                bits |= reached[source]
        reached.append(bits & ~stops.get(cell, 0))
    return reached
