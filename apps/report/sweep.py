"""Refusals at other strengths: the guard is rewritten in memory with each alpha and runs some of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...exporter.evaluation.evaluate import tally
from ...exporter.prompts.labelled import LabelledPrompt
from ...exporter.prompts.thinning import by_setting_and_label
from ...graphs.modes import guard_mode
from ...graphs.progress import CountCallback
from .subject import Subject

ALPHAS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
_PROMPTS = 12  # of each setting and label: the shape of a curve, not a measurement


@dataclass(frozen=True)
class Strength:
    """One alpha.

    Attributes:
        alpha: strength in every guarded layer.
        shipped: whether the folder has this strength.
        refused: `(setting, label, refused, asked)`.
    """

    alpha: float
    shipped: bool
    refused: tuple[tuple[str, str, int, int], ...]

    def to_json(self) -> dict[str, Any]:
        names = ("setting", "label", "refused", "asked")
        return {**vars(self), "refused": [dict(zip(names, row, strict=True)) for row in self.refused]}


def sweep_alpha(
    subject: Subject,
    prompts: Sequence[LabelledPrompt],
    max_new_tokens: int,
    batch_size: int,
    report_count: CountCallback | None = None,
) -> list[Strength]:
    """Refusals at each of `ALPHAS` and at the shipped strengths; empty if the mode has no strength.

    Args:
        subject: the model of the report.
        prompts: labelled prompts; at most 12 per setting and label are run.
        max_new_tokens: longest answer.
        batch_size: prompts per call.
        report_count: called with `(done, total)` after each strength.
    """
    if not guard_mode(subject.plan.mode).has_alpha:
        return []
    chosen = by_setting_and_label(prompts, _PROMPTS)
    shipped = {guard.alpha for guard in subject.plan.guards}
    alphas, strengths = sorted({*ALPHAS, *shipped}), []
    for number, alpha in enumerate(alphas):
        model = subject.with_alpha(alpha)
        cells = tally(model, chosen, max_new_tokens, batch_size).cells
        rows = tuple((cell.setting, cell.label, cell.refused, cell.asked) for cell in cells)
        strengths.append(Strength(alpha, alpha in shipped, rows))
        if report_count is not None:
            report_count(number + 1, len(alphas))
    return strengths
