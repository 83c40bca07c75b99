"""The data of a calibration and the numbers fitted to it: origin, target, readout and threshold of a layer.

Splits are nested. Prompts are split into folds by their text, so that a text is in one fold only (except texts that are harmful
with one image and harmless with another: there the image decides):

1. outer: one fold is held out from every choice; held-out results are measured on it.
2. middle: a candidate runs the prompts of a fold with numbers fitted without it.
3. inner: a threshold is fitted to scores of prompts that the readout was not fitted on; its own would be too good.

So every number here is fitted `without` some folds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ...graphs.directions import Directions, LayerDirections
from ...graphs.modes import guard_mode
from ..extraction.estimators import fit_readout
from ..prompts.labelled import LabelledPrompt
from .candidates import Candidate

FOLDS = 5
FEWEST_FOLDS = 4  # one held out, one run, one scored, one fitted on
NOTHING: frozenset[int] = frozenset()

# Where between the harmless scores and the harmful ones the gate opens, where they part.
_SHARES = {"low": 0.25, "middle": 0.5, "high": 0.75}
_BEYOND = {"mean": 0.0, "beyond": 0.5, "double": 1.0}
# Which share of the harmless prompts a gate may open for, where answers decide.
_LET_THROUGH = {"tenth": 0.1, "fifth": 0.2}


@dataclass(frozen=True)
class Study:
    """Labelled prompts with their states.

    Attributes:
        directions: an SSD for each layer that may be chosen.
        mode: the intervention.
        budget: highest share of harmless prompts that a gate may let through.
        prompts: those calibrated on.
        states, text_states: at the end of each prompt, and of its text-only version, `[prompts, layers, d]` float32.
        answer_states: at the tokens of each harmless prompt's answer, `[tokens, layers, d]` per prompt; empty for harmful.
        tau: the threshold, where it is decided already.
    """

    directions: Directions
    mode: str
    budget: float
    prompts: Sequence[LabelledPrompt]
    states: np.ndarray
    text_states: np.ndarray
    answer_states: Sequence[np.ndarray]
    tau: float | None = None
    labels: Sequence[str] | None = None
    _readouts: dict[tuple[int, str, frozenset[int]], np.ndarray] = field(default_factory=dict)

    @property
    def harmful(self) -> np.ndarray:
        """`[prompts]` bool."""
        return np.array([label == "harmful" for label in self.labels or [prompt.label for prompt in self.prompts]])

    @property
    def harmful_text(self) -> np.ndarray:
        """`[prompts]` bool: whose text shows the harm; of typographic prompts only the picture does."""
        return self.harmful & np.array([prompt.setting != "typographic" for prompt in self.prompts])

    def relabelled(self, labels: Sequence[str]) -> Study:
        """The same states under other labels: a control."""
        return replace(self, labels=labels, _readouts={})

    def redirected(self, directions: Directions) -> Study:
        """The same prompts along other directions: a control."""
        return replace(self, directions=directions)


@dataclass(frozen=True)
class Gate:
    """The gate's numbers of one layer, for any rank.

    Attributes:
        readout: `[d]` float32, `None` where the mode has none of its own.
        threshold: it opens above.
        margin: how far harmful and harmless scores stand apart, in standard deviations.
        text_threshold: it opens above it too, in the text-only coordinate (`combined`).
    """

    readout: np.ndarray | None
    threshold: float
    margin: float
    text_threshold: float | None = None


def groups_of(prompts: Sequence[LabelledPrompt]) -> list[str]:
    """Key that prompts of one fold share."""
    labels: dict[str, set[str]] = defaultdict(set)
    for prompt in prompts:
        labels[prompt.prompt].add(prompt.label)
    return [p.prompt if len(labels[p.prompt]) == 1 else f"{p.prompt}\0{p.label}\0{p.images}" for p in prompts]


def deal_into_folds(prompts: Sequence[LabelledPrompt], count: int = FOLDS) -> np.ndarray:
    """`[prompts]` int: the fold of each prompt, the same at every call. Every kind of prompt is spread over all folds."""
    groups = groups_of(prompts)
    kinds: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for group, prompt in zip(groups, prompts, strict=True):
        kinds[group].add((prompt.label, prompt.setting))
    alike: dict[tuple[tuple[str, str], ...], list[str]] = defaultdict(list)
    for group, found in kinds.items():
        alike[tuple(sorted(found))].append(group)
    random = np.random.default_rng(0)
    fold_of: dict[str, int] = {}
    dealt: dict[str, int] = defaultdict(int)  # by label: no fold is left without one of each
    for kind in sorted(alike):
        for at in random.permutation(len(alike[kind])):
            label = kind[0][0]
            fold_of[alike[kind][at]] = dealt[label] % count
            dealt[label] += 1
    return np.array([fold_of[group] for group in groups])


def fitted_directions(study: Study, folds: np.ndarray, candidate: Candidate, without: frozenset[int]) -> Directions:
    """The candidate's layers with their fitted numbers.

    Args:
        study: the data.
        folds: fold of each prompt.
        candidate: layers, rank and axis values.
        without: folds to exclude from the fit.
    """
    made = {layer: _layer_numbers(study, folds, candidate, layer, without) for layer in candidate.layers}
    return replace(
        study.directions,
        layers=made,
        mode=study.mode,
        recommended_layers=candidate.layers,
        alpha=candidate.alpha,
    )


def fit_gate(study: Study, folds: np.ndarray, candidate: Candidate, layer: int, without: frozenset[int]) -> Gate:
    """Fit readout, threshold and margin of one layer.

    Args:
        study: the data.
        folds: fold of each prompt.
        candidate: its readout and threshold rule.
        layer: number of the layer.
        without: folds to exclude from the fit.
    """
    used = ~np.isin(folds, list(without))
    readout, scores = _scores(study, folds, candidate, layer, without)
    # a gate that reads the text is fitted to the label of the text, not of its picture
    labels = study.harmful_text if guard_mode(study.mode).decides_by_text else study.harmful
    threshold, margin = threshold_between(scores[used], labels[used], study.budget, candidate.threshold, study.tau)
    if "text_shift" not in guard_mode(study.mode).numbers:
        return Gate(readout, threshold, margin)
    row = study.directions.layers[layer].ssd[0].astype(np.float64)
    texts = study.text_states[used, layer].astype(np.float64) @ row
    of_text, _ = threshold_between(texts, study.harmful_text[used], study.budget, "low")
    return Gate(readout, threshold, margin, of_text)


def threshold_between(
    scores: np.ndarray, harmful: np.ndarray, budget: float, where: str = "middle", tau: float | None = None
) -> tuple[float, float]:
    """Fit a gate's threshold.

    Args:
        scores: `[prompts]`.
        harmful: `[prompts]` bool.
        budget: largest share of harmless scores above the threshold.
        where: place between harmless and harmful scores; `tenth` and `fifth` open the gate for that share of harmless scores.
        tau: a fixed threshold, or `None`.

    Returns:
        The threshold, and the margin between both kinds of scores in standard deviations; below 0 if they overlap.
    """
    ceiling = float(np.quantile(scores[~harmful], 1 - budget))
    floor = float(np.quantile(scores[harmful], budget))
    if where in _LET_THROUGH:
        threshold = float(np.quantile(scores[~harmful], 1 - max(budget, _LET_THROUGH[where])))
    else:
        threshold = ceiling + _SHARES[where] * (floor - ceiling) if floor > ceiling else ceiling
    spread = float(scores[~harmful].std() + scores[harmful].std()) or 1.0
    return float(np.float32(threshold if tau is None else tau)), (floor - ceiling) / spread


def _layer_numbers(
    study: Study, folds: np.ndarray, candidate: Candidate, layer: int, without: frozenset[int]
) -> LayerDirections:
    used, harmful = ~np.isin(folds, list(without)), study.harmful_text
    ssd = study.directions.layers[layer].ssd[: candidate.rank]
    text = study.text_states[:, layer].astype(np.float64) @ ssd.T.astype(np.float64)
    gate = fit_gate(study, folds, candidate, layer, without)
    origin = text[used & ~harmful].mean(axis=0)
    return LayerDirections(
        ssd=ssd,
        origin=(origin if candidate.origin == "harmless" else np.zeros_like(origin)).astype(np.float32),
        target=_target(text[used & harmful], origin, candidate.target).astype(np.float32),
        readout=gate.readout,
        threshold=gate.threshold,
        text_threshold=gate.text_threshold,
    )


def _target(harmful: np.ndarray, origin: np.ndarray, where: str) -> np.ndarray:
    """The level of harmful text: its mean, or so much further from where harmless text is."""
    mean = harmful.mean(axis=0)
    return mean + _BEYOND[where] * (mean - origin)


def _scores(
    study: Study, folds: np.ndarray, candidate: Candidate, layer: int, without: frozenset[int]
) -> tuple[np.ndarray | None, np.ndarray]:
    """The readout, if the mode has one, and each prompt's score: the highest that the gate will compare for it."""
    row: np.ndarray = study.directions.layers[layer].ssd[0].astype(np.float64)
    if guard_mode(study.mode).decides_by_text:  # its gate reads the text-only query once, not the tokens of the answer
        return None, study.text_states[:, layer].astype(np.float64) @ row
    if not guard_mode(study.mode).has_readout:
        return None, _highest(study, layer, dict.fromkeys(set(folds.tolist()), row), folds)
    readouts = {
        fold: _readout(study, folds, candidate.readout, layer, without | {fold})
        for fold in set(folds.tolist()) - without
    }
    readout = _readout(study, folds, candidate.readout, layer, without).astype(np.float32)
    return readout, _highest(study, layer, readouts, folds)


def _highest(study: Study, layer: int, readouts: Mapping[int, np.ndarray], folds: np.ndarray) -> np.ndarray:
    """Per prompt: the score at its end, or the highest over the answer's tokens too where it is harmless. NaN for prompts
    of folds that have no readout."""
    found = np.full(len(study.prompts), np.nan)
    for index, (fold, harmful) in enumerate(zip(folds, study.harmful, strict=True)):
        if fold not in readouts:
            continue
        states = study.states[index, layer][None]
        if not harmful and len(study.answer_states[index]):
            states = np.concatenate([states, study.answer_states[index][:, layer]])
        found[index] = float((states.astype(np.float64) @ readouts[fold]).max())
    return found


def _readout(study: Study, folds: np.ndarray, name: str, layer: int, without: frozenset[int]) -> np.ndarray:
    """Unit readout `[d]`: harmful prompt ends against harmless prompt ends and answer tokens; fitted once, then kept."""
    key = layer, name, without
    if key not in study._readouts:
        used, harmful = ~np.isin(folds, list(without)), study.harmful
        answered = [study.answer_states[int(index)] for index in np.flatnonzero(used & ~harmful)]
        answers = [states[:, layer] for states in answered if len(states)]
        states = np.concatenate([study.states[used, layer], *answers])
        labels = np.zeros(len(states), bool)
        labels[: used.sum()] = harmful[used]
        study._readouts[key] = fit_readout(name, states, labels)
    return study._readouts[key]
