"""Outputs beside the one that the stream ends in: none may show a guarded layer's state as it was before the guard.

The dominators say that the logits come from behind every guard. A graph may have more outputs, and whoever tampers with it
may add one that computes the unguarded state again, or all the logits from it. Names say nothing about that, so depth does:
a path's depth is how many attentions and sums it passes, the guard's own not counted. A layer's cache leaves the stream
before that layer's attention, so it is less deep than the layer's sum; what is as deep as the sum of a guarded layer, and
can be reached without passing the guard, shows what the guard should have changed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from .anatomy import same_lookups
from .dataflow import Flow, Vertex
from .mixers import is_mixer, is_sum
from .scribe import PREFIX


def leaking_outputs(
    flow: Flow,
    outputs: Sequence[ir.Value],
    source: Vertex,
    raw_sum: Sequence[Vertex],
    guard: Vertex,
    own: Collection[str],
) -> list[str]:
    """Names of the outputs that show a layer's state from before its guard.

    Args:
        flow: of the body that the layer lies in.
        outputs: of that body.
        source: where the stream begins.
        raw_sum: what the layer's unguarded sum is, or is added up from.
        guard: behind which the guarded state lies.
        own: outputs that the guard itself tells something with.
    """
    weights = [_weight(flow, vertex) for vertex in flow.vertices]
    starts = {vertex.index for vertex in same_lookups(flow, source)}
    whole = _depths(flow, weights, starts, avoid=None)
    layer_sum = max((whole[vertex.index] or 0) for vertex in raw_sum) + (len(raw_sum) > 1)
    past = _depths(flow, weights, starts, avoid=guard.index)
    shown = []
    for value in outputs:
        vertex, name = flow.vertex(value), value.name or ""
        if vertex is None or any(name == told or name.startswith(f"{told}/") for told in own):
            continue
        depth = past[vertex.index]
        if depth is not None and depth >= layer_sum:
            shown.append(name)
    return shown


def _weight(flow: Flow, vertex: Vertex) -> int:
    """1 for an attention or a sum of the model's own."""
    node = vertex.node
    if node is None or (node.name or "").startswith(PREFIX):
        return 0
    return int(is_mixer(flow, vertex) or is_sum(flow, vertex))


def _depths(flow: Flow, weights: Sequence[int], starts: Collection[int], avoid: int | None) -> list[int | None]:
    """The depth of every vertex along the deepest path from a start; `None`: there is no path."""
    depths: list[int | None] = []
    for index, before in enumerate(flow.predecessors):
        reached = [depth for depth in (depths[p] for p in before) if depth is not None]
        if index == avoid:
            depths.append(None)
        elif reached or index in starts:
            depths.append(max(reached, default=0) + weights[index])
        else:
            depths.append(None)
    return depths
