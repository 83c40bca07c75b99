"""Modes that `--mode auto` tried, its choice, and their JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...graphs.directions import Directions
from ...graphs.spec import Decided
from .align_judge import GOAL, Distance, Figures, RandomRows
from .refusal_regression import Refusals, Setting
from .results import Calibration


@dataclass(frozen=True)
class Attempt:
    """One mode that was tried with one choice of layers.

    Attributes:
        name: the mode and its variant.
        layers, rank: of the guard; no layers if none could be chosen.
        kept: lowest share of the text-only refusals that a setting keeps.
        meets: whether it reaches the goal.
        usable: whether it may be exported: within the budget, and with more refusals.
        said: its results as text.
        why_layers: the reason for these layers as text.
        figures, distances, control: of `align`: answers and first tokens by setting, and with random directions.
        calibration: of a calibrated mode.
        directions: of the guard; their mode is the guard's.
        gate: when the gate is decided, as in `GuardSpec`.
    """

    name: str
    layers: tuple[int, ...]
    rank: int | None
    kept: float
    meets: bool
    usable: bool
    said: str
    why_layers: str = ""
    figures: tuple[Figures, ...] = ()
    distances: tuple[Distance, ...] = ()
    control: RandomRows | None = None
    calibration: Calibration | None = None
    directions: Directions | None = None
    gate: Decided = "token"

    def __str__(self) -> str:
        why = f" ({self.why_layers})" if self.why_layers else ""
        where = f" on layers {', '.join(map(str, self.layers))}{why} at rank {self.rank}" if self.layers else ""
        return f"{self.name}{where}: {self.said}"

    def to_json(self) -> dict[str, Any]:
        return {
            "mode": self.name,
            "layers": list(self.layers),
            **({"why_layers": self.why_layers} if self.why_layers else {}),
            "rank": self.rank,
            "refusals_kept_worst_setting": self.kept,
            "meets_the_goal": self.meets,
            "usable": self.usable,
            "result": self.said,
            **({"settings": [one.to_json() for one in self.figures]} if self.figures else {}),
            **({"first_token_distances": [dict(vars(one)) for one in self.distances]} if self.distances else {}),
            **({"random_directions": dict(vars(self.control))} if self.control is not None else {}),
        }


@dataclass(frozen=True)
class Choice:
    """The choice of `--mode auto` and its reasons.

    Attributes:
        chosen: the attempt that is exported.
        attempts: all that was tried, in order.
        left_out: modes that were not tried, and why.
        budget: highest share of harmless prompts refused beyond the text-only model.
        prompts: where the judged prompts are from.
        fingerprints: of the judged prompts.
        layers: per layer the evidence of its direction; empty where `align` was not tried.
        as_text: what the unguarded model refuses as text, in words; empty where `align` was not tried.
    """

    chosen: Attempt
    attempts: tuple[Attempt, ...]
    left_out: Mapping[str, str]
    budget: float
    prompts: str
    fingerprints: tuple[str, ...]
    layers: tuple[Mapping[str, Any], ...] = ()
    as_text: str = ""

    @property
    def directions(self) -> Directions:
        """For the chosen mode."""
        assert self.chosen.directions is not None
        return self.chosen.directions

    @property
    def calibration(self) -> Calibration | None:
        """Of the chosen mode, if it is calibrated."""
        return self.chosen.calibration

    @property
    def refusals(self) -> Refusals | None:
        """Harmful prompts refused without and with the guard."""
        if self.chosen.calibration is not None:
            return self.chosen.calibration.refusals
        rows = [
            Setting(
                one.setting,
                one.harmful.asked,
                one.harmful.unguarded,
                one.harmful.guarded,
                None if one.setting == "text" else one.harmful.changed,
                None if one.setting == "text" else one.harmful.text,
            )
            for one in self.chosen.figures
        ]
        return Refusals(tuple(rows), self.prompts)

    def notes(self) -> list[str]:
        """For the plan."""
        notes = [self.as_text] if self.as_text else []
        notes += [f"--mode auto tried {attempt}" for attempt in self.attempts]
        notes.append(f"--mode auto chose {self.chosen.name}: {self._why()}")
        beside = [one for one in self.chosen.figures if one.setting != "text"]
        if beside and not any(one.has_gap for one in beside):
            settings = ", ".join(one.setting for one in beside)
            notes.append(
                f"no gap was seen with {settings}: the unguarded model refuses there what it refuses as text; judge the guard "
                "with images of your own (--calibration-image)"
            )
        modes: dict[str, list[str]] = {}
        for mode, why in self.left_out.items():
            modes.setdefault(why, []).append(mode)
        return notes + [f"--mode auto did not try {', '.join(alike)}: {why}" for why, alike in modes.items()]

    def _why(self) -> str:
        if self.chosen.name == "align" and self.chosen.meets:
            return "it reaches the goal, and calibrates no number"
        if self.chosen.meets:
            return "it is the first that reaches the goal"
        if len(self.attempts) == 1:
            return "it is the only mode that is possible here"
        return f"no mode reaches the goal of {GOAL:.0%}, and it comes nearest"

    def to_json(self) -> dict[str, Any]:
        return {
            "mode": self.chosen.name,
            "why": self._why(),
            "goal": {"text_refusals_kept": GOAL, "harmless_refused_beyond_text": self.budget},
            "prompts": self.prompts,
            **({"as_text": self.as_text} if self.as_text else {}),
            "prompt_fingerprints": list(self.fingerprints),
            "tried": [attempt.to_json() for attempt in self.attempts],
            "not_tried": [{"mode": mode, "why": why} for mode, why in self.left_out.items()],
            "layers": [dict(layer) for layer in self.layers],
        }
