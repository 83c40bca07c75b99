"""Why a decoder has no sum that all paths pass although it has ONE stream: a side path leaves the embedding and enters layers.

Gemma 4 computes an embedding per layer from the input embedding and adds it inside each layer, so no sum dominates the output.
A guard on the sums would not be on that path. It is found by taking away one edge at the embedding: if layers appear, the
edge began the side path.
"""

from __future__ import annotations

from copy import copy

from .dataflow import Flow, Vertex
from .layering import Chain


def side_path(flow: Flow, source: Vertex, sink: Vertex, least: int) -> tuple[Vertex, list[Vertex]] | None:
    """`(the first vertex of the path, the layers' sums)`, if at least so many layers appear without it; else `None`.

    Only edges of the source and of what the chain makes of it before it splits are tried.
    """
    chain = flow.dominator_chain(source, sink)
    for vertex in chain[: len(chain) - 1]:
        for successor in flow.successors[vertex.index]:
            gaps = Chain(_without(flow, vertex.index, successor), source, sink).gaps()
            if len(gaps) >= least:
                return flow.vertices[successor], [total for _, total in gaps]
        if len(flow.successors[vertex.index]) > 1:
            return None
    return None


def _without(flow: Flow, before: int, after: int) -> Flow:
    """The same flow, but for one edge."""
    reduced = copy(flow)
    reduced.predecessors = [
        tuple(p for p in sources if (p, index) != (before, after)) for index, sources in enumerate(flow.predecessors)
    ]
    reduced.successors = [list(edges) for edges in flow.successors]
    reduced.successors[before] = [index for index in reduced.successors[before] if index != after]
    reduced._last_between = (-1, -1, [])  # what the whole flow remembers is not true of it
    return reduced
