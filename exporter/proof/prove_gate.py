"""Compares a guarded graph's gate outputs (telemetry and held gates) with the numpy reference.

Filled while `prove` runs the graph for other checks, like `headroom`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ...graphs.modes import guard_mode
from ...graphs.plan import GuardPlan
from ...graphs.proof.structure import Check, exact
from ...graphs.reference import LayerGuard, RuntimeControls, gate, score
from ...graphs.runtime_controls import PRESENT_GATE_OUTPUT, SCORES_OUTPUT

SCORES = "gate scores equal the numpy reference"
DECIDED = "gate decisions equal the numpy reference's"


@dataclass
class GateOutputs:
    """Scores and decisions of every call that was seen.

    Attributes:
        plan: the guard's plan; it defines the gate outputs.
        limit: largest deviation of a score, relative to the length of its summands.
    """

    plan: GuardPlan
    limit: float
    compared: int = 0
    worst: float = 0.0
    decided: int = 0
    opened: int = 0
    undecided: int = 0
    wrong: list[str] = field(default_factory=list)

    def see(
        self,
        row: int,
        layer: LayerGuard,
        state: np.ndarray,
        supervisor: np.ndarray | None,
        runtime_controls: RuntimeControls,
        outputs: Mapping[str, np.ndarray],
    ) -> None:
        """One layer in one call.

        Args:
            row: which of the guarded layers.
            layer: its numbers, as the graph that was run has them.
            state: raw states at the last token, `[batch, d]` float64.
            supervisor: the text-only coordinates, `[batch, m]` (modes with a supervisor).
            runtime_controls: their values in the call; `held` is `[batch, 1]`.
            outputs: of the call.
        """
        if not self.plan.added_outputs:
            return
        mode = self.plan.mode
        length = summed(mode, layer, state, supervisor)
        expected = (
            score(mode, layer, state, supervisor) if self.plan.telemetry or runtime_controls.held is None else None
        )
        if self.plan.telemetry:
            assert expected is not None
            off = np.abs(outputs[SCORES_OUTPUT][:, row : row + 1] - expected) / length
            self.worst = max(self.worst, float(off.max(initial=0.0)) if np.isfinite(off).all() else float("inf"))
            self.compared += off.size
        if self.plan.gate == "prompt":
            expected_gates, actual = (
                gate(mode, layer, state, supervisor, runtime_controls),
                outputs[PRESENT_GATE_OUTPUT][:, row : row + 1],
            )
            sure = np.ones(actual.shape, bool)
            if (
                runtime_controls.held is None and expected is not None
            ):  # by rounding alone such a gate may open here and not there
                sure = np.abs(expected - (layer.threshold + runtime_controls.threshold_offset)) > self.limit * length
            self.undecided += int((~sure).sum())
            self.decided += int(sure.sum())
            self.opened += int((actual[sure] > 0).sum())
            if not np.array_equal(actual[sure], expected_gates[sure]):
                self.wrong.append(f"layer {self.plan.layers[row]}")

    def checks(self) -> tuple[Check, ...]:
        """The checks for the manifest; none for a graph without gate outputs."""
        made: list[Check] = []
        if self.plan.telemetry:
            ok = self.compared > 0 and self.worst <= self.limit
            made.append(Check(SCORES, self.compared, self.worst, self.limit, ok, "at the last token of every call"))
        if self.plan.gate == "prompt":
            note = f"{self.opened} of {self.decided} open"
            note += f"; {self.undecided} too close to the threshold to call" if self.undecided else ""
            made.append(exact(DECIDED, self.decided, list(dict.fromkeys(self.wrong)), note))
        return tuple(made)


def summed(mode: str, layer: LayerGuard, state: np.ndarray, supervisor: np.ndarray | None) -> np.ndarray:
    """Scale of a score's rounding, `[batch, 1]`: the length of its summands.

    Args:
        mode: the guard's mode.
        layer: the guard's numbers.
        state: what the gate reads, `[batch, d]`.
        supervisor: the text-only coordinates `[batch, m]`, or `None`.
    """
    row = guard_mode(mode).score_row(layer)
    if row is None:
        assert supervisor is not None
        return np.maximum(np.abs(supervisor[:, :1]), 1e-6)
    length = np.maximum(np.linalg.norm(state * row, axis=-1, keepdims=True), 1e-6)
    if not guard_mode(mode).supervisor:
        return length
    assert supervisor is not None
    return np.maximum(length, np.abs(supervisor[:, :1]) + abs(layer.text_shift))
