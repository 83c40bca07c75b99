"""Counts the effect of a guard during an export: the unguarded model answers before the guard is written, the guarded one
after.

`calibration.effect` defines and measures the effect; this module chooses the prompts and handles models that cannot be run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..graphs.errors import GuardError
from ..graphs.layouts import open_package
from ..graphs.modes import guard_mode
from ..graphs.package import ModelPackage
from ..graphs.plan import GuardPlan
from ..graphs.progress import ProgressCallback
from ..runtime.vlm import VisionLanguageModel
from .calibration.calibrate import ANSWER_TOKENS
from .calibration.effect import (
    Sample,
    Unguarded,
    ask_guarded,
    ask_unguarded,
    builtin_sample,
    measure_separation,
    require_effect,
    sample_of,
    why_not_asked,
)
from .calibration.refusal_regression import Refusals, require_no_fewer
from .last_token_model import last_token_model
from .prompts.labelled import LabelledPrompt, prompts_from_anchors, read_anchors, read_prompts
from .proof.limits import TOLERANCE
from .proof.signature import why_made
from .session import ANCHOR_FILES, Session

NOT_COUNTED = "the guard's effect was not counted: without an image, mode {} compares each prompt with itself"
NOT_ASKED = "the guard's effect on harmful prompts was not measured"


@dataclass(frozen=True)
class EffectBaseline:
    """The unguarded model's answers to harmful prompts.

    Attributes:
        unguarded: the answers; `None` if the model cannot be run.
        note: for the plan: what could not be measured, and why; "" if everything was.
    """

    unguarded: Unguarded | None
    note: str = ""


def ask_before(session: Session, mode: str, runs: bool) -> EffectBaseline:
    """Ask the unguarded model the harmful prompts that come with it, or built-in ones, and close it.

    Args:
        session: the opened model.
        mode: of the guard.
        runs: whether the proof runs the model at all.

    Raises:
        GuardError: prompts that come with the model cannot be used.
    """
    if not runs:
        return EffectBaseline(None, f"{NOT_ASKED}: nothing is run without the full proof")
    path, reason = session.find_prompts(), why_not_run(session.package)
    if reason:
        return EffectBaseline(None, f"{NOT_ASKED}: {reason}")
    try:
        model = session.release_model()  # one decoder at a time: it is closed when the answers are there
        sample, reason = _sample(model, path)
        if not sample.prompts:
            return EffectBaseline(None, f"{NOT_ASKED}: {reason}")
        unguarded = ask_unguarded(model, sample, session.report_progress)
    except GuardError as error:
        if path is not None:  # the user's own prompts
            raise
        return EffectBaseline(None, f"{NOT_ASKED}: {str(error).split('; ')[0]}")
    without_images = all(prompt.setting == "text" for prompt in sample.prompts)
    note = NOT_COUNTED.format(mode) if guard_mode(mode).toward_text and without_images else ""
    return EffectBaseline(unguarded, note)


def ask_after(
    session: Session, unguarded: Unguarded, guarded: Path, plan: GuardPlan, allow_no_effect: bool
) -> Refusals:
    """Count the refusals of both models, and the prompts on which the guard has an effect.

    Args:
        session: of the unguarded model; both decoders are opened in its place.
        unguarded: the unguarded model's answers.
        guarded: folder of the guarded model.
        plan: of the guard.
        allow_no_effect: accept a guard without an effect.

    Raises:
        GuardWeakens: the guarded model refuses fewer prompts in some setting.
        NoEffect: the guarded model behaves as the unguarded one on every prompt, and that is not allowed.
    """

    def opened() -> VisionLanguageModel:
        # with `--data reference` its files are links
        return last_token_model(open_package(guarded, trust_links=True), session.place)

    return require_guarded(unguarded, opened, plan, allow_no_effect, session.report_progress)


def require_guarded(
    unguarded: Unguarded,
    guarded: Callable[[], VisionLanguageModel],
    plan: GuardPlan,
    allow_no_effect: bool,
    report_progress: ProgressCallback,
) -> Refusals:
    """Ask the guarded model what the unguarded one was asked, and refuse a guard that does not protect it.

    Args:
        unguarded: the unguarded model's answers.
        guarded: opens the guarded model.
        plan: of the guard.
        allow_no_effect: accept a guard without an effect.
        report_progress: called with `(stage, done, total)`.

    Raises:
        GuardWeakens, NoEffect: as for `ask_after`.
    """
    tolerance = max(TOLERANCE[site.site.dtype] for site in plan.sites)
    refusals = ask_guarded(unguarded, guarded, plan, tolerance, report_progress)
    require_no_fewer(refusals)
    return require_effect(refusals, allow_no_effect)


def why_not_run(package: ModelPackage) -> str | None:
    """Why a model cannot be asked prompts; `None` or "" if it can."""
    reason = why_not_asked(package, bool(package.roles.embeds))
    return reason or why_made(package.load_decoder().graph, package.embed_tokens is not None)


def prompts_in(path: Path, sees: bool) -> list[LabelledPrompt]:
    """The labelled prompts of a file that comes with a model (`Session.find_prompts`).

    Args:
        path: labelled prompts, or anchor pairs.
        sees: whether the model takes pictures.
    """
    return prompts_from_anchors(read_anchors(path), sees) if path.name in ANCHOR_FILES else read_prompts(path)


def with_separation(session: Session, plan: GuardPlan, unguarded: Unguarded | None) -> GuardPlan:
    """The plan with the AUC of each guarded layer: recorded by the extraction, else measured on these prompts."""
    if unguarded is None or {one.layer for one in plan.separation} == set(plan.layers):
        return plan
    measured = measure_separation(session.package, session.anatomy, plan, unguarded.sample, session.place)
    return plan.with_separation(measured)


def _sample(model: VisionLanguageModel, path: Path | None) -> tuple[Sample, str]:
    """The prompts to ask, and why there may be none."""
    if path is None:
        return builtin_sample(model), "its tokenizer lacks the words of the built-in prompts"
    sample = sample_of(prompts_in(path, model.sees), path.name, model.sees, ANSWER_TOKENS)
    return sample, f"{path.name} has no harmful prompt that the model takes"
