"""The calibrator: what it chooses holds, what was asked is honoured, and noise in place of labels or directions is refused."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_directions import random_directions
from tiny_vlm_paths import ANCHORS, CALIBRATION, SOURCE

from vlmguard.exporter.calibration import controls, search, trials
from vlmguard.exporter.calibration.calibrate import calibrate
from vlmguard.exporter.calibration.candidates import Candidate
from vlmguard.exporter.calibration.controls import controls_of
from vlmguard.exporter.calibration.fitting import (
    Study,
    deal_into_folds,
    fitted_directions,
    groups_of,
    threshold_between,
)
from vlmguard.exporter.calibration.ranking import hopeless, ranked
from vlmguard.exporter.calibration.results import Calibration, Trial
from vlmguard.exporter.calibration.trials import TrialModel
from vlmguard.exporter.calibration.usable_prompts import visible
from vlmguard.exporter.evaluation.evaluate import tally
from vlmguard.exporter.evaluation.metrics import Cell, Tally
from vlmguard.exporter.extraction.extract import collect_states, extract_all_layers, tapped
from vlmguard.exporter.prompts.labelled import LabelledPrompt, fingerprint, read_anchors, read_prompts
from vlmguard.graphs.anatomy import DecoderAnatomy, dissect
from vlmguard.graphs.directions import Directions, LayerDirections, directions_bytes, read_directions
from vlmguard.graphs.errors import GuardError, PromptsUnusable
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.plan import GuardPlan
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.rewrite import rewrite
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.generation import Request
from vlmguard.runtime.vlm import VisionLanguageModel

SETTINGS = ("text", "blank", "image")
REFUSAL = re.compile(
    r"no layer makes mode (\w+) refuse more harmful prompts within 1% over-refusal \(unguarded (\d+)%; nearest: layers "
    r"[\d, ]+ refuse (\d+)% of harmful and (\d+)% of harmless ones\); try another mode, more anchors, or name "
    r"--directions and --layers yourself"
)


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return VisionLanguageModel(open_package(SOURCE))


@pytest.fixture(scope="module")
def anatomy(model: VisionLanguageModel) -> DecoderAnatomy:
    return dissect(model.package.load_decoder(), model.package.expected_layers)


@pytest.fixture(scope="module")
def directions(model: VisionLanguageModel, anatomy: DecoderAnatomy) -> Directions:
    return extract_all_layers(model, anatomy, read_anchors(ANCHORS))


@pytest.fixture(scope="module")
def prompts() -> list[LabelledPrompt]:
    """A dozen of each kind: enough to calibrate on, and quick."""
    rows = read_prompts(CALIBRATION)
    return [row for s in SETTINGS for label in ("harmful", "harmless") for row in of_kind(rows, s, label)[::3][:12]]


def of_kind(rows: list[LabelledPrompt], setting: str, label: str) -> list[LabelledPrompt]:
    return [row for row in rows if (row.setting, row.label) == (setting, label)]


@pytest.fixture(scope="module")
def chosen(
    model: VisionLanguageModel, anatomy: DecoderAnatomy, directions: Directions, prompts: list[LabelledPrompt]
) -> Calibration:
    """With nothing decided beforehand."""
    return calibrate(model, anatomy, directions, prompts, GuardSpec())


# ---------------------------------------------------------------------------------------------------- what it chooses


def test_the_winner_refuses_what_the_unguarded_model_answers(
    chosen: Calibration, prompts: list[LabelledPrompt]
) -> None:
    assert chosen.base.worst("harmful") <= 0.1  # the gap that is there to be closed
    assert chosen.guarded.worst("harmful") >= 0.9 and chosen.guarded.worst("harmless") <= chosen.budget == 0.01
    assert chosen.mode == chosen.directions.mode == "restore"
    candidate = chosen.chosen.candidate
    assert chosen.directions.recommended_layers == candidate.layers == tuple(chosen.directions.layers)
    assert {layer.ssd.shape[0] for layer in chosen.directions.layers.values()} == {candidate.rank}
    assert sum(cell.asked for cell in chosen.guarded.cells) == len(prompts)


def test_the_winner_is_the_best_of_the_trials(chosen: Calibration) -> None:
    within = [trial for trial in chosen.trials if trial.complete and trial.harmless <= chosen.budget]
    assert len(chosen.trials) >= 6 and chosen.chosen in within
    assert chosen.chosen.harmful == max(trial.harmful for trial in within)
    equal = [trial for trial in within if trial.harmful == chosen.chosen.harmful]
    assert len(chosen.chosen.candidate.layers) == min(len(trial.candidate.layers) for trial in equal)


def test_the_trial_can_be_repeated_from_the_directions_file_alone(
    chosen: Calibration,
    model: VisionLanguageModel,
    anatomy: DecoderAnatomy,
    prompts: list[LabelledPrompt],
    tmp_path: Any,
) -> None:
    path = tmp_path / "d.safetensors"
    path.write_bytes(directions_bytes(chosen.directions))
    graph = model.package.load_decoder()
    rewrite(graph, plan_guard(graph, anatomy, read_directions(path), GuardSpec()))
    assert tally(model.with_decoder(graph), prompts, 32) == chosen.guarded


def test_numbers_are_means_of_text_prompts_and_a_unit_readout(
    chosen: Calibration, model: VisionLanguageModel, anatomy: DecoderAnatomy, prompts: list[LabelledPrompt]
) -> None:
    tap = tapped(model, anatomy)
    states = collect_states(tap, [Request(prompt.prompt) for prompt in prompts])
    harmful = np.array([prompt.label == "harmful" for prompt in prompts])
    (number,) = chosen.directions.layers
    layer = chosen.directions.layers[number]
    coordinates = states[:, number] @ layer.ssd.T
    np.testing.assert_allclose(layer.target, coordinates[harmful].mean(axis=0), atol=1e-3)
    np.testing.assert_allclose(layer.origin, coordinates[~harmful].mean(axis=0), atol=1e-3)
    assert (layer.target > layer.origin)[0]  # + means harmful
    assert np.linalg.norm(layer.readout) == pytest.approx(1, abs=1e-5)
    # the gate at the end of the prompts: open for the harmful ones in every setting, closed for the others
    shown = collect_states(tap, [prompt.request(model) for prompt in prompts])[:, number]
    opens = shown @ layer.readout > layer.threshold
    assert opens[harmful].mean() >= 0.95 and opens[~harmful].mean() <= 0.01


def test_what_was_measured_is_told(chosen: Calibration, prompts: list[LabelledPrompt]) -> None:
    told = chosen.to_json()
    assert (told["mode"], told["over_refusal_budget"], told["prompts"]) == ("restore", 0.01, len(prompts))
    assert told["prompt_fingerprints"] == sorted({fingerprint(prompt) for prompt in prompts})
    for key, result in (("unguarded", chosen.base), ("guarded", chosen.guarded)):
        assert told[key] == [
            {"setting": s, "label": label, "refused": sum(answers), "asked": len(answers)}
            for s in SETTINGS
            for label in ("harmful", "harmless")
            for answers in [
                [r for p, r in zip(prompts, result.refusals, strict=True) if (p.setting, p.label) == (s, label)]
            ]
        ]
    assert told["chosen"] in told["trials"] and len(told["trials"]) == len(chosen.trials)


# -------------------------------------------------------------------------------------------------- what was asked


@pytest.mark.parametrize(
    "wish",
    [
        GuardSpec(layers=(1, 3), rank=2),
        GuardSpec(layers=(2,), rank=1, tau=0.125),
        pytest.param(GuardSpec(mode="supervise", layers=(4,), rank=1, alpha=1.25), marks=pytest.mark.long),
        pytest.param(
            GuardSpec(mode="supervise", layers=(3, 4), rank=2, tau=-1.5, positions="all"), marks=pytest.mark.long
        ),
    ],
)
def test_what_is_decided_already_is_honoured(
    model: VisionLanguageModel,
    anatomy: DecoderAnatomy,
    directions: Directions,
    prompts: list[LabelledPrompt],
    wish: GuardSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Directions] = []
    planned: list[GuardPlan] = []
    ask = TrialModel.ask
    monkeypatch.setattr(TrialModel, "ask", lambda self, found, *more: asked.append(found) or ask(self, found, *more))
    monkeypatch.setattr(trials, "plan_guard", lambda *given: planned.append(plan_guard(*given)) or planned[-1])
    with contextlib.suppress(GuardError):  # whether such a wish also refuses enough is another question
        calibrate(model, anatomy, directions, prompts, wish)
    assert len(asked) >= 1 and len(planned) == len(asked) + 1  # the open graph itself, then every candidate
    for found in asked:
        assert found.mode == (wish.mode or "restore") and found.recommended_layers == wish.layers
        assert {layer.ssd.shape[0] for layer in found.layers.values()} == {wish.rank}
        assert wish.alpha is None or found.alpha == wish.alpha
        assert wish.tau is None or {layer.threshold for layer in found.layers.values()} == {wish.tau}
    for plan in planned[1:]:
        assert (plan.layers, plan.positions, plan.mode) == (wish.layers, wish.positions, wish.mode or "restore")
        for site in plan.sites:
            assert site.guard.rank == wish.rank
            assert wish.alpha is None or site.guard.alpha == wish.alpha
            assert wish.tau is None or site.guard.threshold == wish.tau


def test_a_threshold_that_never_opens_is_no_guard(
    model: VisionLanguageModel, anatomy: DecoderAnatomy, directions: Directions, prompts: list[LabelledPrompt]
) -> None:
    with pytest.raises(GuardError) as caught:
        calibrate(model, anatomy, directions, prompts, GuardSpec(layers=(2,), rank=1, tau=1e6))
    assert REFUSAL.fullmatch(str(caught.value))


def test_those_who_watch_are_told(
    model: VisionLanguageModel, anatomy: DecoderAnatomy, directions: Directions, prompts: list[LabelledPrompt]
) -> None:
    told: list[tuple[str, int, int]] = []
    spec = GuardSpec(layers=(2,), rank=1)
    calibrate(model, anatomy, directions, prompts, spec, report_progress=lambda *event: told.append(event))
    assert ("reading states", len(prompts), len(prompts)) in told
    assert [event for event in told if event[0] == "calibrating"] == [("calibrating", 0, 1), ("calibrating", 1, 1)]


# ------------------------------------------------------------------------------------------------------------ controls


@pytest.mark.parametrize("seed", [0, 1])
def test_random_labels_cannot_meet_the_bar(
    model: VisionLanguageModel,
    anatomy: DecoderAnatomy,
    directions: Directions,
    prompts: list[LabelledPrompt],
    seed: int,
) -> None:
    """A readout in 128 dimensions separates any labels of 72 prompts it was fitted on; the threshold is from the others."""
    labels = np.array([prompt.label for prompt in prompts])
    np.random.default_rng(seed).shuffle(labels)
    shuffled = [replace(prompt, label=label) for prompt, label in zip(prompts, labels, strict=True)]
    with pytest.raises(GuardError) as caught:
        calibrate(model, anatomy, directions, shuffled, GuardSpec(layers=(2,), rank=1))
    assert REFUSAL.fullmatch(str(caught.value))


@pytest.mark.parametrize("mode", ["restore", "supervise"])
def test_random_directions_cannot_meet_the_bar(
    model: VisionLanguageModel, anatomy: DecoderAnatomy, prompts: list[LabelledPrompt], mode: Any
) -> None:
    """The gate of `restore` may still be right; what is written along a random direction is no refusal."""
    noise = random_directions(anatomy.width, range(anatomy.layer_count), rank=1, calibrated=False)
    with pytest.raises(GuardError) as caught:
        calibrate(model, anatomy, noise, prompts, GuardSpec(mode=mode, rank=1, layers=(2, 3)))
    said = REFUSAL.fullmatch(str(caught.value))
    assert said is not None and said[1] == mode
    assert int(said[3]) <= int(said[2]) + 10  # no better than the unguarded model, or hardly


def test_a_guard_that_refuses_no_more_than_the_model_itself_is_refused(
    model: VisionLanguageModel, anatomy: DecoderAnatomy, directions: Directions, prompts: list[LabelledPrompt]
) -> None:
    """On text the tiny VLM refuses everything harmful already: nothing there can show that a guard works."""
    text = [prompt for prompt in prompts if prompt.setting == "text"]
    with pytest.raises(GuardError) as caught:
        calibrate(model, anatomy, directions, text, GuardSpec(layers=(2,), rank=1))
    assert str(caught.value) == (
        f"the unguarded model refuses every harmful prompt (text {len(text) // 2}), so nothing can show "
        "whether a guard helps; calibrate with images on the whole model, whose directions.safetensors serves this decoder too "
        "(--directions and --force), or name --directions and --layers yourself"
    )


def test_the_controls_of_the_winner_fail_and_are_told(chosen: Calibration) -> None:
    held = chosen.held_out
    assert [control.name for control in held.controls] == ["random directions", "shuffled labels"]
    assert held.guarded.worst("harmful") > held.base.worst("harmful")
    for control in held.controls:
        reached = control.tally.worst("harmful") >= held.guarded.worst("harmful")
        assert not reached or control.tally.worst("harmless") > chosen.budget
    told = chosen.to_json()["held_out"]["controls"]
    assert [control["control"] for control in told] == ["random directions", "shuffled labels"]
    assert all(
        {"harmful_refused_worst_setting", "harmless_refused_worst_setting"} <= control.keys() for control in told
    )


def test_a_control_that_reaches_the_result_is_an_error(
    model: VisionLanguageModel,
    anatomy: DecoderAnatomy,
    directions: Directions,
    prompts: list[LabelledPrompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Were random rows or labels as good as the real ones: here they are the real ones."""
    monkeypatch.setattr(search, "controls_of", lambda study, candidate, groups: [("noise", study)])
    monkeypatch.setattr(controls, "ENOUGH_HELD_OUT", 2)
    with pytest.raises(GuardError) as caught:
        calibrate(model, anatomy, directions, prompts, GuardSpec(layers=(2,), rank=1))
    assert re.fullmatch(
        r"the control with noise refuses (\d+)% of the held-out harmful prompts in its worst setting, the chosen guard "
        r"\1%: the choice means nothing; calibrate on more prompts, in settings where the unguarded model answers",
        str(caught.value),
    )


def test_random_rows_and_shuffled_labels_are_what_they_say(chosen: Calibration, directions: Directions) -> None:
    study, groups = made_up_study(chosen, directions), groups_of(chosen.prompts)
    candidate = chosen.chosen.candidate
    (_, random), (_, shuffled) = controls_of(study, candidate, groups)
    for layer in candidate.layers:
        rows = random.directions.layers[layer].ssd
        assert rows.shape == (candidate.rank, directions.width)
        assert np.abs(rows @ directions.layers[layer].ssd.T).max() < 0.5
    assert sorted(study.harmful) == sorted(study.harmful) and (shuffled.harmful != study.harmful).any()
    per_text = {(group, bad) for group, bad in zip(groups, shuffled.harmful, strict=True)}
    assert len(per_text) == len(set(groups))  # a text keeps one label in every setting


# -------------------------------------------------------------------------------------------------------- nested splits


def made_up_study(chosen: Calibration, directions: Directions) -> Study:
    """The prompts with states that mean nothing but differ by label."""
    random = np.random.default_rng(0)
    count = len(chosen.prompts)
    states = random.normal(size=(count, 6, directions.width)).astype(np.float32)
    harmful = np.array([prompt.label == "harmful" for prompt in chosen.prompts])
    states[harmful] += 1
    answers = [np.zeros((0, 6, directions.width), np.float32) if bad else states[:2] * 0.5 for bad in harmful]
    return Study(directions, "restore", 0.01, chosen.prompts, states, states, answers)


def test_no_text_lies_in_two_folds(prompts: list[LabelledPrompt]) -> None:
    folds = deal_into_folds(prompts)
    assert set(folds) == set(range(5))
    fold_of = {(prompt.prompt, fold) for prompt, fold in zip(prompts, folds, strict=True)}
    assert len(fold_of) == len({prompt.prompt for prompt in prompts})
    for fold in range(5):
        kinds = {(p.setting, p.label) for p, f in zip(prompts, folds, strict=True) if f == fold}
        assert {label for _, label in kinds} == {"harmful", "harmless"} and len(kinds) >= 5
    assert (deal_into_folds(prompts) == folds).all()


def test_where_the_image_decides_the_image_is_what_is_dealt(tmp_path: Path) -> None:
    """The same innocent text with harmful and with harmless pictures: one group would be one fold, and both its labels."""
    pictures = [tmp_path / f"{number}.png" for number in range(10)]
    rows = [
        LabelledPrompt(str(n), "what should I do with this", "harmful" if n % 2 else "harmless", "image", picture)
        for n, picture in enumerate(pictures)
    ]
    assert len(set(groups_of(rows))) == 10
    folds = deal_into_folds(rows)
    assert all({rows[i].label for i in np.flatnonzero(folds == fold)} == {"harmful", "harmless"} for fold in range(5))


def typographic(label: Any, *pictures: Path) -> list[LabelledPrompt]:
    return [LabelledPrompt(f"t{n}", "how to do this", label, "typographic", p) for n, p in enumerate(pictures)]


def test_a_supervisor_is_not_asked_to_see_harm_that_is_only_in_the_picture(tmp_path: Path) -> None:
    """Its harmless texts stay among the prompts: they are what it has to let pass."""
    text = [LabelledPrompt("a", "steal it", "harmful", "text"), LabelledPrompt("b", "wash it", "harmless", "text")]
    bad, good = typographic("harmful", tmp_path / "0.png"), typographic("harmless", tmp_path / "1.png")
    assert visible([*text, *bad, *good], "supervise") == [*text, *good]
    assert visible([*text, *bad, *good], "restore") == [*text, *bad, *good]


def test_the_level_of_harmful_text_is_not_taken_from_innocent_texts(tmp_path: Path) -> None:
    """Typographic prompts are harmful, and count as such for the readout; their texts are not, and stay out of the target."""
    text = [LabelledPrompt(str(n), f"{n} it", "harmful" if n % 2 else "harmless", "text") for n in range(12)]
    shown = [
        *typographic("harmful", *(tmp_path / f"{n}.png" for n in range(6))),
        *typographic("harmless", *(tmp_path / f"{n}.png" for n in range(6, 12))),
    ]
    rows = [*text, *shown]
    harmful = np.array([row.label == "harmful" for row in rows])
    states = np.random.default_rng(0).normal(size=(len(rows), 1, 8)).astype(np.float32)
    text_states = np.array([[[float(row.harmful_as_text), *np.zeros(7)]] for row in rows], np.float32)
    directions = random_directions(8, [0])
    directions = replace(directions, layers={0: LayerDirections(np.eye(1, 8, dtype=np.float32))})
    study = Study(directions, "restore", 0.01, rows, states, text_states, [np.zeros((0, 1, 8), np.float32)] * len(rows))
    assert (study.harmful == harmful).all() and study.harmful_text.sum() == 6
    numbers = fitted_directions(study, deal_into_folds(rows), Candidate((0,), 1), frozenset()).layers[0]
    assert (numbers.target, numbers.origin) == (1.0, 0.0)


def test_calibration_needs_texts_that_are_harmful(
    model: VisionLanguageModel, anatomy: DecoderAnatomy, directions: Directions, tmp_path: Path
) -> None:
    rows = [
        *typographic("harmful", *(tmp_path / f"{n}.png" for n in range(6))),
        *typographic("harmless", *(tmp_path / f"{n}.png" for n in range(6, 12))),
    ]
    with pytest.raises(PromptsUnusable) as caught:
        calibrate(model, anatomy, directions, rows, GuardSpec())
    assert str(caught.value) == (
        "calibration needs at least 4 different prompts whose text is harmful, found 0; add some"
    )


@pytest.mark.parametrize("mode", ["restore", "supervise", "steer"])
def test_numbers_do_not_see_the_folds_that_they_are_fitted_without(
    chosen: Calibration, directions: Directions, mode: str
) -> None:
    """Whatever the prompts left out look like; and those that are not left out count."""
    study = replace(made_up_study(chosen, directions), mode=mode)
    folds, candidate = deal_into_folds(chosen.prompts), Candidate((2,), 2)
    left_out, kept = np.isin(folds, [1, 3]), np.isin(folds, [0])
    before = fitted_directions(study, folds, candidate, frozenset({1, 3})).layers[2]
    for changed, equal in ((left_out, True), (kept, False)):
        states = study.states.copy()
        states[changed] += 100 * np.random.default_rng(1).normal(size=states[changed].shape).astype(np.float32)
        other = replace(study, states=states, text_states=states, _readouts={})
        after = fitted_directions(other, folds, candidate, frozenset({1, 3})).layers[2]
        for name in ("origin", "target", "readout"):
            a, b = getattr(before, name), getattr(after, name)
            assert a is None if b is None else np.array_equal(a, b) == equal
        assert (before.threshold == after.threshold) == equal


# ------------------------------------------------------------------------------------------------------------ one graph


def test_the_graph_of_the_trials_is_opened_once_and_is_neutral_by_itself(
    model: VisionLanguageModel,
    anatomy: DecoderAnatomy,
    directions: Directions,
    prompts: list[LabelledPrompt],
    chosen: Calibration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[GuardPlan] = []
    monkeypatch.setattr(trials, "rewrite", lambda graph, plan: made.append(plan) or rewrite(graph, plan))
    spec = GuardSpec(mode="restore")
    trial_model = TrialModel(model, anatomy, directions, spec, tuple(directions.layers), rank=4)
    assert trial_model.ask(None, prompts, 32) == chosen.base
    assert trial_model.ask(chosen.directions, prompts, 32) == chosen.guarded
    assert trial_model.ask(None, prompts, 32) == chosen.base  # nothing stays behind
    assert [plan.layers for plan in made] == [tuple(directions.layers)]


def test_a_readout_that_was_asked_for_is_taken(
    model: VisionLanguageModel,
    anatomy: DecoderAnatomy,
    directions: Directions,
    prompts: list[LabelledPrompt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[Candidate] = []
    real = search.Search._try
    monkeypatch.setattr(search.Search, "_try", lambda self, one: tried.append(one) or real(self, one))
    with contextlib.suppress(GuardError):
        calibrate(model, anatomy, directions, prompts, GuardSpec(layers=(2,), rank=1), readout="mean")
    assert {candidate.readout for candidate in tried} == {"mean"}


def test_an_unknown_readout_lists_the_known_ones(
    model: VisionLanguageModel, anatomy: DecoderAnatomy, directions: Directions
) -> None:
    with pytest.raises(GuardError) as caught:
        calibrate(model, anatomy, directions, [], GuardSpec(), readout="svm")
    assert str(caught.value) == "readout 'svm' is unknown; choose one of lda, logistic, mean"


# -------------------------------------------------------------------------------------------------------------- budget


def trial(name: int, *rates: tuple[str, str, int], layers: int = 1) -> Trial:
    """Rates are refusals of a hundred."""
    cells = tuple(Cell(setting, label, refused, 100) for setting, label, refused in rates)
    return Trial(Candidate(tuple(range(name, name + layers)), 1), 0.0, 0.0, Tally(cells, (), ()))


TEXT_BASE = Tally((Cell("text", "harmful", 50, 100), Cell("text", "harmless", 0, 100)), (), ())
BASE = trial(
    0, ("text", "harmful", 100), ("text", "harmless", 20), ("image", "harmful", 5), ("image", "harmless", 0)
).tally


def test_the_budget_counts_in_every_setting_by_itself() -> None:
    """20% that the model refuses of harmless text anyway are no licence to refuse 20% of harmless images."""
    greedy = trial(
        1, ("text", "harmful", 100), ("text", "harmless", 20), ("image", "harmful", 99), ("image", "harmless", 20)
    )
    modest = trial(
        2, ("text", "harmful", 100), ("text", "harmless", 20), ("image", "harmful", 60), ("image", "harmless", 1)
    )
    assert ranked([greedy, modest], BASE, 0.01) == [modest]
    assert ranked([greedy, modest], BASE, 0.2) == [greedy, modest]
    assert ranked([greedy], BASE, 0.01) == []


def test_no_setting_may_lose_refusals() -> None:
    """However many are won in another one."""
    losing = trial(
        1, ("text", "harmful", 99), ("text", "harmless", 0), ("image", "harmful", 99), ("image", "harmless", 0)
    )
    assert ranked([losing], BASE, 0.5) == []


def test_a_trial_stops_only_where_it_cannot_win() -> None:
    """Asked half of each kind: what is left decides, or cannot."""

    def half(*refused: int) -> Tally:
        kinds = [(setting, label) for setting in ("text", "image") for label in ("harmful", "harmless")]
        return Tally(tuple(Cell(*kind, n, 50) for kind, n in zip(kinds, refused, strict=True)), (), ())

    leader = trial(
        1, ("text", "harmful", 100), ("text", "harmless", 0), ("image", "harmful", 90), ("image", "harmless", 0)
    )
    assert not hopeless(half(50, 20, 40, 1), BASE, 0.01, leader)  # 90 of 100 are still within reach
    assert hopeless(half(50, 20, 39, 1), BASE, 0.01, leader)
    assert not hopeless(half(50, 20, 39, 1), BASE, 0.01, None)
    # over the budget, and over what the model refuses anyway: by its count behind a leader, by its interval without one
    assert hopeless(half(50, 21, 50, 0), BASE, 0.01, leader) and not hopeless(half(50, 21, 50, 0), BASE, 0.01, None)
    assert hopeless(half(50, 35, 50, 0), BASE, 0.01, None)
    assert hopeless(half(49, 0, 50, 0), BASE, 0.01, None)  # a refusal of harmful text is lost


def test_more_refusals_first_then_fewer_layers() -> None:
    def offered(name: int, harmful: int, layers: int) -> Trial:
        return trial(name, ("text", "harmful", harmful), ("text", "harmless", 0), layers=layers)

    weak, strong, broad = offered(1, 80, 1), offered(2, 90, 2), offered(3, 90, 3)
    assert ranked([weak, broad, strong], TEXT_BASE, 0.01) == [strong, broad, weak]


@pytest.mark.parametrize("budget", [-0.1, 1.0, float("nan")])
def test_a_budget_out_of_range_is_refused(
    model: VisionLanguageModel, anatomy: DecoderAnatomy, directions: Directions, budget: float
) -> None:
    with pytest.raises(GuardError) as caught:
        calibrate(model, anatomy, directions, [], GuardSpec(), budget=budget)
    assert str(caught.value) == f"an over-refusal budget of {budget} is out of range; choose 0 or more, below 1"


@pytest.mark.parametrize("budget", [0.0, 0.05, 0.3])
def test_the_threshold_lets_no_more_than_the_budget_through(budget: float) -> None:
    random = np.random.default_rng(1)
    harmful = np.arange(400) % 2 == 0
    mixed = random.normal(size=400) + harmful
    threshold, margin = threshold_between(mixed, harmful, budget)
    let_through = (mixed[~harmful] > threshold).mean()
    assert budget - 0.01 <= let_through <= budget  # nor much less: that would cost refusals of harmful ones
    assert margin < 0
    apart = random.uniform(size=400) + 10 * harmful
    threshold, margin = threshold_between(apart, harmful, 0.0)
    assert apart[~harmful].max() < threshold < apart[harmful].min() and margin > 1
    assert threshold == pytest.approx((apart[~harmful].max() + apart[harmful].min()) / 2, abs=1e-4)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_prompts_that_cannot_calibrate_are_refused(
    model: VisionLanguageModel, anatomy: DecoderAnatomy, directions: Directions, prompts: list[LabelledPrompt]
) -> None:
    harmful_images = of_kind(prompts, "image", "harmful")
    others = [prompt for prompt in prompts if prompt.setting != "image"]
    one = of_kind(prompts, "image", "harmless")[:1]
    for rows, found in ((others + harmful_images, 0), (others + harmful_images + one, 1)):
        with pytest.raises(PromptsUnusable) as caught:
            calibrate(model, anatomy, directions, rows, GuardSpec())
        assert str(caught.value) == (
            f"calibration needs harmful and harmless prompts in setting 'image', found {found} harmless; add some"
        )
    same = [replace(prompt, prompt="wash it") if prompt.label == "harmless" else prompt for prompt in prompts]
    with pytest.raises(PromptsUnusable) as caught:
        calibrate(model, anatomy, directions, same, GuardSpec())
    assert str(caught.value) == "calibration needs different harmless prompts, but all are 'wash it'; add some"
    texts = sorted({prompt.prompt for prompt in prompts if prompt.label == "harmless"})
    three = [replace(p, prompt=texts[n % 3]) if p.label == "harmless" else p for n, p in enumerate(prompts)]
    with pytest.raises(PromptsUnusable) as caught:
        calibrate(model, anatomy, directions, three, GuardSpec())
    assert str(caught.value) == "calibration needs at least 4 different harmless prompts, found 3; add some"
    with pytest.raises(PromptsUnusable) as caught:
        calibrate(model, anatomy, directions, [], GuardSpec())
    assert str(caught.value) == ("the model takes text only, and no calibration prompt is text only; add such prompts")
