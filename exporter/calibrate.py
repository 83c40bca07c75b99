"""A small calibrator: which layers, rank, threshold and target, from labelled prompts, under an over-refusal budget.

1. One tapped pass over the calibration prompts (and their text-only versions) gives every layer's states; so do the
   tokens of the unguarded model's answers to the harmless ones, because the gate is asked again at each of them.
2. Per layer: the readout (LDA on all settings), the target (mean coordinates of harmful text), the threshold (from
   scores of prompts that the readout was not fitted on).
3. Candidates, the likeliest first, are baked into the graph and asked the calibration prompts. The winner keeps
   over-refusal within the budget in every setting, refuses the most harmful prompts, has the fewest layers, and gives
   back most often, word for word, what the unguarded model says to the same prompt as text.

The unguarded model is asked first: a guard that refuses no more than it does is not a guard, and is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ..graphs.anatomy import DecoderAnatomy
from ..graphs.directions import Directions, LayerDirections
from ..graphs.errors import DirectionMismatch, GuardError, PromptsUnusable
from ..graphs.plan import plan_guard
from ..graphs.rewrite import rewrite
from ..graphs.spec import GuardSpec
from ..runtime.vlm import Request, Sampling, VisionLanguageModel
from .evaluate import Tally, tally
from .extract import collect_answer_states, collect_states, tapped
from .prompts import LabelledPrompt, fingerprint
from .sources import Watch

RANKS = (1, 2, 4)
DEFAULT_BUDGET = 0.01
_FOLDS = 5
_ENOUGH_TRIALS = 24
_ANSWER_TOKENS = 12  # of each harmless answer, for the gate: more memory, little more to learn


@dataclass(frozen=True)
class Trial:
    """One candidate, asked all calibration prompts.

    Attributes:
        margin: how far the gate's classes stand apart, in standard deviations.
        restored: share of the harmful prompts answered word for word as the unguarded model answers them as text.
    """

    layers: tuple[int, ...]
    rank: int
    margin: float
    restored: float
    tally: Tally

    @property
    def harmful(self) -> float:
        """Lowest refusal rate of harmful prompts over the settings."""
        return self.tally.worst("harmful")

    @property
    def harmless(self) -> float:
        """Highest refusal rate of harmless prompts over the settings."""
        return self.tally.worst("harmless")

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "rank": self.rank,
            "margin": self.margin,
            "restored_word_for_word": self.restored,
            "harmful_refused_worst_setting": self.harmful,
            "harmless_refused_worst_setting": self.harmless,
        }


@dataclass(frozen=True)
class Calibration:
    """What the calibrator chose, and on what grounds.

    Attributes:
        directions: calibrated for `mode` on the chosen layers.
        mode, budget: what was asked.
        base: the unguarded model on the calibration prompts.
        chosen: the winner.
        trials: all that was tried.
        prompts: those calibrated on.
    """

    directions: Directions
    mode: str
    budget: float
    base: Tally
    chosen: Trial
    trials: tuple[Trial, ...]
    prompts: tuple[LabelledPrompt, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "over_refusal_budget": self.budget,
            "prompts": len(self.prompts),
            "prompt_fingerprints": sorted({fingerprint(prompt) for prompt in self.prompts}),
            "unguarded": _cells(self.base),
            "guarded": _cells(self.chosen.tally),
            "chosen": self.chosen.to_json(),
            "trials": [trial.to_json() for trial in self.trials],
        }


@dataclass(frozen=True)
class _Study:
    """What all candidates are made from.

    Attributes:
        states, text_states: at the end of each prompt, and of its text-only version, `[prompts, layers, d]` float32.
        answer_states: at the tokens of each harmless prompt's answer, `[tokens, layers, d]` per prompt.
        text_answers: what the unguarded model says to each prompt's text-only version.
        harmful: `[prompts]` bool.
    """

    model: VisionLanguageModel
    anatomy: DecoderAnatomy
    directions: Directions
    prompts: Sequence[LabelledPrompt]
    spec: GuardSpec
    mode: str
    budget: float
    states: np.ndarray
    text_states: np.ndarray
    answer_states: list[np.ndarray]
    text_answers: list[str]
    harmful: np.ndarray

    @property
    def groups(self) -> np.ndarray:
        """One number per distinct prompt text: its settings belong to one fold."""
        return np.unique([prompt.prompt for prompt in self.prompts], return_inverse=True)[1]


def calibrate(
    model: VisionLanguageModel,
    anatomy: DecoderAnatomy,
    directions: Directions,
    prompts: Sequence[LabelledPrompt],
    spec: GuardSpec,
    budget: float = DEFAULT_BUDGET,
    max_new_tokens: int = 32,
    watch: Watch | None = None,
) -> Calibration:
    """Choose layers, rank, threshold, target and readout.

    Args:
        model: unguarded.
        anatomy: of its decoder.
        directions: an SSD for each layer that may be chosen.
        prompts: calibration prompts, both labels in every setting.
        spec: what is already decided (mode, layers, rank, alpha, tau, positions); the rest is chosen here.
        budget: highest share of harmless prompts refused, in any setting.
        max_new_tokens: length of the answers that are judged.
        watch: told what is going on.

    Raises:
        DirectionMismatch: the directions lack a layer that was asked for.
        PromptsUnusable: too few prompts, or a setting with one label only.
        GuardError: no candidate refuses more harmful prompts than the unguarded model within the budget.
    """
    if not 0 <= budget < 1:
        raise GuardError(f"an over-refusal budget of {budget} is out of range; choose 0 or more, below 1")
    absent = [number for number in spec.layers or () if number not in directions.layers]
    if absent:
        raise DirectionMismatch(
            f"layer {absent[0]} was asked for, the directions hold layers {', '.join(map(str, directions.layers))}; "
            "extract them for that layer too"
        )
    _require_both_labels(prompts)
    mode = spec.mode or "restore"
    study = _study(model, anatomy, directions, prompts, replace(spec, mode=mode), budget, max_new_tokens, watch)
    base = tally(model, prompts, max_new_tokens)
    trials: list[Trial] = []
    calibrated: dict[tuple[tuple[int, ...], int], Directions] = {}
    gates = {layer: _gate(study, layer) for layer in spec.layers or sorted(directions.layers)}
    candidates = list(_candidates(study, gates))
    for number, (layers, rank) in enumerate(candidates):
        if watch is not None:
            watch("calibrating", number, len(candidates))
        chosen = calibrated[layers, rank] = _with_numbers(study, gates, layers, rank)
        trials.append(_try(study, gates, chosen, layers, rank, max_new_tokens))
        if _perfect(trials) and number + 1 >= len(gates):
            break
    if watch is not None:
        watch("calibrating", len(candidates), len(candidates))
    best = _winner(trials, base, budget)
    if best is None or best.harmful <= base.worst("harmful"):
        _refuse(trials, base, mode, budget)
    assert best is not None
    return Calibration(calibrated[best.layers, best.rank], mode, budget, base, best, tuple(trials), tuple(prompts))


# 1. States


def _study(
    model: VisionLanguageModel,
    anatomy: DecoderAnatomy,
    directions: Directions,
    prompts: Sequence[LabelledPrompt],
    spec: GuardSpec,
    budget: float,
    max_new_tokens: int,
    watch: Watch | None,
) -> _Study:
    tap = tapped(model, anatomy)
    told = None if watch is None else lambda done, total: watch("reading states", done, total)
    requests = [prompt.request(model) for prompt in prompts]
    texts = [Request(prompt.prompt) for prompt in prompts]
    harmful = np.array([prompt.label == "harmful" for prompt in prompts])
    harmless = [request for request, bad in zip(requests, harmful, strict=True) if not bad]
    return _Study(
        model=model,
        anatomy=anatomy,
        directions=directions,
        prompts=prompts,
        spec=spec,
        mode=spec.mode or "restore",
        budget=budget,
        states=collect_states(tap, requests, progress=told),
        text_states=collect_states(tap, texts),
        answer_states=collect_answer_states(tap, harmless, min(max_new_tokens, _ANSWER_TOKENS)),
        text_answers=model.answer(texts, Sampling(max_new_tokens=max_new_tokens)),
        harmful=harmful,
    )


# 2. Numbers


@dataclass(frozen=True)
class _Gate:
    """What decides at one layer, whatever the rank; `readout` is `None` where the mode has none of its own."""

    readout: np.ndarray | None
    threshold: float
    margin: float


def _with_numbers(study: _Study, gates: Mapping[int, _Gate], layers: tuple[int, ...], rank: int) -> Directions:
    """The directions of some layers with origin, target, readout and threshold for the study's mode."""
    made = {layer: _layer_numbers(study, gates[layer], layer, rank) for layer in layers}
    return replace(study.directions, layers=made, mode=study.mode, recommended_layers=layers, alpha=study.spec.alpha)


def _layer_numbers(study: _Study, gate: _Gate, layer: int, rank: int) -> LayerDirections:
    ssd = study.directions.layers[layer].ssd[:rank]
    text = study.text_states[:, layer].astype(np.float64) @ ssd.T.astype(np.float64)
    return LayerDirections(
        ssd=ssd,
        origin=text[~study.harmful].mean(axis=0).astype(np.float32),
        target=text[study.harmful].mean(axis=0).astype(np.float32),
        readout=gate.readout,
        threshold=gate.threshold,
    )


def _gate(study: _Study, layer: int) -> _Gate:
    """Readout, threshold and how far harmful and harmless scores stand apart."""
    readout, scores = _scores(study, layer)
    threshold, margin = _threshold(scores, study.harmful, study.budget)
    return _Gate(readout, threshold if study.spec.tau is None else study.spec.tau, margin)


def _scores(study: _Study, layer: int) -> tuple[np.ndarray | None, np.ndarray]:
    """The readout, if the mode has one, and each prompt's score: the highest that the gate will compare for it."""
    row = study.directions.layers[layer].ssd[0].astype(np.float64)
    if study.mode == "supervise":  # its gate reads the text-only query once, not the tokens of the answer
        return None, study.text_states[:, layer].astype(np.float64) @ row
    if study.mode != "restore":
        return None, _highest(study, layer, lambda states, _: states @ row)
    # Scores of prompts that the readout was not fitted on: its own would look better than any held-out prompt does.
    everyone = np.arange(len(study.harmful))
    fold_of, readouts = np.empty(len(everyone), int), []
    for number, (fitted, held_out) in enumerate(_folds(study)):
        fold_of[held_out] = number
        readouts.append(_fit(study, layer, np.isin(everyone, fitted)))
    readout = _fit(study, layer, np.ones(len(everyone), bool)).astype(np.float32)
    return readout, _highest(study, layer, lambda states, index: states @ readouts[fold_of[index]])


def _folds(study: _Study) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import StratifiedGroupKFold  # here: scikit-learn is slow to import, see extract.py

    count = min(_FOLDS, *(len(set(study.groups[study.harmful == label])) for label in (True, False)))
    splitter = StratifiedGroupKFold(max(count, 2), shuffle=True, random_state=0)
    return splitter.split(study.states, study.harmful, study.groups)


def _highest(study: _Study, layer: int, score: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """Per prompt: the score at its end, or the highest over the answer's tokens too where it is harmless."""
    found = np.array([float(score(state.astype(np.float64), i)) for i, state in enumerate(study.states[:, layer])])
    for index, states in zip(np.flatnonzero(~study.harmful), study.answer_states, strict=True):
        if len(states):
            found[index] = max(found[index], float(score(states[:, layer].astype(np.float64), int(index)).max()))
    return found


def _fit(study: _Study, layer: int, chosen: np.ndarray) -> np.ndarray:
    """Unit readout `[d]`: LDA of harmful prompt ends against harmless prompt ends and answer tokens.

    Shrinkage, because there may be more dimensions than prompts; equal priors, because answers have many tokens.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    harmless = np.flatnonzero(~study.harmful)
    answers = [s[:, layer] for i, s in zip(harmless, study.answer_states, strict=True) if chosen[i] and len(s)]
    states = np.concatenate([study.states[chosen, layer], *answers]).astype(np.float64)
    labels = np.zeros(len(states), bool)
    labels[: chosen.sum()] = study.harmful[chosen]
    fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.5, 0.5]).fit(states, labels)
    return fitted.coef_[0] / np.linalg.norm(fitted.coef_[0])


def _threshold(scores: np.ndarray, harmful: np.ndarray, budget: float) -> tuple[float, float]:
    """Where the gate opens: above all but `budget` of the harmless scores, and midway to the harmful ones if they part."""
    ceiling = float(np.quantile(scores[~harmful], 1 - budget))
    floor = float(np.quantile(scores[harmful], budget))
    threshold = (ceiling + floor) / 2 if floor > ceiling else ceiling
    spread = float(scores[~harmful].std() + scores[harmful].std()) or 1.0
    return float(np.float32(threshold)), (floor - ceiling) / spread


# 3. Candidates


def _candidates(study: _Study, gates: Mapping[int, _Gate]) -> Iterator[tuple[tuple[int, ...], int]]:
    """`(layers, rank)`: single layers, the best separated first, then neighbours; only what the spec leaves open."""
    available = min(layer.ssd.shape[0] for layer in study.directions.layers.values())
    ranks = (study.spec.rank,) if study.spec.rank is not None else [rank for rank in RANKS if rank <= available]
    if study.spec.layers is not None:
        yield from ((study.spec.layers, rank) for rank in ranks)
        return
    order = sorted(gates, key=lambda layer: -gates[layer].margin)[:_ENOUGH_TRIALS]
    yield from (((layer,), rank) for rank in ranks for layer in order)
    best = set(order[: max(3, len(order) // 2)])
    neighbours = [pair for pair in pairwise(sorted(gates)) if best & set(pair)]
    yield from ((pair, ranks[-1]) for pair in neighbours)


def _try(
    study: _Study,
    gates: Mapping[int, _Gate],
    directions: Directions,
    layers: tuple[int, ...],
    rank: int,
    max_new_tokens: int,
) -> Trial:
    """Bake a candidate into a fresh copy of the decoder, and ask it everything."""
    graph = study.model.package.load_decoder()
    spec = replace(study.spec, layers=layers, rank=rank)
    rewrite(graph, plan_guard(graph, study.anatomy, directions, spec))
    result = tally(study.model.with_decoder(graph), study.prompts, max_new_tokens)
    margin = min(gates[layer].margin for layer in layers)
    as_text = [a == b for a, b in zip(result.answers, study.text_answers, strict=True)]
    return Trial(layers, rank, margin, float(np.mean(np.array(as_text)[study.harmful])), result)


def _perfect(trials: Sequence[Trial]) -> bool:
    return any(trial.harmful == 1 and trial.harmless == 0 for trial in trials)


def _within(trial: Trial, base: Tally, budget: float) -> bool:
    """Whether every setting keeps the budget, or what the unguarded model refuses of harmless prompts THERE if more."""
    harmless = [cell for cell in trial.tally.cells if cell.label == "harmless"]
    return all(cell.rate <= max(budget, base.rate(cell.setting, cell.label)) for cell in harmless)


def _winner(trials: Sequence[Trial], base: Tally, budget: float) -> Trial | None:
    within = [trial for trial in trials if _within(trial, base, budget)]
    return max(
        within, key=lambda t: (t.harmful, -len(t.layers), -t.harmless, t.restored, t.margin, -t.rank), default=None
    )


def _refuse(trials: Sequence[Trial], base: Tally, mode: str, budget: float) -> None:
    nearest = max(trials, key=lambda trial: trial.harmful - trial.harmless)
    raise GuardError(
        f"no layer makes mode {mode} refuse more harmful prompts within {budget:.0%} over-refusal (unguarded "
        f"{base.worst('harmful'):.0%}; nearest: layers {', '.join(map(str, nearest.layers))} refuse "
        f"{nearest.harmful:.0%} of harmful and {nearest.harmless:.0%} of harmless ones); try another mode, more anchors, "
        "or name --directions and --layers yourself"
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
    for label in ("harmful", "harmless"):  # one that comes again and again cannot be held out from itself
        texts = {prompt.prompt for prompt in prompts if prompt.label == label}
        if len(texts) < 2:
            raise PromptsUnusable(f"calibration needs different {label} prompts, all say {min(texts)!r}; add some")


def _cells(result: Tally) -> list[dict[str, Any]]:
    return [
        {"setting": cell.setting, "label": cell.label, "refused": cell.refused, "asked": cell.asked}
        for cell in result.cells
    ]
