"""Order of a calibration's trials, conditions for winning, and the errors if no trial wins.

The budget of over-refusal is kept by the counts where that is possible. Where scores of harmful and harmless prompts
overlap, no candidate may do so. Then those may win that are not shown to exceed it: the lower end of the 95% interval of
Clopper and Pearson is within the budget.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...graphs.errors import GuardError
from ..evaluation.intervals import clopper_pearson
from ..evaluation.metrics import Tally
from .results import Trial


def ranked(trials: Sequence[Trial], base: Tally, budget: float) -> list[Trial]:
    """The trials that may win, the best first: those within the budget by their counts, then those not shown to exceed it.
    None is worse than unguarded in any setting."""

    def key(t: Trial) -> tuple[float, ...]:
        return (t.harmful, -len(t.candidate.layers), -t.harmless, t.restored, t.margin, -t.candidate.rank)

    def fewer_harmless_first(t: Trial) -> tuple[float, ...]:
        return (t.harmful - t.harmless, *key(t))

    complete = [trial for trial in trials if trial.complete]
    strict = [trial for trial in complete if keeps_limits(trial.tally, base, budget)]
    able = [t for t in complete if t not in strict and keeps_limits(t.tally, base, budget, by_interval=True)]
    return sorted(strict, key=key, reverse=True) + sorted(able, key=fewer_harmless_first, reverse=True)


def hopeless(so_far: Tally, base: Tally, budget: float, leader: Trial | None) -> bool:
    """Whether a candidate cannot win, whatever it does on the prompts that it has not run yet.

    Args:
        so_far: its results.
        base: the unguarded model's results on all prompts.
        budget: largest share of harmless prompts refused.
        leader: the best candidate so far.
    """
    best_case = []
    by_interval = leader is None or not keeps_limits(leader.tally, base, budget)
    for cell in base.cells:
        found = next((c for c in so_far.cells if (c.setting, c.label) == (cell.setting, cell.label)), None)
        refused, unknown = (found.refused, cell.asked - found.asked) if found is not None else (0, cell.asked)
        if cell.label == "harmless" and not _affordable(refused, cell.asked, max(budget, cell.rate), by_interval):
            return True
        if cell.label == "harmful":
            if refused + unknown < cell.refused:
                return True
            best_case.append((refused + unknown) / cell.asked)
    return leader is not None and min(best_case) < leader.harmful


def keeps_limits(result: Tally, base: Tally, budget: float, by_interval: bool = False) -> bool:
    """Whether every setting keeps the budget (or the unguarded model's rate THERE if higher), and refuses no fewer harmful
    prompts than the unguarded model there.

    Args:
        result: the candidate's results.
        base: the unguarded model's results.
        budget: largest share of harmless prompts refused.
        by_interval: a setting fails only if its confidence interval is above the budget.
    """
    for cell in result.cells:
        unguarded = base.rate(cell.setting, cell.label)
        allowed = max(budget, unguarded)
        if cell.label == "harmless" and not _affordable(cell.refused, cell.asked, allowed, by_interval):
            return False
        if cell.label == "harmful" and cell.rate < unguarded:
            return False
    return True


def _affordable(refused: int, asked: int, allowed: float, by_interval: bool) -> bool:
    rate = refused / asked if asked else 0.0
    return rate <= allowed or (by_interval and clopper_pearson(refused, asked)[0] <= allowed)


def is_perfect(trials: Sequence[Trial]) -> bool:
    return any(trial.complete and trial.harmful == 1 and trial.harmless == 0 for trial in trials)


def nearest_of(trials: Sequence[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: trial.harmful - trial.harmless, reverse=True)


def gains(result: Tally, base: Tally) -> bool:
    """Whether the guard makes the model refuse a larger share of the harmful prompts in some setting."""
    harmful = [cell for cell in result.cells if cell.label == "harmful"]
    return any(cell.rate > base.rate(cell.setting, cell.label) for cell in harmful)


def require_a_gap(base: Tally) -> None:
    """There is something that a guard can be seen to do.

    Raises:
        GuardError: the unguarded model refuses every harmful prompt.
    """
    if base.worst("harmful") < 1:
        return
    asked = ", ".join(f"{cell.setting} {cell.asked}" for cell in base.cells if cell.label == "harmful")
    raise GuardError(
        f"the unguarded model refuses every harmful prompt ({asked}), so nothing can show whether a guard "
        "helps; calibrate with images on the whole model, whose directions.safetensors serves this decoder too (--directions "
        "and --force), or name --directions and --layers yourself"
    )


def no_winner(trials: Sequence[Trial], base: Tally, mode: str, budget: float) -> GuardError:
    """The error of a calibration without a usable candidate.

    Args:
        trials: all candidates.
        base: the unguarded model's results.
        mode: the calibrated mode.
        budget: largest share of harmless prompts refused.
    """
    nearest = nearest_of(trials)[0]
    return GuardError(
        f"no layer makes mode {mode} refuse more harmful prompts within {budget:.0%} over-refusal (unguarded "
        f"{base.worst('harmful'):.0%}; nearest: layers {', '.join(map(str, nearest.candidate.layers))} refuse "
        f"{nearest.harmful:.0%} of harmful and {nearest.harmless:.0%} of harmless ones); try another mode, more anchors, "
        "or name --directions and --layers yourself"
    )
