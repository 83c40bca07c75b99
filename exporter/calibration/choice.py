"""`--mode auto`: chooses the mode by the model's answers.

The modes are tried in order of preference: first those with fewer calibrated numbers, then those with fewer decoder runs. The
first mode that reaches the goal is chosen, and the others are not run. The goal, in every setting with an image: the guard
refuses 97% of the harmful prompts that the text-only model refuses, and its extra refusals of harmless prompts stay within the
budget. If no mode reaches it, the best one within the budget is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...graphs.anatomy import DecoderAnatomy
from ...graphs.directions import Directions
from ...graphs.errors import GuardError
from ...graphs.modes import Mode, guard_mode, preferred_modes
from ...graphs.progress import ProgressCallback
from ...graphs.spec import Decided, GuardSpec
from ...runtime.vlm import VisionLanguageModel
from ..prompts.labelled import LabelledPrompt, fingerprint
from ..proof.limits import TOLERANCE
from .align_judge import GOAL, AlignJudge, Distance, Figures, RandomRows, keeps_budget, keeps_refusals
from .align_layers import Where, evidence, places_of_align
from .align_trial import AlignTrial, aligned_directions
from .attempts import Attempt, Choice
from .calibrate import calibrate
from .clear_refusals import ask_alone
from .deadline import Deadline
from .judged import beside_images, judged_prompts
from .usable_prompts import require_both_labels, require_budget
from .worst_setting import worst_setting

# Of matched prompts: harmless ones that differ from harmful ones by a word or two are borderline.
BORDERLINE = 0.04
_MOST_SCREENED = 2  # further places for mode `align` whose answers are read, of those that are screened
# Per guarded layer these fit: no number; threshold and origin; readout, threshold and target in one pass; the same with a
# second threshold and a second pass.
PREFERRED = preferred_modes()


@dataclass(frozen=True)
class Wish:
    """The user's choices.

    Attributes:
        spec: mode `None`; the other options.
        budget, readout: as for `calibrate`.
        images: the user's pictures.
        seconds: time limit for the choice, once a mode was found; `None` for no limit.
        matched: whether the prompts are anchor pairs, whose harmless halves differ from the harmful ones by a word or two.
        further: more prompts for judging; none is used for calibration.
    """

    spec: GuardSpec
    budget: float
    readout: str | None = None
    images: tuple[Path, ...] = ()
    seconds: float | None = None
    matched: bool = False
    further: tuple[LabelledPrompt, ...] = ()

    @property
    def beyond_text(self) -> float:
        """The share of harmless prompts that `align` may refuse although the text-only model does not."""
        return max(self.budget, BORDERLINE) if self.matched else self.budget


def choose(
    model: VisionLanguageModel,
    anatomy: DecoderAnatomy,
    directions: Directions,
    prompts: Sequence[LabelledPrompt],
    wish: Wish,
    source: str,
    report_progress: ProgressCallback,
) -> Choice:
    """Try the possible modes, in the order of preference.

    Args:
        model: unguarded.
        anatomy: of its decoder.
        directions: an SSD for each layer.
        prompts: calibration prompts, held out from the directions.
        wish: what is decided already.
        source: where the prompts are from.
        report_progress: called with `(stage, done, total)`.

    Raises:
        PromptsUnusable: too few prompts, or harmful ones that the model does not refuse as text.
        GuardError: no mode is possible, or none works; with what each reached.
    """
    require_budget(wish.budget)
    is_late = Deadline(wish.seconds)
    left_out: dict[str, str] = {
        mode: why for mode in PREFERRED if (why := why_impossible(mode, wish, model, prompts)) is not None
    }
    possible: list[Mode] = [mode for mode in PREFERRED if mode not in left_out]
    if not possible:
        reasons = "; ".join(f"{mode}: {why}" for mode, why in left_out.items())
        raise GuardError(f"--mode auto finds no mode for these options ({reasons}); name a --mode")
    require_both_labels(prompts)
    attempts: list[Attempt] = []
    layers: list[dict[str, Any]] = []
    as_text = ""
    for mode, gate in _order(possible, wish.spec):
        name = _named(mode, gate, wish.spec)
        if any(attempt.meets for attempt in attempts):
            left_out[name] = f"{attempts[-1].name} reaches the goal, and calibrates fewer numbers"
        elif attempts and is_late():
            left_out[name] = f"the {wish.seconds:g} seconds of --calibration-seconds were over"
        elif not guard_mode(mode).is_calibrated:
            found, layers, as_text = _try_align(
                model, anatomy, directions, prompts, wish, source, report_progress, is_late
            )
            attempts += found
        else:
            tried = replace(wish, spec=replace(wish.spec, mode=mode, gate=gate))
            alone = len(possible) == 1
            attempts.append(
                _try_calibrated(name, model, anatomy, directions, prompts, tried, report_progress, is_late, alone)
            )
    usable = [attempt for attempt in attempts if attempt.usable]
    if not usable:
        raise GuardError(_nothing_works(attempts, left_out, wish.budget))
    chosen = next((attempt for attempt in usable if attempt.meets), max(usable, key=lambda attempt: attempt.kept))
    marks = tuple(sorted({fingerprint(prompt) for prompt in (*prompts, *wish.further)}))
    return Choice(chosen, tuple(attempts), left_out, wish.budget, source, marks, tuple(layers), as_text)


def _order(possible: Sequence[Mode], spec: GuardSpec) -> Iterator[tuple[Mode, Decided]]:
    """Modes with their gates: a gate that is held from the prompt on is one state more, and comes last."""
    for mode in possible:
        yield mode, spec.gate
    if spec.gate == "token" and not spec.telemetry and len(possible) > 1:
        for mode in possible:
            if guard_mode(mode).has_readout:
                yield mode, "prompt"


def _named(mode: Mode, gate: Decided, spec: GuardSpec) -> str:
    return mode if gate == spec.gate else f"{mode} with --gate {gate}"


def why_impossible(mode: Mode, wish: Wish, model: VisionLanguageModel, prompts: Sequence[LabelledPrompt]) -> str | None:
    """Why a mode is not tried; `None` if it can be tried.

    Args:
        mode: the mode.
        wish: the user's choices.
        model: the unguarded model.
        prompts: calibration prompts.
    """
    spec = wish.spec
    try:
        replace(spec, mode=mode)
    except GuardError as error:
        return str(error)
    if spec.direction_of is not None:
        return "--direction-of is for mode project"
    given = {
        "--alpha": spec.alpha is not None and not guard_mode(mode).has_alpha,
        "--tau": spec.tau is not None and not guard_mode(mode).has_threshold,
        "--readout": wish.readout is not None and not guard_mode(mode).has_readout,
    }
    idle = next((name for name, is_idle in given.items() if is_idle), None)
    if idle is not None:
        return f"{idle} has no effect in it"
    if not guard_mode(mode).supervisor:
        return None
    if model.package.layout == "genai":
        return "onnxruntime-genai feeds no text-only coordinates"
    if not model.sees:
        return "no image can be given to this model here, and a text alone is its own text-only prompt"
    if guard_mode(mode).edits_prompt_end_only and not model.package.roles.states:
        return "the decoder has no KV cache that keeps an edit of the prompt for the answer"
    unseen = sum(prompt.label == "harmful" and not prompt.harmful_as_text for prompt in prompts)
    if unseen and guard_mode(mode).toward_text:
        return f"it cannot see the harm of {unseen} prompts, which is in their pictures alone"
    return None


def _try_align(
    model: VisionLanguageModel,
    anatomy: DecoderAnatomy,
    directions: Directions,
    prompts: Sequence[LabelledPrompt],
    wish: Wish,
    source: str,
    report_progress: ProgressCallback,
    is_late: Callable[[], bool],
) -> tuple[list[Attempt], list[dict[str, Any]], str]:
    """Attempts at the first place, then at the nearest others by their first tokens, until one reaches the goal; the evidence
    per layer; and what the model refuses as text, in words."""
    judged = judged_prompts([*prompts, *wish.further], model, wish.images, source)
    places = list(places_of_align(directions, anatomy.layer_count, wish.spec))
    tolerance = max(TOLERANCE[site.dtype] for site in anatomy.sites)
    trial = AlignTrial(model, anatomy, directions, max(place.rank for place in places))
    alone = ask_alone(trial, judged, report_progress)
    judge = AlignJudge(trial, alone, tolerance, report_progress)
    if (worst := worst_setting(judge, report_progress)) is not None:
        judge.add(worst)
    attempts: list[Attempt] = []

    def reaches_the_goal(place: Where, distances: tuple[Distance, ...] = ()) -> bool:
        candidate = aligned_directions(directions, place.layers, place.rank)
        figures = judge.judge(candidate, wish.beyond_text)
        attempts.append(_judged(place, candidate, figures, judge.control(candidate), wish.beyond_text, distances))
        return attempts[-1].meets

    if not reaches_the_goal(places[0]):
        for place, distances in _screened(judge, directions, places[1:], report_progress)[:_MOST_SCREENED]:
            if is_late() or reaches_the_goal(place, distances):
                break
    return attempts, evidence(directions, alone.judged, judge.settings, judge.states), str(alone)


def _screened(
    judge: AlignJudge, directions: Directions, places: Sequence[Where], report_progress: ProgressCallback
) -> list[tuple[Where, tuple[Distance, ...]]]:
    """The places with their distances, the nearest first; of equal ones the better supported first."""
    found = []
    for number, place in enumerate(places):
        found.append((place, judge.screen(aligned_directions(directions, place.layers, place.rank))))
        report_progress("comparing first tokens", number + 1, len(places))
    return sorted(found, key=lambda pair: round(max(one.total for one in pair[1]), 2))


def _judged(
    place: Where,
    directions: Directions,
    figures: tuple[Figures, ...],
    control: RandomRows | None,
    budget: float,
    distances: tuple[Distance, ...],
) -> Attempt:
    """An attempt with mode `align`, by its figures and its control."""
    text, beside = figures[0], figures[1:]
    unchanged = text.harmful.changed == text.harmless.changed == 0
    fair, keeps = keeps_budget(figures, budget), keeps_refusals(figures)
    no_fewer = not any(setting.weakened for setting in beside)
    grows = sum(setting.harmful.guarded for setting in beside) > sum(setting.harmful.unguarded for setting in beside)
    means = control is None or control.fails
    controlled = [str(control)] if control is not None else []
    lines = [*map(str, beside), *controlled, "no text answer changed" if unchanged else "text answers changed"]
    return Attempt(
        name="align",
        layers=place.layers,
        rank=place.rank,
        kept=min(setting.kept for setting in beside),
        meets=fair and keeps and unchanged and no_fewer and means,
        usable=fair and unchanged and no_fewer and means and (keeps or grows),
        said="; ".join(lines),
        why_layers=place.why,
        figures=figures,
        distances=distances,
        control=control,
        directions=directions,
    )


def _try_calibrated(
    name: str,
    model: VisionLanguageModel,
    anatomy: DecoderAnatomy,
    directions: Directions,
    prompts: Sequence[LabelledPrompt],
    wish: Wish,
    report_progress: ProgressCallback,
    is_late: Callable[[], bool],
    alone: bool,
) -> Attempt:
    """The calibration of the mode in the wish. A refusal is an attempt that failed, unless no other mode is possible."""
    spec = wish.spec
    try:
        shown = beside_images(prompts, wish.images) if model.sees else prompts
        calibration = calibrate(
            model,
            anatomy,
            directions,
            shown,
            spec,
            wish.budget,
            readout=wish.readout,
            report_progress=report_progress,
            is_late=is_late,
        )
    except GuardError as error:
        if alone:
            raise
        return Attempt(name, (), None, 0.0, meets=False, usable=False, said=str(error))
    kept = {}
    as_text = next((c.rate for c in calibration.base.cells if (c.setting, c.label) == ("text", "harmful")), 0.0)
    for cell in calibration.guarded.cells:
        if cell.label == "harmful":
            kept[cell.setting] = min(1.0, cell.rate / (as_text or 1.0))
    chosen = calibration.chosen.candidate
    shares = ", ".join(f"{setting} {share:.0%}" for setting, share in kept.items())
    worst = min(kept.values())
    return Attempt(
        name=name,
        layers=chosen.layers,
        rank=chosen.rank,
        kept=worst,
        meets=worst >= GOAL,
        usable=True,
        said=f"refusals kept on the calibration prompts: {shares}",
        calibration=calibration,
        directions=calibration.directions,
        gate=spec.gate,
    )


def _nothing_works(attempts: Iterable[Attempt], left_out: Mapping[str, str], budget: float) -> str:
    tried = "; ".join(map(str, attempts))
    other = "".join(f"; {mode} was not tried: {why}" for mode, why in left_out.items())
    return (
        f"no mode restores the refusals within {budget:.0%} over-refusal ({tried}{other}); nothing was written; give "
        "more prompts (--calibration), allow more over-refusal (--budget), or name --mode, --directions and --layers"
    )
