"""Candidates of mode `align`: layers by evidence, and the rank.

Eight rows on the later two thirds of the decoder, the last layer left out, follow the text-only model most faithfully.
A layer whose direction does not separate held-out anchors better than chance is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...graphs.directions import Directions
from ...graphs.planner import later_layers
from ...graphs.separation import Separation, separation_along
from ...graphs.spec import GuardSpec
from .judged import JudgedPrompts, Setting

ALIGNED_RANK = 8  # rows that `align` copies: with fewer, borderline prompts follow the text-only model less faithfully
_FEWER_ROWS = 4
# More rows follow the text-only model more faithfully on borderline prompts. On a real model under an adversarial picture 8
# rows refused 6 of 64 borderline prompts and 2 of 32 harmless ones beyond text, 16 rows 5 and 1. With 32 rows 7 of 31 answers
# about pictures were lost, so more are not tried.
MORE_ROWS = 16


@dataclass(frozen=True)
class Where:
    """A candidate's place.

    Attributes:
        layers, rank: of the guard.
        why: of the layers, for the plan.
    """

    layers: tuple[int, ...]
    rank: int
    why: str


def places_of_align(directions: Directions, count: int, spec: GuardSpec) -> Iterator[Where]:
    """Candidates, the best supported first.

    Args:
        directions: of every layer that may be chosen, with the evidence of their extraction.
        count: layers of the decoder.
        spec: what is decided already.
    """
    rows = min(layer.ssd.shape[0] for layer in directions.layers.values())
    rank = spec.rank or min(ALIGNED_RANK, rows)
    if spec.layers is not None:
        yield Where(spec.layers, rank, "as requested")
        return
    later, which = later_layers(directions.layers, count)
    apart = tuple(number for number in later if not _at_chance(directions, number))
    dropped = [str(number) for number in later if number not in apart]
    places = []
    if dropped and apart:
        places.append(
            Where(apart, rank, f"{which}, and {', '.join(dropped)}, whose directions separate no held-out anchors")
        )
    places.append(Where(later, rank, which))
    if spec.rank is None and rank < MORE_ROWS <= rows:
        places.append(Where(places[0].layers, MORE_ROWS, places[0].why))
    if spec.rank is None and rank > _FEWER_ROWS:
        places.append(Where(places[0].layers, _FEWER_ROWS, places[0].why))
    half = tuple(number for number in later if number >= count // 2)
    if half and half != later:
        places.append(Where(half, rank, "the later half of the decoder without its last layer"))
    every, with_last = later_layers(directions.layers, count, last=True)
    if every != later:
        places.append(Where(every, rank, with_last))
    seen: set[tuple[tuple[int, ...], int]] = set()
    for place in places:
        if (place.layers, place.rank) not in seen:
            seen.add((place.layers, place.rank))
            yield place


def evidence(
    directions: Directions, judged: JudgedPrompts, asked: Sequence[Setting], states: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Per layer: how well row 1 separates held-out anchors, and the judged prompts alone and with images.

    Args:
        directions: of every layer.
        judged: the prompts.
        asked: the settings that were run.
        states: of the unguarded model by setting, `[prompts, layers, d]`.
    """
    texts = {"text": tuple(range(len(judged.texts)))} | {setting.name: setting.texts for setting in asked}
    rows = []
    for number, layer in directions.layers.items():
        recorded = directions.evidence.get(str(number), {})
        row: dict[str, Any] = {"layer": number, "auc_held_out_anchors": recorded.get("auc_held_out")}
        if "loud_channels_dropped" in recorded:
            row["loud_channels_dropped"] = recorded["loud_channels_dropped"]
        for name, own in texts.items():
            kinds = np.array([judged.texts[at].kind for at in own])
            harmful, harmless = kinds == "harmful", kinds == "harmless"
            if name in states and harmful.any() and harmless.any():
                ends = states[name][:, number]
                measured = separation_along(layer.ssd[0], number, ends[harmful], ends[harmless], judged.source)
                row[f"auc_{name.replace(' ', '_')}"] = measured.auc
        rows.append(row)
    return rows


def _at_chance(directions: Directions, number: int) -> bool:
    """Whether the extraction's cross-validation shows a direction that separates nothing."""
    recorded = directions.evidence.get(str(number))
    auc = recorded.get("auc_held_out") if isinstance(recorded, dict) else None
    pairs = directions.pairs or 0
    return isinstance(auc, float) and pairs > 0 and Separation(number, auc, pairs, pairs, "").at_chance
