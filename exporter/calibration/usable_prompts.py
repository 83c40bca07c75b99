"""Checks the prompts and layers of a calibration."""

from __future__ import annotations

from collections.abc import Sequence

from ...graphs.directions import Directions
from ...graphs.errors import DirectionMismatch, GuardError, PromptsUnusable
from ...graphs.modes import guard_mode
from ...graphs.spec import GuardSpec
from ..prompts.labelled import LabelledPrompt
from .fitting import FEWEST_FOLDS, groups_of


def visible(prompts: Sequence[LabelledPrompt], mode: str) -> list[LabelledPrompt]:
    """The prompts that a mode can learn from.

    The text-only pass of `supervise` cannot see harm that is only in the picture, and would have to separate prompts with equal
    texts (`combined` can). Harmless prompts with these texts stay: the gate must not open there.
    """
    return [p for p in prompts if not guard_mode(mode).decides_by_text or p.label != "harmful" or p.harmful_as_text]


def require_budget(budget: float) -> None:
    """Raises `GuardError` for an over-refusal budget that is no share."""
    if not 0 <= budget < 1:
        raise GuardError(f"an over-refusal budget of {budget} is out of range; choose 0 or more, below 1")


def require_layers(spec: GuardSpec, directions: Directions) -> None:
    absent = [number for number in spec.layers or () if number not in directions.layers]
    if absent:
        raise DirectionMismatch(
            f"the directions have no layer {absent[0]}, only layers {', '.join(map(str, directions.layers))}; "
            "extract them for that layer too"
        )


def require_both_labels(prompts: Sequence[LabelledPrompt]) -> None:
    """Every setting has harmful and harmless prompts, and there are enough different ones to hold some out.

    Raises:
        PromptsUnusable: there are not.
    """
    if not prompts:
        raise PromptsUnusable("the model takes text only, and no calibration prompt is text only; add such prompts")
    for setting in sorted({prompt.setting for prompt in prompts}):
        for label in ("harmful", "harmless"):
            count = sum((p.setting, p.label) == (setting, label) for p in prompts)
            if count < 2:
                raise PromptsUnusable(
                    f"calibration needs harmful and harmless prompts in setting {setting!r}, found {count} {label}; add some"
                )
    groups = groups_of(prompts)
    for label in ("harmful", "harmless"):  # one that comes again and again cannot be held out from itself
        different = {group for group, prompt in zip(groups, prompts, strict=True) if prompt.label == label}
        if len(different) < 2:
            text = next(prompt.prompt for prompt in prompts if prompt.label == label)
            raise PromptsUnusable(f"calibration needs different {label} prompts, but all are {text!r}; add some")
        if len(different) < FEWEST_FOLDS:
            raise PromptsUnusable(
                f"calibration needs at least {FEWEST_FOLDS} different {label} prompts, found {len(different)}; add some"
            )
    shown = {prompt.prompt for prompt in prompts if prompt.harmful_as_text}
    if len(shown) < FEWEST_FOLDS:  # the guard restores their refusal level
        raise PromptsUnusable(
            f"calibration needs at least {FEWEST_FOLDS} different prompts whose text is harmful, found {len(shown)}; add some"
        )
