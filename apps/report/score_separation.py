"""Separation of harmful and harmless prompts: AUC and d' of scores along directions not made from these prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...exporter.prompts.formats import SETTINGS
from ...exporter.prompts.labelled import LabelledPrompt
from ...graphs.directions import Directions
from .states import States

TEXT, SSD, READOUT = "text direction", "SSD row 1", "readout"


@dataclass(frozen=True)
class Separation:
    """Harmful against harmless prompts of one setting at one layer, on one side.

    Attributes:
        layer: 0-based.
        along: `TEXT`: the difference of means of the text-only prompts, fitted on other prompts than it is judged on;
            `SSD`: row 1 of the folder's direction; `READOUT`: what the gate of `restore` reads.
        setting: `text`, `blank` or `image`.
        side: `unguarded` or `guarded`.
        auc: probability that a harmful prompt scores above a harmless one; 0.5 is chance.
        d_prime: distance of the means in standard deviations; `None` where there is no spread.
    """

    layer: int
    along: str
    setting: str
    side: str
    auc: float
    d_prime: float | None

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def separations(
    states: States, prompts: Sequence[LabelledPrompt], directions: Directions, layers: Sequence[int]
) -> list[Separation]:
    """Separation of harmful and harmless prompts in every layer, along the text direction and along the folder's directions.

    Args:
        states: hidden states of the prompts.
        prompts: labelled, in the order of the states.
        directions: of the guarded folder.
        layers: the layer number of each row of the states.
    """
    harmful = np.array([prompt.label == "harmful" for prompt in prompts])
    setting = np.array([prompt.setting for prompt in prompts])
    halves = halves_by_text(prompts)
    results = []
    for side, stack in (("unguarded", states.before), ("guarded", states.after)):
        for row, layer in enumerate(layers):
            here = stack[:, row].astype(np.float64)
            # guarded or not, the direction is the unguarded model's: that is what the guard's edit is held against
            fitted = states.before[:, row].astype(np.float64)
            for name in SETTINGS:
                chosen = setting == name
                if not (chosen & harmful).any() or not (chosen & ~harmful).any():
                    continue
                judged = _crossed(here, fitted, harmful, setting == "text", chosen, halves)
                if judged is not None:
                    results.append(Separation(layer, TEXT, name, side, *judged))
                for along, direction in _known(directions, layer):
                    scores = here[chosen] @ direction
                    results.append(Separation(layer, along, name, side, *_judge(scores, harmful[chosen])))
    return results


def auc(scores: np.ndarray, harmful: np.ndarray) -> float:
    """Area under the ROC curve of scores `[n]`, ties counted half."""
    from sklearn.metrics import roc_auc_score  # here: scikit-learn is slow to import, see extract.py

    return float(roc_auc_score(harmful, scores))


def d_prime(scores: np.ndarray, harmful: np.ndarray) -> float | None:
    """Difference of the means over the root mean square of both standard deviations (signal detection theory)."""
    above, below = scores[harmful], scores[~harmful]
    if min(len(above), len(below)) < 2:
        return None
    spread = float(np.sqrt((above.var(ddof=1) + below.var(ddof=1)) / 2))
    return float(above.mean() - below.mean()) / spread if spread > 0 else None


def halves_by_text(prompts: Sequence[LabelledPrompt]) -> np.ndarray:
    """`[n]` of 0 and 1: every second distinct text of each label, so that a text's settings lie in one half."""
    number: dict[tuple[str, str], int] = {}
    counts = {"harmful": 0, "harmless": 0}
    for prompt in prompts:
        key = (prompt.label, prompt.prompt)
        if key not in number:
            number[key] = counts[prompt.label]
            counts[prompt.label] += 1
    return np.array([number[prompt.label, prompt.prompt] % 2 for prompt in prompts])


def _judge(scores: np.ndarray, harmful: np.ndarray) -> tuple[float, float | None]:
    return auc(scores, harmful), d_prime(scores, harmful)


def _crossed(
    states: np.ndarray,
    fitted: np.ndarray,
    harmful: np.ndarray,
    text: np.ndarray,
    chosen: np.ndarray,
    halves: np.ndarray,
) -> tuple[float, float | None] | None:
    """Each half along the difference of means that the other half's text prompts have; the mean of both."""
    judged = []
    for half in (0, 1):
        learnt, asked = text & (halves != half), chosen & (halves == half)
        if any(not (which & side).any() for which in (learnt, asked) for side in (harmful, ~harmful)):
            return None
        direction = fitted[learnt & harmful].mean(axis=0) - fitted[learnt & ~harmful].mean(axis=0)
        judged.append(_judge(states[asked] @ direction, harmful[asked]))
    distances = [distance for _, distance in judged if distance is not None]
    return float(np.mean([area for area, _ in judged])), float(np.mean(distances)) if distances else None


def _known(directions: Directions, layer: int) -> Iterator[tuple[str, np.ndarray]]:
    known = directions.layers.get(layer)
    if known is None:
        return
    yield SSD, known.ssd[0].astype(np.float64)
    if known.readout is not None:
        yield READOUT, known.readout.astype(np.float64)
