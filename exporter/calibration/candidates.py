"""Candidates of a calibration, and the order in which they are tried: a plain sweep, the likeliest first.

1. Single layers at the lowest rank, the best separated first; then higher ranks, then neighbouring pairs.
2. From the best of these on, one axis at a time: readout, target, origin, strength, threshold, as far as the mode has it.

Each axis has a few values. A sampler (optuna) would have to guess at what a sweep of a dozen trials simply tries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ...graphs.modes import guard_mode
from ...graphs.spec import GuardSpec
from ..extraction.estimators import DEFAULT_READOUT, READOUTS

RANKS = (1, 2, 4, 8)
_ENOUGH_TRIALS = 24

# Where scores overlap, a gate that opens for no harmless prompt opens for few harmful ones. This one opens for a tenth of the
# harmless prompts too; whether the model then refuses them is decided by answers.
OVERLAPPING = "tenth"


def search_axes(mode: str) -> Mapping[str, tuple[Any, ...]]:
    """The search axes of a mode besides layers and rank: field of `Candidate` -> values, the starting value first."""
    axes = dict(guard_mode(mode).search_axes or {})
    if "readout" in axes:
        axes["readout"] = (DEFAULT_READOUT, *(name for name in READOUTS if name != DEFAULT_READOUT))
    return axes


@dataclass(frozen=True)
class Candidate:
    """One guard to try.

    Attributes:
        layers, rank: where, and how many rows of the SSD.
        readout: what the gate of `restore` and `combined` reads, a name of `estimators.READOUTS`.
        threshold: where the gate opens between harmless and harmful scores: `low`, `middle` or `high`; where they overlap also
            above all but a `tenth` or a `fifth` of the harmless ones.
        target: the level that `restore` and `combined` set: `mean` of harmful text, `beyond` it by half, or `double` as far
            from harmless text.
        origin: of the coordinates: `harmless` text's mean, or `zero` as in the paper.
        alpha: strength; `None` where the mode has none.
    """

    layers: tuple[int, ...]
    rank: int
    readout: str = DEFAULT_READOUT
    threshold: str = "middle"
    target: str = "mean"
    origin: str = "harmless"
    alpha: float | None = None

    def to_json(self, mode: str) -> dict[str, Any]:
        """Where, and the value on each of the mode's axes."""
        values = {name: getattr(self, name) for name in search_axes(mode)}
        return {"layers": list(self.layers), "rank": self.rank, **values}


def places(
    margins: Mapping[int, float], available: int, spec: GuardSpec, mode: str, readout: str | None
) -> Iterator[Candidate]:
    """Step 1: candidates for the layers and ranks that the spec leaves open.

    Args:
        margins: how well each layer's gate separates.
        available: number of rows of every layer.
        spec: fixed layers and rank.
        mode: its search axes give the first values.
        readout: a fixed readout, or `None`.
    """
    ranks = (spec.rank,) if spec.rank is not None else [rank for rank in RANKS if rank <= available]
    thresholds = search_axes(mode).get("threshold", ())
    first = next(iter(thresholds), Candidate.threshold)
    start = Candidate((), 0, readout or DEFAULT_READOUT, first, alpha=_first_alpha(spec, mode))

    def at(layers: tuple[int, ...], rank: int) -> Candidate:
        overlaps = OVERLAPPING in thresholds and max(margins[layer] for layer in layers) < 0
        return replace(start, layers=layers, rank=rank, threshold=OVERLAPPING if overlaps else first)

    if spec.layers is not None:
        yield from (at(spec.layers, rank) for rank in ranks)
        return
    order = sorted(margins, key=lambda layer: -margins[layer])[:_ENOUGH_TRIALS]
    yield from (at((layer,), rank) for rank in ranks for layer in order)
    best = set(order[: max(3, len(order) // 2)])
    neighbours = [pair for pair in pairwise(sorted(margins)) if best & set(pair)]
    yield from (at(pair, ranks[-1]) for pair in neighbours)


def variations(best: Candidate, axis: str, values: Sequence[Any]) -> Iterator[Candidate]:
    """Step 2: the best so far with another value on one axis."""
    yield from (replace(best, **{axis: value}) for value in values if value != getattr(best, axis))


def open_axes(spec: GuardSpec, mode: str, readout: str | None) -> Mapping[str, tuple[Any, ...]]:
    """The search axes that the request leaves open."""
    decided = {"alpha": spec.alpha is not None, "threshold": spec.tau is not None, "readout": readout is not None}
    return {name: values for name, values in search_axes(mode).items() if not decided.get(name)}


def _first_alpha(spec: GuardSpec, mode: str) -> float | None:
    strengths = search_axes(mode).get("alpha")
    return spec.alpha if spec.alpha is not None or strengths is None else strengths[0]
