"""Finds what reaches an output without passing a guard: tokens, embeddings, or an attention that no guard has changed.

Two rules, checked on everything that a value can depend on (`influence.py`):

1. Text passes every guard. `input_ids`, `inputs_embeds` and other inputs that index the stream reach the output at the stream's
   end only through guarded states: not through a second decoder, and not through a size, a trip count or a condition.
2. No other input has its own decoder. Masks, positions, image features and caches may enter after a guard, but an attention
that
   the guard does not change must not lie on their way to that output.

The other outputs (caches, telemetry) are judged by depth, in `proof/leaks.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from .dataflow import Flow
from .influence import Influence, spread
from .mixers import is_mixer, is_sum
from .node_builder import PREFIX
from .roles import LOOKUPS
from .subgraphs import branches, branching

# What runtimes feed text to, by these names.
TEXT_INPUTS = frozenset({"input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"})
# Inputs that index tables too, and that runtimes feed with no text.
_NO_TEXT = frozenset({"position_ids", "attention_mask", "token_type_ids", "cache_position"})
_UNCHANGED = frozenset({"Cast", "Identity", "Clip", "Reshape", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True)
class Barrier:
    """The guard's place in one layer.

    Attributes:
        layer: its index.
        behind: the values whose numbers the guard has changed; in a merged decoder those of every branch.
    """

    layer: int
    behind: tuple[ir.Value, ...]


class Surroundings:
    """A guarded graph, and how its inputs get around its guards.

    Args:
        graph: the top graph, functions inlined and nodes sorted.
        barriers: one per guarded layer.
        text: names of more inputs that are fed text (`genai_config.json` may rename them).
        width: of the stream.
        sources: the values that the stream begins in.
        excepted: `(value, reader's output)` of the side paths that guards leave as they are (`side_paths.py`).
    """

    def __init__(
        self,
        graph: ir.Graph,
        barriers: Sequence[Barrier],
        sources: Collection[ir.Value],
        width: int,
        text: Collection[str] = (),
        excepted: Iterable[tuple[ir.Value, ir.Value]] = (),
    ) -> None:
        self.graph, self.barriers = graph, barriers
        self.influence = Influence(graph)
        self.skipped: dict[int, set[int]] = {}
        for value, first in excepted:
            for cell in self.influence.of([first]):
                self.skipped.setdefault(cell, set()).update(self.influence.of([value]))
        self.text = _text_inputs(graph, sources, width, TEXT_INPUTS | set(text))
        self.stops: dict[int, int] = {}
        for bit, barrier in enumerate(barriers):
            for cell in self.influence.of(barrier.behind, "numbers"):  # sizes go through an Add as they are
                self.stops[cell] = self.stops.get(cell, 0) | 1 << bit

    @cached_property
    def weights(self) -> Mapping[int, str]:
        """The cells of attentions and sums, the guard's own not among them: "mixer" or "sum"."""
        found: dict[int, str] = {}
        flows = [Flow(self.graph)]
        while flows:
            flow = flows.pop()
            for vertex in flow.vertices:
                node = vertex.node
                if node is None or (node.name or "").startswith(PREFIX):
                    continue
                what = "mixer" if is_mixer(flow, vertex) else "sum" if is_sum(flow, vertex) else ""
                if what:  # a fused norm is the sum and the norm of that sum
                    values = node.outputs if vertex.is_sum else [vertex.value]
                    found |= dict.fromkeys(self.influence.of(values, "numbers"), what)
            flows += [Flow(body.graph, flow) for node in branching(flow.graph) for body in branches(node)]
        return found

    def text_cells(self) -> set[int]:
        return self.influence.of(self.text, "numbers")

    def avoiding(self, output: ir.Value) -> list[str]:
        """Values that reach an output past a guard, as text."""
        return [*self._text_avoiding(output), *self._mixers_avoiding(output)]

    def _text_avoiding(self, output: ir.Value) -> list[str]:
        found = []
        for value in self.text:
            bits = self._reaches(dict.fromkeys(self.influence.of([value], "numbers"), self._all), output)
            found += [
                f"layer {layer}: {value.name!r} reaches {output.name!r} on a way around the guard"
                for layer in self._layers(bits)
            ]
        return found

    def _mixers_avoiding(self, output: ir.Value) -> list[str]:
        inputs = dict.fromkeys(self.influence.of(self.graph.inputs, "numbers"), self._all)
        around = spread(self.influence, inputs, self.stops)
        behind = spread(self.influence, self.stops, {})
        mixers = {cell for cell, what in self.weights.items() if what == "mixer"}
        foreign = {cell: around[cell] & ~behind[cell] for cell in mixers if around[cell] & ~behind[cell]}
        bits = self._reaches(foreign, output)
        return [
            f"layer {layer}: an attention that the guard does not change reaches {output.name!r} on a way around it"
            for layer in self._layers(bits)
        ]

    @property
    def _all(self) -> int:
        return (1 << len(self.barriers)) - 1

    def _reaches(self, starts: Mapping[int, int], output: ir.Value) -> int:
        reached = spread(self.influence, starts, self.stops, self.skipped)
        bits = 0
        for cell in self.influence.of([output]):
            bits |= reached[cell]
        return bits

    def _layers(self, bits: int) -> list[int]:
        return [barrier.layer for bit, barrier in enumerate(self.barriers) if bits >> bit & 1]


def _text_inputs(
    graph: ir.Graph, sources: Collection[ir.Value], width: int, names: Collection[str]
) -> tuple[ir.Value, ...]:
    """The graph's inputs that are text: by the names that runtimes go by, and by what indexes a table of embeddings."""
    found = {value for value in graph.inputs if value.name in names}
    for source in sources:
        found |= _inputs_of(source) or {value for value in graph.inputs if value is source}
    for node in graph.all_nodes():
        if node.op_type in LOOKUPS and len(node.inputs) > 1 and _is_table(node.inputs[0], width):
            found |= {value for value in _inputs_of(node.outputs[0]) if value.name not in _NO_TEXT}
    return tuple(value for value in graph.inputs if value in found)


def _is_table(value: ir.Value | None, width: int) -> bool:
    tensor = value.const_value if value is not None else None
    if tensor is None or len(tensor.shape) != 2:
        return False
    return tensor.shape[1] == width or tensor.dtype.itemsize < 2  # quantized tables hold several numbers in one


def _inputs_of(lookup: ir.Value) -> set[ir.Value]:
    """The graph input that a lookup is indexed by, if nothing but casts lies between."""
    node = lookup.producer()
    if node is None or node.op_type not in LOOKUPS or len(node.inputs) < 2:
        return set()
    value = node.inputs[1]
    while value is not None and not value.is_graph_input():
        maker = value.producer()
        if maker is None or maker.op_type not in _UNCHANGED:
            return set()
        value = maker.inputs[0]
    return {value} if value is not None else set()
