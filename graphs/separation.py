"""Measures how well a layer's direction separates harmful from harmless prompts, and compares it with chance.

The figure is the AUC of the hidden states at the prompts' ends along row 1 of the SSD: 1 separates them perfectly, 0.5 not at
all, below 0.5 harmless prompts lie on the harmful side. With few prompts chance reaches far: for `n` harmful and `m` harmless
prompts an AUC without meaning has standard deviation `sqrt((n + m + 1) / (12 n m))` (Mann and Whitney), and 1.645 of these
above 0.5 it is exceeded in one case of twenty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_ONE_IN_TWENTY = 1.645  # standard deviations of a normal distribution


@dataclass(frozen=True)
class Separation:
    """One layer's figure.

    Attributes:
        layer: its number.
        auc: along row 1, `+` means harmful.
        harmful, harmless: how many prompts it was measured on.
        prompts: where these come from.
    """

    layer: int
    auc: float
    harmful: int
    harmless: int
    prompts: str

    @property
    def reach_of_chance(self) -> float:
        """The AUC that chance alone exceeds in one case of twenty, at most 1."""
        n, m = self.harmful, self.harmless
        return min(1.0, 0.5 + _ONE_IN_TWENTY * math.sqrt((n + m + 1) / (12 * n * m)))

    @property
    def at_chance(self) -> bool:
        return self.auc < self.reach_of_chance or self.reach_of_chance == 1

    @property
    def reversed(self) -> bool:
        """Whether harmless prompts lie on the harmful side, more clearly than by chance."""
        return self.auc < 1 - self.reach_of_chance

    @property
    def warning(self) -> str | None:
        """One sentence where the direction does not separate; `None` where it does."""
        if not self.at_chance:
            return None
        measured = f"layer {self.layer}: AUC {self.auc:.2f} on {self._counts} ({self.prompts})"
        if self.reversed:
            return f"warning: {measured}: harmless prompts lie on the harmful side of the direction; its sign is probably wrong"
        return (
            f"warning: {measured}, no better than chance, which reaches {self.reach_of_chance:.2f}: this direction does not "
            "separate harmful from harmless prompts; choose other layers, or extract the directions again"
        )

    @property
    def _counts(self) -> str:
        if self.harmful == self.harmless:
            return f"{self.harmful} pairs"
        return f"{self.harmful} harmful and {self.harmless} harmless prompts"

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "reach_of_chance": self.reach_of_chance, "at_chance": self.at_chance}


def separation_along(
    row: np.ndarray, layer: int, harmful: np.ndarray, harmless: np.ndarray, prompts: str
) -> Separation:
    """Measure one layer.

    Args:
        row: direction `[d]`.
        layer: its number.
        harmful, harmless: states at the prompts' ends, `[prompts, d]` each, at least one.
        prompts: where they come from.
    """
    wide = row.astype(np.float64)
    above, below = harmful.astype(np.float64) @ wide, harmless.astype(np.float64) @ wide
    wins = (above[:, None] > below).mean() + (above[:, None] == below).mean() / 2
    return Separation(layer, float(wins), len(above), len(below), prompts)


def recorded_separations(
    evidence: Mapping[str, Any], pairs: int | None, layers: Sequence[int], source: str
) -> tuple[Separation, ...]:
    """AUC values in a directions file, of the anchors used for extraction; layers without a valid value are omitted.

    The file is untrusted: values that no extraction writes are ignored.

    Args:
        evidence: the file's evidence.
        pairs: number of anchor pairs.
        layers: layers to read.
        source: name of the anchors, for the record.
    """
    found = []
    for layer in layers:
        figures = evidence.get(str(layer))
        auc = figures.get("auc") if isinstance(figures, dict) else None
        if pairs is not None and pairs > 0 and isinstance(auc, float) and 0 <= auc <= 1:
            found.append(Separation(layer, auc, pairs, pairs, source))
    return tuple(found)


def warnings_of(separations: Sequence[Separation]) -> list[str]:
    return [said for one in separations if (said := one.warning) is not None]
