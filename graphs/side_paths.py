"""Side paths: what enters a layer beside the residual stream, and why a guard on the stream may leave it unedited.

Two kinds exist in decoders of today:

- `tokens`: an embedding per layer (Gemma 3n, Gemma 4). Every row of it is computed from one token alone, so it cannot carry
  what attention collected from other tokens, and that is what a layer's guard edits.
- `keys and values`: later layers attend to the keys and values that an earlier layer made (Gemma 4, `num_kv_shared_layers`).
  Their rows are computed from that layer's input, token by token, and enter through attention alone. A guard of a layer before
  it edits them too; a guard between the two does not, as no guard of a layer edits what earlier layers made.

Anything else that passes the stream's sums by is refused: the state of an earlier layer that is added later, a second
decoder, an embedding that is added to the stream itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from .avoidance import Surroundings
from .dataflow import Flow, Vertex
from .influence import spread
from .mixers import reads_as_memory
from .token_wise import TokenWise

Carried = Literal["tokens", "keys and values"]
Edge = tuple[int, int]


@dataclass(frozen=True)
class SidePath:
    """One value that enters a layer beside the residual stream.

    Attributes:
        value: its name.
        into: name of the value that the layer makes of it and of the stream.
        layer: that layer.
        carries: what it is.
        made_by: the layers whose inputs its rows are computed from; empty for an embedding.
    """

    value: str
    into: str
    layer: int
    carries: Carried
    made_by: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "made_by": list(self.made_by)}


def without(flow: Flow, edges: Iterable[Edge]) -> Flow:
    """The same flow, but for some edges."""
    gone = set(edges)
    reduced = copy(flow)
    reduced.predecessors = [
        tuple(source for source in sources if (source, index) not in gone)
        for index, sources in enumerate(flow.predecessors)
    ]
    reduced.successors = [
        [index for index in indices if (source, index) not in gone] for source, indices in enumerate(flow.successors)
    ]
    reduced._last_between = (-1, -1, [])  # what the whole flow remembers is not true of it
    return reduced


def state_values(state: Vertex) -> list[ir.Value]:
    """The values that are a state of the stream; of a fused norm also what it makes of the sum."""
    values = [state.value, *(state.node.outputs if state.is_sum and state.node is not None else ())]
    return [value for value in values if value is not None and value.name]


def text_flow(flow: Flow, around: Surroundings) -> set[int]:
    """Indices of the vertices that are computed from the text."""
    reached = spread(around.influence, dict.fromkeys(around.text_cells(), 1), {})
    cells = around.influence
    found: set[int] = set()
    for vertex in flow.vertices:
        own = vertex.value if vertex.node is None else None
        enters = own is not None and any(reached[cell] for cell in cells.of([own]))
        if enters or any(source in found for source in flow.predecessors[vertex.index]):
            found.add(vertex.index)
    return found


class Judge:
    """Decides what a value carries that enters a layer beside the stream.

    Args:
        flow: of the body, whole.
        around: of the top graph; it has the text.
        states: values that are the stream, and the number of the layer that reads them: 0 for the source.
        stream: indices of the vertices that are the stream itself.
    """

    def __init__(
        self, flow: Flow, around: Surroundings, states: Mapping[ir.Value, int], stream: Collection[int]
    ) -> None:
        self._flow, self._stream = flow, stream
        reached = spread(around.influence, dict.fromkeys(around.text_cells(), 1), {})
        cells = around.influence
        text = {value: 0 for value in around.text if value.shape is not None and len(value.shape) in (2, 3)}
        self._rows = TokenWise(
            flow.graph, text | dict(states), lambda value: any(reached[cell] for cell in cells.of([value]))
        )

    def judge(self, value: Vertex, first: Vertex, layer: int) -> SidePath | str:
        """The value that enters, or why it may not: a clause for a message."""
        assert value.value is not None and first.node is not None
        rows = self._rows.of(value.value)
        if rows is None:
            broken = self._rows.broken_at(value.value)
            maker = broken.producer()
            by = f" ({maker.op_type} {broken.name!r})" if maker is not None else ""
            return f"it is not known to hold a row for each token that is computed from that token alone{by}"
        if first.index in self._stream:
            return f"it enters the stream itself ({first.op_type} {first.name!r})"
        makers = tuple(sorted(rows.roots))
        if reads_as_memory(self._flow, value.value, first.node):
            return SidePath(value.name, first.name, layer, "keys and values", makers)
        if makers == (0,):
            return SidePath(value.name, first.name, layer, "tokens")
        return f"it carries the input of layer {makers[-1]} and enters through {first.op_type}, not through attention"


def described(paths: Sequence[SidePath]) -> list[str]:
    """Descriptions of the side paths: one sentence per kind."""
    found = []
    embedded = [path.layer for path in paths if path.carries == "tokens"]
    if embedded:
        found.append(
            f"embeddings of single tokens enter {_layers(embedded)} beside the stream; they pass no attention, and guards do "
            "not edit them"
        )
    shared = [path for path in paths if path.carries == "keys and values"]
    if shared:
        made_by = _layers(maker for path in shared for maker in path.made_by)
        found.append(
            f"keys and values made by {made_by} are read by {_layers(path.layer for path in shared)} too; a guard edits those "
            "that are made behind it"
        )
    return found


def _layers(numbers: Iterable[int]) -> str:
    distinct = set(numbers)
    return f"layer{'s' * (len(distinct) > 1)} {spelled(distinct)}"


def spelled(numbers: Iterable[int]) -> str:
    """Numbers, each once, ascending; three and more in a row as a range."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)
