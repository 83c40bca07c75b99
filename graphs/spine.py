"""The residual stream found from its end, where some paths from the text go past its sums.

At a residual sum the stream is the summand that the other summands are computed from. So the walk from the sink backwards
needs no sum that EVERY path passes: an embedding that enters inside a layer, or keys and values that later layers share,
do not lead it astray. What such paths carry is judged in `side_paths.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

from .dataflow import Flow, Vertex
from .mixers import is_sum_of

_MOST_OPENED = 16  # sums inside one sum; real layers have two or three
_MOST_STEPS = 4_000_000  # of a walk through a graph; the largest decoders take some 200,000


def spine(flow: Flow, sink: Vertex) -> list[Vertex]:
    """The stream's states from the first to the sink: every residual sum, and what lies between two of them on one path.

    Empty where the graph is too tangled to be a decoder.
    """
    walk = _Walk(flow)
    found: list[Vertex] = []
    at: Vertex | None = sink
    while at is not None:
        found.append(at)
        at = walk.before(at)
    return [] if walk.is_lost else found[::-1]


def entries(flow: Flow, states: Sequence[Vertex], text: Collection[int]) -> Iterator[tuple[Vertex, Vertex]]:
    """`(value, first)` for every edge by which text enters behind a state without having passed it.

    Without these edges every path from the text to the last state passes all of them.

    Args:
        states: of the spine, ascending.
        text: indices of what is computed from the text.
    """
    for state, following in pairwise(states):
        inside = flow.between(state, following)
        behind = set(inside)  # what is computed from the state and leads to the next one
        for index in inside[1:]:
            for source in flow.predecessors[index]:
                if source not in behind and source in text:
                    yield flow.vertices[source], flow.vertices[index]


class _Walk:
    """Steps from one state of the stream to the one before it."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._left = _MOST_STEPS

    @property
    def is_lost(self) -> bool:
        return self._left < 0

    def before(self, at: Vertex) -> Vertex | None:
        """The stream's state before `at`; `None` at its beginning."""
        parts = self._parts(at)
        if not parts or self.is_lost:
            return None
        if self._is_sum(at):
            opened = parts
            for _ in range(_MOST_OPENED):
                base = self._base(opened)
                if base is not None:
                    return base
                nested = [part for part in opened if self._is_sum(part) and not self._is_read(part, opened)]
                if not nested:
                    break
                inner = max(nested, key=lambda part: part.index)
                opened = [part for part in opened if part is not inner] + self._parts(inner)
        # a norm is made of what it divides by, too: the part that all others are made of
        return self._base(parts) or max(parts, key=lambda part: part.index)

    def _is_read(self, part: Vertex, parts: list[Vertex]) -> bool:
        """Whether another part is computed from this one: then it is a state of the stream itself."""
        return any(self._leads(part.index, other.index) for other in parts if other is not part)

    def _parts(self, at: Vertex) -> list[Vertex]:
        return [self._flow.vertices[index] for index in self._flow.predecessors[at.index]]

    def _is_sum(self, vertex: Vertex) -> bool:
        return is_sum_of(self._flow, vertex, range(len(self._flow.vertices)))

    def _base(self, parts: list[Vertex]) -> Vertex | None:
        """The part that all others are computed from; `None` if there is none."""
        first = min(parts, key=lambda part: part.index)  # every edge leads to a higher index
        return first if all(self._leads(first.index, part.index) for part in parts) else None

    def _leads(self, low: int, high: int) -> bool:
        """Whether a vertex is computed from an earlier one, or is it."""
        seen, waiting = {high}, [high]
        while waiting and not self.is_lost:
            index = waiting.pop()
            if index == low:
                return True
            self._left -= 1
            new = [source for source in self._flow.predecessors[index] if source >= low and source not in seen]
            seen.update(new)
            waiting += new
        return False
