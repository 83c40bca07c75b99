"""The knobs of a guarded graph that has some: how much of the guard a request gets (`graphs/runtime_controls.py`).

A graph without knobs rejects them: a strength without effect would be misleading.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from ..graphs.errors import GuardError
from ..graphs.reference import LARGEST_OFFSET, LARGEST_STRENGTH
from ..graphs.runtime_controls import OFFSET_INPUT, STRENGTH_INPUT


@dataclass(frozen=True)
class Knobs:
    """Values of the knobs for one call; `None` is the graph's default.

    Attributes:
        strength: 0 (no edit) to 2; 1 is as calibrated.
        threshold_offset: added to every layer's threshold, in units of its score; above 0 the gate opens more rarely.
    """

    strength: float | None = None
    threshold_offset: float | None = None

    def __post_init__(self) -> None:
        if self.strength is not None and not 0 <= self.strength <= LARGEST_STRENGTH:  # not NaN either
            raise GuardError(
                f"strength {self.strength} is out of range; choose 0 (only watch) to {LARGEST_STRENGTH:g}, 1 is as calibrated"
            )
        offset = self.threshold_offset
        if offset is not None and not (math.isfinite(offset) and abs(offset) <= LARGEST_OFFSET):
            raise GuardError(f"threshold offset {offset} is not a finite number; choose one, 0 is as calibrated")

    def feeds(self, known: Collection[str]) -> dict[str, np.ndarray]:
        """The inputs to feed.

        Args:
            known: inputs with defaults that the graph has, as its runner sees them.

        Raises:
            GuardError: the graph has no such knob.
        """
        asked = {STRENGTH_INPUT: self.strength, OFFSET_INPUT: self.threshold_offset}
        wanted = {name: np.array(value, np.float32) for name, value in asked.items() if value is not None}
        absent = [name for name in wanted if name not in known]
        if absent:
            has = ", ".join(name for name in asked if name in known)
            raise GuardError(
                f"the model has no knob {absent[0]!r}"
                + (f" but {has}, for its mode has no gate; leave it out" if has else "; export it again with --knobs")
            )
        return wanted


AS_EXPORTED = Knobs()
