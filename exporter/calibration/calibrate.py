"""The calibrator: layers, rank, readout, threshold, target, origin and strength, from labelled prompts, under a budget.

1. One tapped pass over the calibration prompts (and their text-only versions) gives every layer's states; so do the
   tokens of the unguarded model's answers to the harmless ones, because the gate is asked again at each of them.
2. The numbers of a candidate are fitted to these (`study.py`), always without the prompts that they are asked next.
3. Candidates, the likeliest first (`candidates.py`), are asked in one graph whose numbers are inputs (`trials.py`). The
   winner keeps over-refusal within the budget in every setting, refuses no fewer harmful prompts than the unguarded model in
   any, refuses the most in its worst one, has the fewest layers, and gives back most often, word for word, what the
   unguarded model says to the same prompt as text.
4. The winner is fitted to all prompts and asked all of them again; and, fitted without the held-out ones, it is asked
   those, and two controls with it (`controls.py`): neither may reach what it reaches.

The unguarded model is asked first: a guard that refuses no more than it does is not a guard, and is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...graphs.anatomy import DecoderAnatomy
from ...graphs.directions import Directions
from ...graphs.errors import DirectionMismatch, GuardError, PromptsUnusable
from ...graphs.spec import GuardSpec
from ...runtime.vlm import Request, Sampling, VisionLanguageModel
from ..evaluation.evaluate import Tally, tally
from ..extraction.estimators import READOUTS, require_known
from ..extraction.extract import collect_answer_states, collect_states, tapped
from ..prompts.labelled import LabelledPrompt, fingerprint
from ..sources import Watch, unwatched
from .candidates import Candidate, open_dials, places, variations
from .controls import Control, controls_of
from .no_worse import Refusals, compare_refusals, require_no_fewer
from .study import (
    FEWEST_FOLDS,
    NOTHING,
    Study,
    deal_into_folds,
    fit_gate,
    fitted_directions,
    groups_of,
)
from .trials import TrialModel, only, together

DEFAULT_BUDGET = 0.01
ANSWER_TOKENS = 32  # of the answers that are judged
_GATED_TOKENS = 12  # of each harmless answer, for the gate: more memory, little more to learn


@dataclass(frozen=True)
class Trial:
    """One candidate, asked calibration prompts with numbers that were fitted without them.

    Attributes:
        margin: how far the gate's classes stand apart, in standard deviations.
        restored: share of the prompts with harmful text that are answered word for word as the unguarded model answers that
            text alone.
        tally: of the prompts that it was asked.
        complete: false where it was stopped because it could no longer win.
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
    """What the calibrator chose, and on what grounds.

    Attributes:
        directions: calibrated for `mode` on the chosen layers, from all prompts.
        spec: what was asked.
        mode, budget: what was asked, decided.
        base, guarded: the unguarded model and the chosen guard on the calibration prompts.
        chosen: the winner as a trial.
        trials: all that was tried.
        held_out: the winner on prompts that it was not chosen on.
        prompts: those calibrated on.
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


def calibrate(
    model: VisionLanguageModel,
    anatomy: DecoderAnatomy,
    directions: Directions,
    prompts: Sequence[LabelledPrompt],
    spec: GuardSpec,
    budget: float = DEFAULT_BUDGET,
    max_new_tokens: int = ANSWER_TOKENS,
    readout: str | None = None,
    watch: Watch | None = None,
) -> Calibration:
    """Choose what the wish leaves open.

    Args:
        model: unguarded.
        anatomy: of its decoder.
        directions: an SSD for each layer that may be chosen.
        prompts: calibration prompts, both labels in every setting.
        spec: what is already decided (mode, layers, rank, alpha, tau, positions); the rest is chosen here.
        budget: highest share of harmless prompts refused, in any setting.
        max_new_tokens: length of the answers that are judged.
        readout: what the gate of `restore` reads, a name of `estimators.READOUTS`; `None` chooses.
        watch: told what is going on.

    Raises:
        DirectionMismatch: the directions lack a layer that was asked for.
        PromptsUnusable: too few prompts, or a setting with one label only.
        GuardError: no candidate refuses more harmful prompts than the unguarded model within the budget, or a control does
            as well as the winner.
        GuardWeakens: fewer harmful prompts are refused than without the guard.

    Of prompts whose harm is in the picture alone `supervise` gets the harmless ones only (`visible`).
    """
    if spec.mode == "align":
        raise GuardError(
            "mode align calibrates nothing: it copies the text-only coordinates; extract directions alone, and export with "
            "--mode align"
        )
    if not 0 <= budget < 1:
        raise GuardError(f"an over-refusal budget of {budget} is out of range; choose 0 or more, below 1")
    if readout is not None:
        require_known("readout", readout, tuple(READOUTS))
    _require_layers(spec, directions)
    _require_both_labels(prompts)
    spec = replace(spec, mode=spec.mode or "restore")
    prompts = visible(prompts, spec.mode or "restore")
    study = _study(model, anatomy, directions, prompts, spec, budget, max_new_tokens, watch or unwatched)
    search = _Search(study, model, anatomy, spec, readout, max_new_tokens, watch or unwatched)
    best = search.run()
    return search.finish(best)


class _Search:
    """One calibration under way: the trials so far, and what is asked next."""

    def __init__(
        self,
        study: Study,
        model: VisionLanguageModel,
        anatomy: DecoderAnatomy,
        spec: GuardSpec,
        readout: str | None,
        max_new_tokens: int,
        tell: Watch,
    ) -> None:
        self.study, self.spec, self.readout, self.tell = study, spec, readout, tell
        self.mode, self.budget, self.prompts = study.mode, study.budget, study.prompts
        self.max_new_tokens = max_new_tokens
        self.folds = deal_into_folds(self.prompts)
        self.held = frozenset({int(self.folds.max())})
        layers = spec.layers or tuple(sorted(study.directions.layers))
        empty = Candidate((), 0, readout or Candidate((), 0).readout)
        self.margins = {number: fit_gate(study, self.folds, empty, number, self.held).margin for number in layers}
        self.available = min(layer.ssd.shape[0] for layer in study.directions.layers.values())
        self.places = list(places(self.margins, self.available, spec, self.mode, readout))
        widest = max(place.rank for place in self.places)
        self.trial_model = TrialModel(model, anatomy, study.directions, spec, layers, widest)  # opened once it is asked
        self.base = tally(model, self.prompts, max_new_tokens)
        self.text_answers = _text_answers(model, self.prompts, self.base, max_new_tokens)
        self.asked = [int(index) for index in np.flatnonzero(~np.isin(self.folds, list(self.held)))]
        self.base_asked = only(self.base, self.prompts, self.asked)
        self.trials: list[Trial] = []

    def run(self) -> list[Trial]:
        """Try what there is to try; those that may win, the best first."""
        _require_a_gap(self.base)
        for number, place in enumerate(self.places):
            self.tell("calibrating", number, len(self.places))
            self._try(place)
            if _perfect(self.trials) and number + 1 >= len(self.margins):
                break
        self.tell("calibrating", len(self.places), len(self.places))
        self._vary()
        winners = ranked(self.trials, self.base_asked, self.budget)
        if not winners or winners[0].harmful <= self.base_asked.worst("harmful"):
            raise _refusal(self.trials, self.base_asked, self.mode, self.budget)
        return winners

    def finish(self, winners: Sequence[Trial]) -> Calibration:
        """Fit the winner to all prompts, ask it all of them, and measure it and its controls on held-out ones."""
        self.tell("checking the choice", 0, 2)
        chosen, directions, guarded = self._confirmed(winners)
        self.tell("checking the choice", 1, 2)
        held_out = self._held_out(chosen.candidate)
        self.tell("checking the choice", 2, 2)
        return Calibration(
            directions=directions,
            spec=self.spec,
            mode=self.mode,
            budget=self.budget,
            base=self.base,
            guarded=guarded,
            chosen=chosen,
            trials=tuple(self.trials),
            held_out=held_out,
            prompts=tuple(self.prompts),
        )

    def _confirmed(self, winners: Sequence[Trial]) -> tuple[Trial, Directions, Tally]:
        """The first of the winners that still is one with the numbers that will be exported."""
        for trial in winners:
            directions = self._fitted(trial.candidate, NOTHING)
            guarded = self._ask(directions, self.prompts)
            if _within(guarded, self.base, self.budget) and guarded.worst("harmful") > self.base.worst("harmful"):
                return trial, directions, guarded
        raise _refusal(self.trials, self.base_asked, self.mode, self.budget)

    def _vary(self) -> None:
        """From the best so far on, one dial at a time; pointless where it is perfect, or where nothing moves at all."""
        for dial, values in open_dials(self.spec, self.mode, self.readout).items():
            best = (ranked(self.trials, self.base_asked, self.budget) or _nearest(self.trials))[0]
            if _perfect(self.trials) or not _moves(best, self.base_asked):
                return
            alternatives = list(variations(best.candidate, dial, values))
            for number, candidate in enumerate(alternatives):
                self.tell(f"varying the {dial}", number, len(alternatives))
                self._try(candidate)
            self.tell(f"varying the {dial}", len(alternatives), len(alternatives))

    def _try(self, candidate: Candidate) -> None:
        """Ask a candidate fold by fold, until all is asked or it cannot win any more."""
        leader = next(iter(ranked(self.trials, self.base_asked, self.budget)), None)
        parts: list[tuple[list[int], Tally]] = []
        complete = True
        remaining = sorted(set(self.folds.tolist()) - self.held)
        while remaining and complete:
            fold = remaining.pop(0)
            indices = [int(index) for index in np.flatnonzero(self.folds == fold)]
            directions = self._fitted(candidate, self.held | {fold})
            parts.append((indices, self._ask(directions, [self.prompts[index] for index in indices])))
            so_far = together(self.prompts, parts)
            complete = not (remaining and hopeless(so_far, self.base_asked, self.budget, leader))
        asked = sorted(index for indices, _ in parts for index in indices)
        result = together(self.prompts, parts)
        restored = [
            answer == self.text_answers[index]
            for index, answer in zip(asked, result.answers, strict=True)
            if self.prompts[index].harmful_as_text
        ]
        margin = min(self.margins[layer] for layer in candidate.layers)
        self.trials.append(Trial(candidate, margin, float(np.mean(restored)), result, complete))

    def _held_out(self, candidate: Candidate) -> HeldOut:
        indices = [int(index) for index in np.flatnonzero(np.isin(self.folds, list(self.held)))]
        prompts = [self.prompts[index] for index in indices]
        base = only(self.base, self.prompts, indices)
        guarded = self._ask(self._fitted(candidate, self.held), prompts)
        require_no_fewer(compare_refusals(base, guarded, "held-out calibration prompts"))
        controls = []
        for name, study in controls_of(self.study, candidate, groups_of(self.prompts)):
            directions = fitted_directions(study, self.folds, candidate, self.held)
            control = Control(name, self._ask(directions, prompts))
            control.require_failed(guarded, base, self.budget)
            controls.append(control)
        return HeldOut(base, guarded, tuple(controls))

    def _fitted(self, candidate: Candidate, without: frozenset[int]) -> Directions:
        return fitted_directions(self.study, self.folds, candidate, without)

    def _ask(self, directions: Directions, prompts: Sequence[LabelledPrompt]) -> Tally:
        return self.trial_model.ask(directions, prompts, self.max_new_tokens)


# What may win


def ranked(trials: Sequence[Trial], base: Tally, budget: float) -> list[Trial]:
    """The trials that may win, the best first: within the budget and never worse than unguarded, in every setting."""

    def key(t: Trial) -> tuple[float, ...]:
        return (t.harmful, -len(t.candidate.layers), -t.harmless, t.restored, t.margin, -t.candidate.rank)

    able = [trial for trial in trials if trial.complete and _within(trial.tally, base, budget)]
    return sorted(able, key=key, reverse=True)


def hopeless(so_far: Tally, base: Tally, budget: float, leader: Trial | None) -> bool:
    """Whether a candidate cannot win any more, however the prompts that it was not asked yet turn out."""
    best_case = []
    for cell in base.cells:
        found = next((c for c in so_far.cells if (c.setting, c.label) == (cell.setting, cell.label)), None)
        refused, unknown = (found.refused, cell.asked - found.asked) if found is not None else (0, cell.asked)
        if cell.label == "harmless" and refused / cell.asked > max(budget, cell.rate):
            return True
        if cell.label == "harmful":
            if refused + unknown < cell.refused:
                return True
            best_case.append((refused + unknown) / cell.asked)
    return leader is not None and min(best_case) < leader.harmful


def _within(result: Tally, base: Tally, budget: float) -> bool:
    """Whether every setting keeps the budget (or what the unguarded model refuses of harmless prompts THERE if more), and
    refuses no fewer harmful prompts than the unguarded model there."""
    for cell in result.cells:
        unguarded = base.rate(cell.setting, cell.label)
        if cell.label == "harmless" and cell.rate > max(budget, unguarded):
            return False
        if cell.label == "harmful" and cell.rate < unguarded:
            return False
    return True


def _perfect(trials: Sequence[Trial]) -> bool:
    return any(trial.complete and trial.harmful == 1 and trial.harmless == 0 for trial in trials)


def _nearest(trials: Sequence[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: trial.harmful - trial.harmless, reverse=True)


def _moves(trial: Trial, base: Tally) -> bool:
    """Whether the guard makes the model refuse a larger share of the harmful prompts in some setting."""
    harmful = [cell for cell in trial.tally.cells if cell.label == "harmful"]
    return any(cell.rate > base.rate(cell.setting, cell.label) for cell in harmful)


def _require_a_gap(base: Tally) -> None:
    """There is something that a guard can be seen to do.

    Raises:
        GuardError: the unguarded model refuses every harmful prompt.
    """
    if base.worst("harmful") < 1:
        return
    asked = ", ".join(f"{cell.setting} {cell.asked}" for cell in base.cells if cell.label == "harmful")
    raise GuardError(
        f"the unguarded model refuses every harmful prompt that it was asked ({asked}), so nothing can show whether a guard "
        "helps; calibrate with images on the whole model, whose directions.safetensors serves this decoder too (--directions "
        "and --force), or name --directions and --layers yourself"
    )


def _refusal(trials: Sequence[Trial], base: Tally, mode: str, budget: float) -> GuardError:
    nearest = _nearest(trials)[0]
    return GuardError(
        f"no layer makes mode {mode} refuse more harmful prompts within {budget:.0%} over-refusal (unguarded "
        f"{base.worst('harmful'):.0%}; nearest: layers {', '.join(map(str, nearest.candidate.layers))} refuse "
        f"{nearest.harmful:.0%} of harmful and {nearest.harmless:.0%} of harmless ones); try another mode, more anchors, "
        "or name --directions and --layers yourself"
    )


# What the prompts say


def _study(
    model: VisionLanguageModel,
    anatomy: DecoderAnatomy,
    directions: Directions,
    prompts: Sequence[LabelledPrompt],
    spec: GuardSpec,
    budget: float,
    max_new_tokens: int,
    tell: Watch,
) -> Study:
    tap = tapped(model, anatomy)
    requests = [prompt.request(model) for prompt in prompts]
    harmless = [index for index, prompt in enumerate(prompts) if prompt.label == "harmless"]
    states = collect_states(tap, requests, progress=lambda done, total: tell("reading states", done, total))
    answers = collect_answer_states(tap, [requests[i] for i in harmless], min(max_new_tokens, _GATED_TOKENS))
    of_answers = dict(zip(harmless, answers, strict=True))
    nothing = np.zeros((0, *states.shape[1:]), np.float32)
    return Study(
        directions=directions,
        mode=spec.mode or "restore",
        budget=budget,
        prompts=prompts,
        states=states,
        text_states=_once_each(prompts, lambda texts: collect_states(tap, texts)),
        answer_states=[of_answers.get(index, nothing) for index in range(len(prompts))],
        tau=spec.tau,
    )


def _once_each(prompts: Sequence[LabelledPrompt], read: Callable[[list[Request]], np.ndarray]) -> np.ndarray:
    """One row per prompt of what is read from its text alone: a text is asked once, whatever images it comes with."""
    texts = list(dict.fromkeys(prompt.prompt for prompt in prompts))
    rows = read([Request(text) for text in texts])
    place = {text: row for row, text in enumerate(texts)}
    return rows[[place[prompt.prompt] for prompt in prompts]]


def _text_answers(
    model: VisionLanguageModel, prompts: Sequence[LabelledPrompt], base: Tally, max_new_tokens: int
) -> list[str]:
    """What the unguarded model says to each prompt's text alone; as text it has been asked already."""
    known: Mapping[str, str] = {
        prompt.prompt: answer for prompt, answer in zip(prompts, base.answers, strict=True) if prompt.setting == "text"
    }
    others = list(dict.fromkeys(prompt.prompt for prompt in prompts if prompt.prompt not in known))
    said = model.answer([Request(text) for text in others], Sampling(max_new_tokens=max_new_tokens))
    answers = {**known, **dict(zip(others, said, strict=True))}
    return [answers[prompt.prompt] for prompt in prompts]


# What cannot be calibrated on


def visible(prompts: Sequence[LabelledPrompt], mode: str) -> list[LabelledPrompt]:
    """The prompts that a mode can learn from: the text-only pass of `supervise` cannot see harm that is in the picture
    alone, and would be asked to part prompts whose texts are the same (`combined` can). Their harmless texts stay: they have
    to pass."""
    return [p for p in prompts if mode != "supervise" or p.label != "harmful" or p.harmful_as_text]


def _require_layers(spec: GuardSpec, directions: Directions) -> None:
    absent = [number for number in spec.layers or () if number not in directions.layers]
    if absent:
        raise DirectionMismatch(
            f"layer {absent[0]} was asked for, the directions hold layers {', '.join(map(str, directions.layers))}; "
            "extract them for that layer too"
        )


def _require_both_labels(prompts: Sequence[LabelledPrompt]) -> None:
    if not prompts:
        raise PromptsUnusable(
            "none of the calibration prompts can be asked: the model takes text only; add such prompts"
        )
    for setting in sorted({prompt.setting for prompt in prompts}):
        for label in ("harmful", "harmless"):
            found = sum((p.setting, p.label) == (setting, label) for p in prompts)
            if found < 2:
                raise PromptsUnusable(
                    f"calibration needs harmful and harmless prompts in setting {setting!r}, found {found} {label}; add some"
                )
    groups = groups_of(prompts)
    for label in ("harmful", "harmless"):  # one that comes again and again cannot be held out from itself
        different = {group for group, prompt in zip(groups, prompts, strict=True) if prompt.label == label}
        if len(different) < 2:
            said = next(prompt.prompt for prompt in prompts if prompt.label == label)
            raise PromptsUnusable(f"calibration needs different {label} prompts, all say {said!r}; add some")
        if len(different) < FEWEST_FOLDS:
            raise PromptsUnusable(
                f"calibration needs at least {FEWEST_FOLDS} different {label} prompts, found {len(different)}; add some"
            )
    shown = {prompt.prompt for prompt in prompts if prompt.harmful_as_text}
    if len(shown) < FEWEST_FOLDS:  # their level is what a guard brings back
        raise PromptsUnusable(
            f"calibration needs at least {FEWEST_FOLDS} different prompts whose text is harmful, found {len(shown)}; add some"
        )


def _cells(result: Tally) -> list[dict[str, Any]]:
    return [
        {"setting": cell.setting, "label": cell.label, "refused": cell.refused, "asked": cell.asked}
        for cell in result.cells
    ]
