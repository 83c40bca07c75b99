"""A small calibrator: which layers, rank, threshold and target, from labelled prompts, under an over-refusal budget.

1. One tapped pass over the calibration prompts (and their text-only versions) gives every layer's states.
2. Per layer: the readout (LDA on all settings), the target (mean coordinates of harmful text), the threshold (from
   scores of prompts that the readout was not fitted on).
3. Candidates, the likeliest first, are baked into the graph and asked the calibration prompts. The winner keeps
   over-refusal within the budget in every setting, refuses the most harmful prompts, and has the fewest layers.

The unguarded model is asked first: a guard that refuses no more than it does is not a guard, and is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.model_selection import StratifiedKFold

from ..graphs.anatomy import DecoderAnatomy
from ..graphs.directions import Directions, LayerDirections
from ..graphs.errors import GuardError, PromptsUnusable
from ..graphs.plan import plan_guard
from ..graphs.rewrite import rewrite
from ..graphs.spec import GuardSpec
from ..runtime.vlm import Request, VisionLanguageModel
from .evaluate import Tally, tally
from .extract import collect_states, tapped
from .prompts import LabelledPrompt, fingerprint
from .sources import Watch

RANKS = (1, 2, 4)
DEFAULT_BUDGET = 0.01
_FOLDS = 5
_ENOUGH_TRIALS = 24


@dataclass(frozen=True)
class Trial:
    """One candidate, asked all calibration prompts."""

    layers: tuple[int, ...]
    rank: int
    margin: float
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
    """What all candidates are made from: states `[prompts, layers, d]` float32, and labels (1 = harmful)."""

    model: VisionLanguageModel
    anatomy: DecoderAnatomy
    directions: Directions
    prompts: Sequence[LabelledPrompt]
    spec: GuardSpec
    mode: str
    budget: float
    states: np.ndarray
    text_states: np.ndarray
    harmful: np.ndarray


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
        PromptsUnusable: too few prompts, or a setting with one label only.
        GuardError: no candidate refuses more harmful prompts than the unguarded model within the budget.
    """
    if not 0 <= budget < 1:
        raise GuardError(f"an over-refusal budget of {budget} is out of range; choose 0 or more, below 1")
    _require_both_labels(prompts)
    mode = spec.mode or "restore"
    study = _study(model, anatomy, directions, prompts, replace(spec, mode=mode), mode, budget, watch)
    base = tally(model, prompts, max_new_tokens)
    allowed = _allowed_refusals(base, budget)
    trials: list[Trial] = []
    calibrated: dict[tuple[tuple[int, ...], int], Directions] = {}
    candidates = list(_candidates(study))
    for number, (layers, rank) in enumerate(candidates):
        if watch is not None:
            watch("calibrating", number, len(candidates))
        chosen = _with_numbers(study, layers, rank)
        calibrated[layers, rank] = chosen
        trials.append(_try(study, chosen, layers, rank, max_new_tokens))
        if _perfect(trials) and number + 1 >= len(_single_layers(study)):
            break
    if watch is not None:
        watch("calibrating", len(candidates), len(candidates))
    best = _winner(trials, allowed)
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
    mode: str,
    budget: float,
    watch: Watch | None,
) -> _Study:
    tap = tapped(model, anatomy)
    told = None if watch is None else lambda done, total: watch("reading states", done, total)
    states = collect_states(tap, [prompt.request(model) for prompt in prompts], progress=told)
    text_states = collect_states(tap, [Request(prompt.prompt) for prompt in prompts])
    harmful = np.array([prompt.label == "harmful" for prompt in prompts])
    return _Study(model, anatomy, directions, prompts, spec, mode, budget, states, text_states, harmful)


# 2. Numbers


def _with_numbers(study: _Study, layers: tuple[int, ...], rank: int) -> Directions:
    """The directions of some layers with origin, target, readout and threshold for the study's mode."""
    made = {layer: _layer_numbers(study, layer, rank)[0] for layer in layers}
    return replace(study.directions, layers=made, mode=study.mode, recommended_layers=layers, alpha=study.spec.alpha)


def _layer_numbers(study: _Study, layer: int, rank: int) -> tuple[LayerDirections, float]:
    """One layer's numbers, and how far its gate's classes stand apart (in standard deviations)."""
    ssd = study.directions.layers[layer].ssd[:rank]
    text = study.text_states[:, layer].astype(np.float64) @ ssd.T.astype(np.float64)
    readout, scores = _gate(study, layer, text)
    threshold, margin = _threshold(scores, study.harmful, study.budget)
    if study.spec.tau is not None:
        threshold = study.spec.tau
    numbers = LayerDirections(
        ssd=ssd,
        origin=text[~study.harmful].mean(axis=0).astype(np.float32),
        target=text[study.harmful].mean(axis=0).astype(np.float32),
        readout=readout,
        threshold=threshold,
    )
    return numbers, margin


def _gate(study: _Study, layer: int, text: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """The readout, if the mode has one, and the score that the gate compares, one per prompt."""
    if study.mode == "supervise":
        return None, text[:, 0]
    states = study.states[:, layer].astype(np.float64)
    if study.mode != "restore":
        return None, states @ study.directions.layers[layer].ssd[0].astype(np.float64)
    readout = _lda().fit(states, study.harmful).coef_[0]
    length = float(np.linalg.norm(readout))
    # Scores of prompts that the readout was not fitted on: its own would look better than any held-out prompt does.
    folds = StratifiedKFold(min(_FOLDS, int(np.bincount(study.harmful).min())), shuffle=True, random_state=0)
    raw = np.empty(len(states))
    for fitted, held_out in folds.split(states, study.harmful):
        unit = _lda().fit(states[fitted], study.harmful[fitted]).coef_[0]
        raw[held_out] = states[held_out] @ (unit / np.linalg.norm(unit))
    return (readout / length).astype(np.float32), raw


def _lda() -> LinearDiscriminantAnalysis:
    """Shrinkage, because there are more dimensions than prompts."""
    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")


def _threshold(scores: np.ndarray, harmful: np.ndarray, budget: float) -> tuple[float, float]:
    """Where the gate opens: above all but `budget` of the harmless scores, and midway to the harmful ones if they part."""
    ceiling = float(np.quantile(scores[~harmful], 1 - budget))
    floor = float(np.quantile(scores[harmful], budget))
    threshold = (ceiling + floor) / 2 if floor > ceiling else ceiling
    spread = float(scores[~harmful].std() + scores[harmful].std()) or 1.0
    return float(np.float32(threshold)), (floor - ceiling) / spread


# 3. Candidates


def _single_layers(study: _Study) -> list[int]:
    return sorted(study.directions.layers)


def _candidates(study: _Study) -> Iterator[tuple[tuple[int, ...], int]]:
    """`(layers, rank)`: single layers, the best separated first, then neighbours; only what the spec leaves open."""
    available = min(layer.ssd.shape[0] for layer in study.directions.layers.values())
    ranks = (study.spec.rank,) if study.spec.rank is not None else [rank for rank in RANKS if rank <= available]
    if study.spec.layers is not None:
        yield from ((study.spec.layers, rank) for rank in ranks)
        return
    margins = {layer: _layer_numbers(study, layer, 1)[1] for layer in _single_layers(study)}
    order = sorted(margins, key=lambda layer: -margins[layer])[:_ENOUGH_TRIALS]
    yield from (((layer,), rank) for rank in ranks for layer in order)
    best = set(order[: max(3, len(order) // 2)])
    neighbours = [pair for pair in pairwise(_single_layers(study)) if best & set(pair)]
    yield from ((pair, ranks[-1]) for pair in neighbours)


def _try(study: _Study, directions: Directions, layers: tuple[int, ...], rank: int, max_new_tokens: int) -> Trial:
    """Bake a candidate into a fresh copy of the decoder, and ask it everything."""
    graph = study.model.package.load_decoder()
    spec = replace(study.spec, layers=layers, rank=rank)
    rewrite(graph, plan_guard(graph, study.anatomy, directions, spec))
    margin = min(_layer_numbers(study, layer, rank)[1] for layer in layers)
    return Trial(layers, rank, margin, tally(study.model.with_decoder(graph), study.prompts, max_new_tokens))


def _perfect(trials: Sequence[Trial]) -> bool:
    return any(trial.harmful == 1 and trial.harmless == 0 for trial in trials)


def _allowed_refusals(base: Tally, budget: float) -> float:
    """The budget, or what the unguarded model already refuses of harmless prompts if that is more."""
    return max(budget, base.worst("harmless"))


def _winner(trials: Sequence[Trial], allowed: float) -> Trial | None:
    within = [trial for trial in trials if trial.harmless <= allowed]
    return max(within, key=lambda t: (t.harmful, -len(t.layers), -t.harmless, t.margin, -t.rank), default=None)


def _refuse(trials: Sequence[Trial], base: Tally, mode: str, budget: float) -> None:
    nearest = max(trials, key=lambda trial: trial.harmful - trial.harmless)
    raise GuardError(
        f"no layer makes mode {mode} refuse more harmful prompts within {budget:.0%} over-refusal (unguarded "
        f"{base.worst('harmful'):.0%}; nearest: layers {', '.join(map(str, nearest.layers))} refuse "
        f"{nearest.harmful:.0%} of harmful and {nearest.harmless:.0%} of harmless ones); try another mode, more anchors, "
        "or name --directions and --layers yourself"
    )


def _require_both_labels(prompts: Sequence[LabelledPrompt]) -> None:
    for setting in {prompt.setting for prompt in prompts}:
        for label in ("harmful", "harmless"):
            found = sum((p.setting, p.label) == (setting, label) for p in prompts)
            if found < 2:
                raise PromptsUnusable(
                    f"calibration needs harmful and harmless prompts in setting {setting!r}, found {found} {label}; add some"
                )


def _cells(result: Tally) -> list[dict[str, Any]]:
    return [
        {"setting": cell.setting, "label": cell.label, "refused": cell.refused, "asked": cell.asked}
        for cell in result.cells
    ]
