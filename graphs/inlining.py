"""Size of a graph after inlining its own functions, counted before anything is inlined.

Forty functions that each call the one before twice are a file of 7 kB, and inlined a graph of 2 ** 40 nodes.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from .errors import ModelUnreadable

MOST_INLINED = 100_000  # nodes besides those that the file spells out; exporters' functions give some thousand
DEEPEST_CALLS = 64  # functions within functions; exporters write a function per module, about 10 deep


def require_inlinable(model: ir.Model) -> None:
    """Inlining gives a graph of a size that can be worked on.

    Raises:
        ModelUnreadable: functions call themselves, are nested too deep, or give too many nodes.
    """
    sizes = _Sizes(model)
    written = sum(1 for _ in model.graph.all_nodes()) + sum(sizes.written.values())
    inlined, _ = sizes.of(model.graph.all_nodes(), ())
    if inlined > MOST_INLINED + 4 * written:
        raise ModelUnreadable(
            f"the graph's own functions give {_about(inlined)} nodes when they are inlined, from {written} in the file; is it "
            "a decoder?"
        )


class _Sizes:
    """Number of nodes of each function, including called ones, and the depth of its calls."""

    def __init__(self, model: ir.Model) -> None:
        self._nodes = {key: list(function.all_nodes()) for key, function in model.functions.items()}
        self._known: dict[ir.OperatorIdentifier, tuple[int, int]] = {}
        self.written = {key: len(nodes) for key, nodes in self._nodes.items()}

    def of(self, nodes: Iterable[ir.Node], callers: tuple[ir.OperatorIdentifier, ...]) -> tuple[int, int]:
        """`(nodes, depth)`"""
        size = depth = 0
        for node in nodes:
            more, below = self._of_node(node.op_identifier(), callers)
            size, depth = size + more, max(depth, below)
        return size, depth

    def _of_node(self, key: ir.OperatorIdentifier, callers: tuple[ir.OperatorIdentifier, ...]) -> tuple[int, int]:
        if key not in self._nodes:
            return 1, 0
        if key in callers:
            raise ModelUnreadable(f"the graph's own functions cannot be inlined (the function {key[1]!r} calls itself)")
        _require_shallow(len(callers) + 1)
        if key not in self._known:
            size, depth = self.of(self._nodes[key], (*callers, key))
            self._known[key] = size, depth + 1
        _require_shallow(self._known[key][1])
        return self._known[key]


def _require_shallow(depth: int) -> None:
    if depth > DEEPEST_CALLS:
        raise ModelUnreadable(f"the graph's own functions are nested more than {DEEPEST_CALLS} deep; is it a decoder?")


def _about(number: int) -> str:
    return str(number) if number < 10**9 else f"about 10^{len(str(number)) - 1}"
