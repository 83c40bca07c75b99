"""Results of a calibration: candidates, the choice, and their figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...graphs.directions import Directions
from ...graphs.spec import GuardSpec
from ..evaluation.metrics import Tally
from ..prompts.labelled import LabelledPrompt, fingerprint
from .candidates import Candidate
from .controls import Control
from .refusal_regression import Refusals, compare_refusals


@dataclass(frozen=True)
class Trial:
    """One candidate on calibration prompts, with numbers fitted without them.

    Attributes:
        margin: distance of the gate's two classes in standard deviations.
        restored: share of the prompts with harmful text whose answer equals, word for word, the unguarded model's answer to
            the text alone.
        tally: results on the prompts that it ran.
        complete: `False` if it was stopped because it could no longer win.
    """

    candidate: Candidate
    margin: float
    restored: float
    tally: Tally
    complete: bool = True

    @property
    def harmful(self) -> float:
        """Lowest refusal rate of harmful prompts over the settings."""
        return self.tally.worst("harmful")

    @property
    def harmless(self) -> float:
        """Highest refusal rate of harmless prompts over the settings."""
        return self.tally.worst("harmless")

    def to_json(self, mode: str) -> dict[str, Any]:
        return {
            **self.candidate.to_json(mode),
            "margin": self.margin,
            "restored_word_for_word": self.restored,
            "harmful_refused_worst_setting": self.harmful,
            "harmless_refused_worst_setting": self.harmless,
            "asked": sum(cell.asked for cell in self.tally.cells),
            "complete": self.complete,
        }


@dataclass(frozen=True)
class HeldOut:
    """The winner on prompts that no choice was made on, with numbers that were fitted without them.

    Attributes:
        base, guarded: the unguarded model and the winner.
        controls: what takes the winner's place and must not reach it.
    """

    base: Tally
    guarded: Tally
    controls: tuple[Control, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "unguarded": _cells(self.base),
            "guarded": _cells(self.guarded),
            "controls": [control.to_json() for control in self.controls],
        }


@dataclass(frozen=True)
class Calibration:
    """The calibrator's choice and its measurements.

    Attributes:
        directions: calibrated for `mode` on the chosen layers, from all prompts.
        spec: the requested settings.
        mode, budget: the requested or default values.
        base, guarded: the unguarded model and the chosen guard on the calibration prompts.
        chosen: the winner as a trial.
        trials: all candidates that ran.
        held_out: the winner on held-out prompts.
        prompts: the calibration prompts.
    """

    directions: Directions
    spec: GuardSpec
    mode: str
    budget: float
    base: Tally
    guarded: Tally
    chosen: Trial
    trials: tuple[Trial, ...]
    held_out: HeldOut
    prompts: tuple[LabelledPrompt, ...]

    @property
    def refusals(self) -> Refusals:
        """Harmful prompts refused without and with the guard."""
        return compare_refusals(self.base, self.guarded, "calibration prompts")

    def to_json(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "over_refusal_budget": self.budget,
            "prompts": len(self.prompts),
            "prompt_fingerprints": sorted({fingerprint(prompt) for prompt in self.prompts}),
            "unguarded": _cells(self.base),
            "guarded": _cells(self.guarded),
            "held_out": self.held_out.to_json(),
            "chosen": self.chosen.to_json(self.mode),
            "trials": [trial.to_json(self.mode) for trial in self.trials],
        }


def _cells(result: Tally) -> list[dict[str, Any]]:
    return [
        {"setting": cell.setting, "label": cell.label, "refused": cell.refused, "asked": cell.asked}
        for cell in result.cells
    ]
