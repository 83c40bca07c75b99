"""The score of each gate at the end of each prompt, its threshold, and the share of open gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...exporter.prompts.formats import SETTINGS
from ...exporter.prompts.labelled import LabelledPrompt
from ...graphs.modes import guard_mode
from ...graphs.plan import GuardPlan
from ...graphs.reference import LayerGuard, score
from .states import States

_BINS = 24


@dataclass(frozen=True)
class GateScores:
    """One gate in one setting.

    Attributes:
        layer: 0-based.
        setting: `text`, `blank` or `image`.
        threshold: it opens above this.
        harmful, harmless: the scores at the last prompt token.
    """

    layer: int
    setting: str
    threshold: float
    harmful: tuple[float, ...]
    harmless: tuple[float, ...]

    def opened(self, label: str) -> int:
        """Number of prompts of a label with an open gate; the comparison is strict, as in the graph."""
        return sum(score > self.threshold for score in (self.harmful if label == "harmful" else self.harmless))

    def to_json(self) -> dict[str, Any]:
        opened = {f"{label}_opened": self.opened(label) for label in ("harmful", "harmless")}
        return {**vars(self), "harmful": list(self.harmful), "harmless": list(self.harmless), **opened}


def gate_scores(states: States, prompts: Sequence[LabelledPrompt], plan: GuardPlan) -> list[GateScores]:
    """By layer and setting; none where the mode has no gate."""
    if not guard_mode(plan.mode).has_threshold:
        return []
    found = []
    for row, (layer, guard) in enumerate(zip(plan.layers, plan.guards, strict=True)):
        scores = _scores(states, row, plan.mode, guard)
        for setting in SETTINGS:
            of = {
                label: tuple(
                    float(score)
                    for score, prompt in zip(scores, prompts, strict=True)
                    if (prompt.setting, prompt.label) == (setting, label)
                )
                for label in ("harmful", "harmless")
            }
            if any(of.values()):
                found.append(GateScores(layer, setting, guard.threshold, **of))
    return found


def bins(gates: Sequence[GateScores]) -> np.ndarray:
    """Common edges for the histograms of gates that are drawn beside each other; the threshold is within."""
    values = [value for gate in gates for value in (*gate.harmful, *gate.harmless, gate.threshold)]
    low, high = min(values), max(values)
    margin = (high - low) * 0.02 or abs(high) * 0.02 or 1.0
    return np.linspace(low - margin, high + margin, _BINS + 1)


def _scores(states: States, row: int, mode: str, guard: LayerGuard) -> np.ndarray:
    """`[prompts]` float32, as the graph computes it."""
    supervisor = None if states.supervisor is None else states.supervisor[:, row]
    if guard_mode(mode).decides_by_text:
        assert supervisor is not None
        return supervisor[:, 0]
    assert states.raw is not None
    return score(mode, guard, states.raw[:, row], supervisor)[:, 0]
