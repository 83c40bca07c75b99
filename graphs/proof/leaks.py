"""Outputs beside the one that the stream ends in: none may show a guarded layer's state as it was before the guard.

A graph may have more outputs, and an attacker may add one that computes the unguarded state again, or all the logits from
it. Names prove nothing about that, so depth does: a path's depth is how many attentions and sums it passes, the guard's own
not counted. A layer's cache leaves the stream before that layer's attention, so it is less deep than the layer's sum; what is
as deep as the sum of a guarded layer, and can be reached from the text without passing the guard, shows what the guard should
have changed. Paths through sizes count like all others (`influence.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from ..avoidance import Surroundings

_UNREACHED = -1


def leaking_outputs(
    around: Surroundings, raw_sums: Sequence[Sequence[Sequence[ir.Value]]], passed: Collection[str]
) -> list[tuple[int, str]]:
    """`(layer, name)` of every output that shows a layer's state from before its guard.

    Args:
        around: the guarded graph.
        raw_sums: per barrier and body, what the layer's unguarded sum is, or the two values that it is added up from.
        passed: exact names of the guard's own outputs, which are part of the plan.
    """
    nowhere = np.zeros(len(around.barriers), bool)
    whole = _depths(around, {})
    past = _depths(around, {cell: _bits(stop, len(nowhere)) for cell, stop in around.stops.items()})
    limits = [max(_depth(around, whole, place, raw) for raw in sums) for place, sums in enumerate(raw_sums)]
    found = []
    for value in around.graph.outputs:
        if value.name in passed:
            continue
        cells = around.influence.of([value])
        for place, limit in enumerate(limits):
            if max((past[cell][place] for cell in cells), default=_UNREACHED) >= limit:
                found.append((around.barriers[place].layer, value.name or ""))
    return found


def _depth(around: Surroundings, depths: Sequence[np.ndarray], place: int, raw: Sequence[ir.Value]) -> int:
    """Of a layer's sum; the sum of two values lies one deeper than they."""
    return max((int(depths[cell][place]) for cell in around.influence.of(raw, "numbers")), default=0) + (len(raw) > 1)


def _depths(around: Surroundings, stops: dict[int, np.ndarray]) -> list[np.ndarray]:
    """By cell and barrier, the depth of the deepest path from the text to it; `_UNREACHED` where there is none."""
    unreached = np.full(len(around.barriers), _UNREACHED, np.int32)
    starts, weights = around.text_cells(), around.weights
    depths: list[np.ndarray] = []
    for cell, before in enumerate(around.influence.predecessors):
        deepest = unreached.copy() if cell not in starts else np.zeros_like(unreached)
        for source in before:
            if source in around.skipped.get(cell, ()):
                continue
            np.maximum(deepest, depths[source], out=deepest)
        if cell in weights:
            deepest[deepest >= 0] += 1
        if cell in stops:
            deepest[stops[cell]] = _UNREACHED
        depths.append(deepest)
    return depths


def _bits(bits: int, count: int) -> np.ndarray:
    return np.array([bool(bits >> place & 1) for place in range(count)])
