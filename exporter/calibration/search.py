"""The search of a calibration: runs candidates, fits the winner to all prompts, and checks it on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...graphs.anatomy import DecoderAnatomy
from ...graphs.directions import Directions
from ...graphs.progress import ProgressCallback
from ...graphs.spec import GuardSpec
from ...runtime.vlm import VisionLanguageModel
from ..evaluation.evaluate import tally
from ..evaluation.metrics import Tally
from ..prompts.labelled import LabelledPrompt
from .candidates import Candidate, open_axes, places, variations
from .controls import Control, controls_of
from .fitting import NOTHING, Study, deal_into_folds, fit_gate, fitted_directions, groups_of
from .ranking import gains, hopeless, is_perfect, keeps_limits, nearest_of, no_winner, ranked, require_a_gap
from .reading import text_answers
from .refusal_regression import compare_refusals, require_no_fewer
from .results import Calibration, HeldOut, Trial
from .trials import TrialModel, only, together


class Search:
    """State of a running calibration: the trials so far, and the next candidates."""

    def __init__(
        self,
        study: Study,
        model: VisionLanguageModel,
        anatomy: DecoderAnatomy,
        spec: GuardSpec,
        readout: str | None,
        max_new_tokens: int,
        report_progress: ProgressCallback,
        is_late: Callable[[], bool],
    ) -> None:
        self.is_late = is_late
        self.study, self.spec, self.readout, self.report_progress = study, spec, readout, report_progress
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
        self.trial_model = TrialModel(model, anatomy, study.directions, spec, layers, widest)  # opened on first use
        self.base = tally(model, self.prompts, max_new_tokens)
        self.text_answers = text_answers(model, self.prompts, self.base, max_new_tokens)
        self.asked = [int(index) for index in np.flatnonzero(~np.isin(self.folds, list(self.held)))]
        self.base_asked = only(self.base, self.prompts, self.asked)
        self.trials: list[Trial] = []

    def run(self) -> list[Trial]:
        """Try what there is to try; those that may win, the best first."""
        require_a_gap(self.base)
        for number, place in enumerate(self.places):
            self.report_progress("calibrating", number, len(self.places))
            if number and self.is_late():
                break
            self._try(place)
            if is_perfect(self.trials) and number + 1 >= len(self.margins):
                break
        self.report_progress("calibrating", len(self.places), len(self.places))
        self._vary()
        before = self.base_asked.worst("harmful")
        winners = [t for t in ranked(self.trials, self.base_asked, self.budget) if t.harmful > before]
        if not winners:
            raise no_winner(self.trials, self.base_asked, self.mode, self.budget)
        return winners

    def finish(self, winners: Sequence[Trial]) -> Calibration:
        """Fit the winner to all prompts, ask it all of them, and measure it and its controls on held-out ones."""
        self.report_progress("checking the choice", 0, 2)
        chosen, directions, guarded = self._confirmed(winners)
        self.report_progress("checking the choice", 1, 2)
        held_out = self._held_out(chosen.candidate)
        self.report_progress("checking the choice", 2, 2)
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
        """The first of the winners that still is one with the numbers that will be exported: by its counts, else by its
        interval (`ranking`)."""
        before = self.base.worst("harmful")
        asked: dict[int, tuple[Directions, Tally]] = {}
        for by_interval in (False, True):
            for number, trial in enumerate(winners):
                if number not in asked:
                    directions = self._fitted(trial.candidate, NOTHING)
                    asked[number] = directions, self._ask(directions, self.prompts)
                directions, guarded = asked[number]
                limits = keeps_limits(guarded, self.base, self.budget, by_interval)
                if limits and guarded.worst("harmful") > before:
                    return trial, directions, guarded
        raise no_winner(self.trials, self.base_asked, self.mode, self.budget)

    def _vary(self) -> None:
        """From the best so far on, one axis at a time, until it is perfect or the time is up."""
        for axis, values in open_axes(self.spec, self.mode, self.readout).items():
            best = (ranked(self.trials, self.base_asked, self.budget) or nearest_of(self.trials))[0]
            if is_perfect(self.trials):
                return
            alternatives = list(variations(best.candidate, axis, values))
            for number, candidate in enumerate(alternatives):
                self.report_progress(f"varying the {axis}", number, len(alternatives))
                if self.is_late():
                    return
                self._try(candidate)
            self.report_progress(f"varying the {axis}", len(alternatives), len(alternatives))

    def _try(self, candidate: Candidate) -> None:
        """Run a candidate fold by fold, until all prompts ran or it cannot win."""
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
            does_nothing = leader is None and not gains(so_far, self.base_asked)
            complete = not (remaining and (does_nothing or hopeless(so_far, self.base_asked, self.budget, leader)))
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
