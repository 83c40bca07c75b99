"""`--mode auto`: which modes are tried, in which order, by which figures, and what is recorded of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from random_directions import random_directions
from tiny_vlm_paths import ANCHORS, CALIBRATION, CALIBRATION_SIGNS, SOURCE, Guarded

import vlmguard
from vlmguard.exporter.calibration import align_judge, align_trial
from vlmguard.exporter.calibration import choice as choice_module
from vlmguard.exporter.calibration.align_judge import AlignJudge, Counts, Figures, keeps_budget, keeps_refusals
from vlmguard.exporter.calibration.align_layers import Where, places_of_align
from vlmguard.exporter.calibration.align_rows import FirstToken, Prompts, Room
from vlmguard.exporter.calibration.align_trial import AlignTrial, Answer, Asked, Guarding, aligned_directions
from vlmguard.exporter.calibration.attempts import Attempt
from vlmguard.exporter.calibration.choice import BORDERLINE, PREFERRED, Wish, choose, why_impossible
from vlmguard.exporter.calibration.clear_refusals import ask_alone
from vlmguard.exporter.calibration.guard_config import CONFIG_NAME, read_config
from vlmguard.exporter.calibration.judged import beside_images, judged_prompts, readable_images
from vlmguard.exporter.calibration.worst_setting import worst_setting
from vlmguard.exporter.evaluation.evaluate import compare
from vlmguard.exporter.evaluation.intervals import within
from vlmguard.exporter.prompts.labelled import read_prompts
from vlmguard.exporter.proof.verify import verify
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.directions import Directions, LayerDirections, read_directions
from vlmguard.graphs.errors import GuardError, PromptsUnusable
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.manifest import read_manifest
from vlmguard.graphs.progress import ignore_progress
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.generation import Request, Sampling
from vlmguard.runtime.guarded import GuardedVLM
from vlmguard.runtime.vlm import VisionLanguageModel

pytest_plugins = ("tiny_vlm_fixtures",)

PICTURE = sorted((ANCHORS.parent / "images").glob("*.png"))[0]


# The default export of the tiny VLM


def test_the_default_export_chooses_align_and_says_why(guarded: Guarded) -> None:
    manifest = read_manifest(guarded("auto"))
    plan, choice = manifest.plan, manifest.choice
    assert choice is not None and manifest.calibration is None
    assert choice["prompts"] == "calibration.jsonl"  # a name, not a path of this machine
    assert (plan["mode"], plan["positions"], plan["layers"]) == ("align", "prompt", [2, 3, 4])
    assert choice["mode"] == "align" and choice["why"] == "it reaches the goal, and calibrates no number"
    assert [one["mode"] for one in choice["tried"]] == ["align"]
    assert [one["mode"] for one in choice["not_tried"]] == list(NAMES[1:])
    (tried,) = choice["tried"]
    kept = {one["setting"]: (one["harmful"]["kept"], one["harmful"]["unguarded"]) for one in tried["settings"]}
    assert kept == {"text": (24, 24), "blank": (12, 0), "noise": (12, 0), "image": (12, 0)}
    assert all(one["harmless"]["extra"] == 0 for one in tried["settings"])
    assert [one["picture_questions"]["asked"] for one in tried["settings"]] == [0, 4, 4, 4]
    assert "first_token_distances" not in tried  # the first place reaches the goal
    assert tried["random_directions"] == {"setting": "blank", "asked": 8, "kept": 0, "guarded": 8}
    assert "--mode auto chose align: it reaches the goal, and calibrates no number" in plan["notes"]
    assert (
        f"--mode auto did not try {', '.join(NAMES[1:])}: align reaches the goal, and calibrates fewer numbers"
        in plan["notes"]
    )
    assert len(choice["layers"]) == 6 and all(0.9 < one["auc_image"] <= 1 for one in choice["layers"][2:])


def test_the_folder_verifies_and_its_files_say_the_same(guarded: Guarded) -> None:
    folder = guarded("auto")
    assert all(check.ok for check in verify(folder, source=SOURCE).checks)
    spec = read_config(folder / CONFIG_NAME).spec
    assert (spec.mode, spec.layers, spec.rank) == ("align", (2, 3, 4), 8)
    found = read_directions(folder / "directions.safetensors")
    assert (found.mode, found.recommended_layers) == ("align", (2, 3, 4))
    refusals = read_manifest(folder).refusals
    assert refusals is not None
    names = ("unguarded", "guarded", "changed", "as_text")
    rows = {one["setting"]: tuple(one[name] for name in names) for one in refusals["settings"]}
    assert rows == {
        "text": (24, 24, None, None),
        "blank": (0, 12, 12, 12),
        "noise": (0, 12, 12, 12),
        "image": (0, 12, 12, 12),
    }


def test_prompts_that_a_mode_was_chosen_on_are_not_evaluated_on(guarded: Guarded) -> None:
    with pytest.raises(PromptsUnusable, match="were calibrated on; evaluate on held-out ones"):
        compare(SOURCE, guarded("auto"), CALIBRATION)


# What can be tried


def model_that(sees: bool = True, layout: str = "onnx-community", cache: bool = True) -> Any:
    roles = SimpleNamespace(states=["past"] if cache else [])
    return SimpleNamespace(sees=sees, package=SimpleNamespace(layout=layout, roles=roles))


def impossible(wish: Wish, model: Any = None, prompts: Any = ()) -> dict[str, str]:
    found = {mode: why_impossible(mode, wish, model or model_that(), prompts) for mode in PREFERRED}
    return {mode: why for mode, why in found.items() if why is not None}


def test_every_mode_is_possible_for_a_model_with_images() -> None:
    assert impossible(Wish(GuardSpec(), 0.01)) == {}


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (
            model_that(sees=False),
            "no image can be given to this model here, and a text alone is its own text-only prompt",
        ),
        (model_that(layout="genai"), "onnxruntime-genai feeds no text-only coordinates"),
    ],
)
def test_models_without_a_text_only_pass_are_left_to_restore(model: Any, why: str) -> None:
    assert impossible(Wish(GuardSpec(), 0.01), model) == dict.fromkeys(("align", "supervise", "combined"), why)


def test_a_decoder_without_a_cache_cannot_keep_what_align_edits() -> None:
    assert impossible(Wish(GuardSpec(), 0.01), model_that(cache=False)) == {
        "align": "the decoder has no KV cache that keeps an edit of the prompt for the answer"
    }


@pytest.mark.parametrize(
    ("wish", "left"),
    [
        (Wish(GuardSpec(alpha=1.5), 0.01), {"supervise"}),
        (Wish(GuardSpec(tau=0.5), 0.01), {"supervise", "restore", "combined"}),
        (Wish(GuardSpec(), 0.01, readout="lda"), {"restore", "combined"}),
        (Wish(GuardSpec(telemetry=True), 0.01), {"supervise", "restore", "combined"}),
        (Wish(GuardSpec(gate="prompt"), 0.01), {"restore", "combined"}),
        (Wish(GuardSpec(positions="prompt"), 0.01), {"align", "supervise"}),
        (Wish(GuardSpec(direction_of=3), 0.01), set()),
    ],
)
def test_options_leave_the_modes_that_have_them(wish: Wish, left: set[str]) -> None:
    assert set(PREFERRED) - impossible(wish).keys() == left


def test_harm_that_is_in_the_picture_alone_leaves_the_modes_that_can_see_it() -> None:
    prompts = read_prompts([CALIBRATION, CALIBRATION_SIGNS])
    count = sum(p.setting == "typographic" and p.label == "harmful" for p in prompts)
    why = f"it cannot see the harm of {count} prompts, which is in their pictures alone"
    assert impossible(Wish(GuardSpec(), 0.01), prompts=prompts) == {"align": why, "supervise": why}


# The order, and who wins


NAMES = (*PREFERRED, "restore with --gate prompt", "combined with --gate prompt")


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> dict[str, Attempt]:
    """What each mode would reach; modes that are asked are taken out."""
    found = {name: attempt(name, 0.2) for name in NAMES}

    def align(*_: Any) -> tuple[list[Attempt], list[dict[str, Any]], str]:
        return [found.pop("align")], [], "the model refuses some prompts as text"

    monkeypatch.setattr(choice_module, "_try_align", align)
    monkeypatch.setattr(choice_module, "_try_calibrated", lambda name, *_: found.pop(name))
    return found


def attempt(name: str, kept: float, usable: bool = True) -> Attempt:
    made = Directions(4, {0: LayerDirections(np.eye(1, 4, dtype=np.float32))})
    return Attempt(name, (0,), 1, kept, kept >= 0.97, usable, f"{kept:.0%} kept", directions=made)


def chosen(wish: Wish | None = None) -> Any:
    anything: Any = None
    wish = wish or Wish(GuardSpec(), 0.01)
    return choose(model_that(), anything, anything, read_prompts(CALIBRATION), wish, "set", ignore_progress)


def test_the_first_mode_that_reaches_the_goal_is_taken_and_the_rest_is_not_asked(tried: dict[str, Attempt]) -> None:
    tried["supervise"] = attempt("supervise", 0.98)
    found = chosen()
    assert found.chosen.name == "supervise" and list(tried) == list(NAMES[2:])
    assert [one.name for one in found.attempts] == ["align", "supervise"]
    assert found.left_out == dict.fromkeys(NAMES[2:], "supervise reaches the goal, and calibrates fewer numbers")


def test_without_one_the_best_is_taken_and_fewer_numbers_win_ties(tried: dict[str, Attempt]) -> None:
    tried |= {"supervise": attempt("supervise", 0.6), "restore": attempt("restore", 0.6)}
    tried["combined"] = attempt("combined", 0.9, usable=False)
    found = chosen()
    assert found.chosen.name == "supervise" and tried == {} and found.left_out == {}
    assert "--mode auto chose supervise: no mode reaches the goal of 97%, and it comes nearest" in found.notes()


def test_if_none_works_the_error_says_what_each_reached(tried: dict[str, Attempt]) -> None:
    tried |= {name: attempt(name, 0.1, usable=False) for name in NAMES}
    with pytest.raises(GuardError) as refusal:
        chosen()
    each = "; ".join(f"{name} on layers 0 at rank 1: 10% kept" for name in NAMES)
    assert str(refusal.value) == (
        f"no mode restores the refusals within 1% over-refusal ({each}); nothing was written; give more prompts "
        "(--calibration), allow more over-refusal (--budget), or name --mode, --directions and --layers"
    )


def test_a_gate_that_is_held_from_the_prompt_on_is_tried_last(tried: dict[str, Attempt]) -> None:
    """It is one state more for the runtime to carry."""
    tried["restore with --gate prompt"] = replace(attempt("restore with --gate prompt", 1.0), gate="prompt")
    found = chosen()
    assert (found.chosen.gate, list(tried)) == ("prompt", ["combined with --gate prompt"])


def test_when_the_time_is_over_the_best_so_far_is_taken(tried: dict[str, Attempt]) -> None:
    found = chosen(Wish(GuardSpec(), 0.01, seconds=-1.0))
    assert found.chosen.name == "align" and list(tried) == list(NAMES[1:])
    assert set(found.left_out.values()) == {"the -1 seconds of --calibration-seconds were over"}


def test_options_that_no_mode_has_are_an_error() -> None:
    anything: Any = None
    with pytest.raises(GuardError, match="--mode auto finds no mode for these options") as refusal:
        choose(model_that(), anything, anything, [], Wish(GuardSpec(direction_of=1), 0.01), "set", ignore_progress)
    assert "restore: --direction-of is for mode project" in str(refusal.value)


# Figures


@pytest.mark.parametrize(
    ("misses", "of", "share", "holds"),
    [(0, 0, 0.0, True), (1, 9, 0.03, False), (1, 10, 0.0, True), (2, 10, 0.03, False), (2, 100, 0.03, True)],
)
def test_a_single_exception_among_ten_shows_nothing(misses: int, of: int, share: float, holds: bool) -> None:
    assert within(misses, of, share) is holds


def figures(kept: int, extra: int, unguarded: int = 0) -> Figures:
    return Figures("blank", Counts(20, 20, unguarded, kept, kept, 0, 20), Counts(20, 0, 0, extra, 0, extra, 0))


def test_refusals_and_budget_are_judged_setting_by_setting() -> None:
    good, loses, refuses = figures(20, 0), figures(18, 0), figures(20, 4)
    assert keeps_refusals([good, refuses]) and not keeps_refusals([good, loses])
    assert keeps_budget([good, loses], 0.01) and not keeps_budget([good, refuses], 0.01)
    assert keeps_budget([refuses], 0.1) and keeps_budget([figures(20, 1)], 0.01)


def test_matched_prompts_may_be_refused_a_little_beyond_a_small_budget() -> None:
    """Two of 20: the lower bound is 1.2%."""
    borderline = figures(20, 2)
    assert Wish(GuardSpec(), 0.01).beyond_text == 0.01 and not keeps_budget([borderline], 0.01)
    assert Wish(GuardSpec(), 0.01, matched=True).beyond_text == BORDERLINE == 0.04 and keeps_budget(
        [borderline], BORDERLINE
    )
    assert Wish(GuardSpec(), 0.1, matched=True).beyond_text == 0.1


def test_no_gap_is_said_and_is_no_error(tried: dict[str, Attempt]) -> None:
    tried["align"] = replace(
        attempt("align", 1.0), figures=(replace(figures(20, 0), setting="text"), figures(20, 0, unguarded=20))
    )
    assert any(note.startswith("no gap was seen with blank: the unguarded model") for note in chosen().notes())


# Layers


def with_evidence(aucs: list[float], rows: int = 8) -> Directions:
    layers = {number: LayerDirections(np.eye(rows, 16, dtype=np.float32)) for number in range(len(aucs))}
    return Directions(16, layers, pairs=40, evidence={str(n): {"auc_held_out": auc} for n, auc in enumerate(aucs)})


def test_the_later_two_thirds_are_taken_where_they_separate() -> None:
    first = next(places_of_align(with_evidence([0.5, 0.5, 0.9, 0.9, 0.9, 0.9]), 6, GuardSpec()))
    assert first == Where((2, 3, 4), 8, "the later two thirds of the decoder without its last layer")


def test_layers_at_chance_are_left_out_at_first() -> None:
    found = list(places_of_align(with_evidence([0.9, 0.9, 0.5, 0.9, 0.9, 0.9]), 6, GuardSpec()))
    assert [(place.layers, place.rank) for place in found] == [
        ((3, 4), 8),
        ((2, 3, 4), 8),
        ((3, 4), 4),
        ((2, 3, 4, 5), 8),
    ]
    which = "the later two thirds of the decoder without its last layer"
    assert found[0].why == f"{which}, and 2, whose directions separate no held-out anchors"


def test_more_rows_are_tried_before_fewer_and_the_last_layer_at_the_end() -> None:
    found = list(places_of_align(with_evidence([0.9] * 18, rows=16), 18, GuardSpec()))
    inner = tuple(range(6, 17))
    assert [(place.layers, place.rank) for place in found] == [
        (inner, 8),
        (inner, 16),
        (inner, 4),
        (tuple(range(9, 17)), 8),
        (tuple(range(6, 18)), 8),
    ]


def test_evidence_against_all_layers_changes_nothing() -> None:
    assert next(places_of_align(with_evidence([0.5] * 6), 6, GuardSpec())).layers == (2, 3, 4)


def test_what_was_asked_is_tried_alone() -> None:
    assert list(places_of_align(with_evidence([0.5] * 6), 6, GuardSpec(layers=(1,), rank=2))) == [
        Where((1,), 2, "as requested")
    ]
    assert next(places_of_align(with_evidence([0.9] * 6, rows=3), 6, GuardSpec())).rank == 3


# Prompts


def test_judged_prompts_are_spread_and_come_with_every_image() -> None:
    model, prompts = VisionLanguageModel(open_package(SOURCE)), read_prompts(CALIBRATION)
    found = judged_prompts(prompts, model, [PICTURE], "set")
    assert [setting.name for setting in found.settings] == ["blank", "noise", "image", "calibration image"]
    assert [len(found.of_kind(kind)) for kind in ("harmful", "harmless", "picture")] == [96, 24, 4]
    for setting in found.settings:
        assert len(setting.texts) == len(setting.requests) == 64
        assert [found.texts[at].kind for at in setting.texts[-4:]] == ["picture"] * 4
        assert all(found.texts[at].prompt == r.prompt for at, r in zip(setting.texts, setting.requests, strict=True))
        assert all(request.image is not None for request in setting.requests)


def test_the_users_images_are_dealt_out_among_the_texts() -> None:
    prompts = read_prompts(CALIBRATION)
    shown = beside_images(prompts, [PICTURE])
    texts = [prompt for prompt in prompts if prompt.setting == "text"]
    assert shown[: len(prompts)] == prompts and len(shown) == len(prompts) + len(texts)
    assert {prompt.image for prompt in shown[len(prompts) :]} == {PICTURE} and beside_images(prompts, []) == prompts


def test_images_that_cannot_be_read_are_refused_before_any_work(tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    with pytest.raises(GuardError, match=str(bad)):
        vlmguard.export(SOURCE, tmp_path / "out", calibration_images=[bad])
    assert readable_images([PICTURE]) == (PICTURE.absolute(),)


# Answers


@pytest.fixture(scope="module")
def trial(guarded: Guarded) -> AlignTrial:
    model = VisionLanguageModel(open_package(SOURCE))
    anatomy = dissect(model.package.load_decoder(), model.package.expected_layers)
    found = read_directions(guarded("auto") / "directions.safetensors")
    return AlignTrial(model, anatomy, found, 8)


@pytest.fixture(scope="module")
def candidate(guarded: Guarded) -> Directions:
    return aligned_directions(read_directions(guarded("auto") / "directions.safetensors"), (2, 3, 4), 8)


def test_a_trial_answers_as_the_exported_graph_does(trial: AlignTrial, candidate: Directions, guarded: Guarded) -> None:
    exported = GuardedVLM.open(guarded("auto"))
    texts = ["please tell me how to steal the bridge", "please tell me how to wash the bridge"]
    alone = trial.begin([Request(text) for text in texts]).answer(Guarding(candidate), 8)
    begun = trial.begin([Request(text, PICTURE) for text in texts])
    right = begun.answer(Guarding(candidate, alone.coordinates), 8)
    left = begun.answer(Guarding(candidate), 8)
    unguarded = VisionLanguageModel(open_package(SOURCE))
    decode = trial.model.chat.decode
    for row, text in enumerate(texts):
        assert exported.generate(text, PICTURE, max_new_tokens=8) == decode(right.answers[row].tokens).strip()
        (said,) = unguarded.answer([Request(text, PICTURE)], Sampling(max_new_tokens=8))
        assert said == decode(left.answers[row].tokens).strip()
    assert [answer.refused for answer in right.answers] == [True, False]
    assert [answer.refused for answer in left.answers] == [False, False]


def test_prompts_that_are_run_as_a_whole_are_answered_alike(
    trial: AlignTrial, candidate: Directions, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [Request(f"please tell me how to steal the {noun}", PICTURE) for noun in ("bridge", "boat")]
    alone = trial.begin([request.text_only for request in requests]).answer(Guarding(candidate), 8)
    guard = Guarding(candidate, alone.coordinates)
    begun = trial.begin(requests)
    parts, whole = begun.answer(guard, 8), replace(begun, state=None).answer(guard, 8)
    assert begun.state is not None and parts.answers == whole.answers
    np.testing.assert_allclose(parts.first, whole.first, atol=1e-3)


def test_random_directions_bring_nothing_back(trial: AlignTrial) -> None:
    """The control of `align`: nothing is fitted to labels, so that shuffling them says nothing."""
    judge = blank_judge(trial)
    noise = aligned_directions(
        random_directions(trial.model.package.config["text_config"]["hidden_size"], [2, 3, 4], rank=8),
        (2, 3, 4),
        8,
    )
    blank = judge.judge(noise)[1]
    assert (blank.harmful.text, blank.harmful.kept) == (12, 0) and not keeps_refusals([blank])
    control = judge.control(noise)
    assert control is not None and (control.setting, control.asked, control.kept, control.fails) == (
        "blank",
        8,
        0,
        False,
    )


def test_a_few_lost_refusals_are_too_few_for_a_control(trial: AlignTrial, candidate: Directions) -> None:
    """Where the unguarded model refuses beside the image too, random directions keep the refusals as well as any others."""
    judge = blank_judge(trial)
    judge.judge(candidate)
    control = judge.control(candidate)
    assert control is not None and str(control) == "8 of 8 lost refusals restored in blank, 0 along random directions"
    for setting in judge.settings:
        rows = list(judge.references(setting))
        for row in judge.lost(setting)[3:]:
            rows[row] = replace(rows[row], refused=True)
        judge._references[setting.name] = rows
    assert judge.control(candidate) is None


def test_the_control_is_about_the_candidate_that_was_judged_last(
    trial: AlignTrial, candidate: Directions, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = blank_judge(trial)
    judge.judge(candidate)
    monkeypatch.setattr(align_judge, "keeps_budget", lambda figures, budget: len(figures) < 2)
    assert [one.setting for one in judge.judge(candidate)] == ["text", "blank"]
    assert list(judge._guarded) == ["text", "blank"]  # nothing of the first judgement is left


def test_the_first_token_shows_which_directions_follow_the_text_only_model(
    trial: AlignTrial, candidate: Directions
) -> None:
    judge = blank_judge(trial)
    width = trial.model.package.config["text_config"]["hidden_size"]
    noise = aligned_directions(random_directions(width, [2, 3, 4], rank=8), (2, 3, 4), 8)
    good, bad = judge.screen(candidate), judge.screen(noise)
    assert [one.setting for one in good] == [one.setting for one in bad] == ["blank", "noise"]
    for near, far in zip(good, bad, strict=True):
        assert near.harmful < 0.01 < 0.8 < far.harmful and near.harmless < 0.01
        assert near.total == near.harmful + near.harmless + near.pictures


def test_prompts_that_do_not_fit_into_memory_are_computed_again(trial: AlignTrial, candidate: Directions) -> None:
    kept, again = blank_judge(trial), blank_judge(trial)
    again._room = Room(0)
    assert kept.judge(candidate) == again.judge(candidate)
    assert kept._prompts["text"]._kept and not again._prompts["text"]._kept
    assert 0 <= kept._room.left < Room().left


def test_a_worst_image_is_searched_only_where_no_other_setting_has_a_gap(
    trial: AlignTrial, candidate: Directions
) -> None:
    judge = blank_judge(trial)
    assert worst_setting(judge, ignore_progress) is None
    for setting in judge.settings:
        judge._references[setting.name] = [replace(row, refused=True) for row in judge.references(setting)]
    found = worst_setting(judge, ignore_progress)
    assert found is not None and found.name == "worst soft image"
    assert found.texts == judge.judged.settings[0].texts and len({id(one.image) for one in found.requests}) == 1
    judge.add(found)
    figures = {one.setting: one for one in judge.judge(candidate)}["worst soft image"]
    assert figures.harmful.unguarded < figures.harmful.text == figures.harmful.guarded == 12


def blank_judge(trial: AlignTrial) -> AlignJudge:
    prompts = [prompt for prompt in read_prompts(CALIBRATION) if prompt.setting in ("text", "blank")]
    alone = ask_alone(trial, judged_prompts(prompts, trial.model, (), "set"), ignore_progress)
    return AlignJudge(trial, alone, 1e-4, ignore_progress)


def test_the_distance_of_two_first_tokens_is_their_total_variation() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2]))
    first = FirstToken.of(logits)
    assert first.tokens.tolist() == [0, 1, 2] and first.distance(logits) == pytest.approx(0, abs=1e-12)
    assert first.distance(logits + 7) == pytest.approx(0, abs=1e-12)  # a distribution, not its logits
    assert first.distance(np.log(np.array([0.2, 0.3, 0.5]))) == pytest.approx(0.3)
    many = np.zeros(1000)
    many[5] = 20.0
    assert len(FirstToken.of(many).tokens) == 64
    other = np.zeros(1000)
    other[7] = 20.0
    assert FirstToken.of(many).distance(other) == pytest.approx(1, abs=1e-3)


def test_a_first_token_differs_beyond_rounding_only() -> None:
    logits = np.linspace(-1, 10, 200, dtype=np.float32)
    first = FirstToken.of(logits)
    assert not first.differs(logits * (1 + 1e-6), 1e-4) and first.differs(logits + np.float32(0.01), 1e-4)


def test_refusals_that_only_the_image_caused_may_be_taken_back() -> None:
    def setting(text: int, unguarded: int, guarded: int) -> Figures:
        return Figures("blank", Counts(20, text, unguarded, guarded, guarded, 0, 20), Counts(20, 0, 0, 0, 0, 0, 0))

    assert not setting(3, 5, 3).weakened and not setting(5, 5, 4).weakened
    assert setting(5, 5, 3).weakened and setting(3, 5, 1).weakened


def test_a_model_that_refuses_nothing_as_text_has_nothing_to_bring_back(
    trial: AlignTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(align_trial, "refused", lambda answer: False)
    lengths = []
    original = AlignTrial.answer

    def counted(self: AlignTrial, begun: Any, guard: Guarding, tokens: int) -> Any:
        lengths.append(tokens)
        return original(self, begun, guard, tokens)

    monkeypatch.setattr(AlignTrial, "answer", counted)
    prompts = [prompt for prompt in read_prompts(CALIBRATION) if prompt.setting == "text"]
    with pytest.raises(PromptsUnusable) as refusal:
        ask_alone(trial, judged_prompts(prompts, trial.model, (), "set"), ignore_progress)
    assert set(lengths) == {8, 32}  # late refusals were looked for
    assert str(refusal.value) == (
        "set: the unguarded model refuses none of 48 harmful prompts as text, so there are no refusals that a guard could "
        "restore; check the model's chat template, or give harmful prompts that it refuses with --anchors or --calibration"
    )


@pytest.mark.parametrize(
    ("confidences", "judged", "asked"),
    [
        ([0.99] * 48, 12, 24),  # enough in the first part: the others are not asked
        ([0.99] * 10 + [0.6] * 38, 10, 48),  # the narrow ones are left out
        ([0.99] * 3 + [0.6] * 38 + [0.0] * 7, 8, 48),  # too few clear ones: the clearest of the others too
        ([0.6] * 5 + [0.0] * 43, 5, 48),
    ],
)
def test_the_clearest_refusals_are_judged(
    trial: AlignTrial, monkeypatch: pytest.MonkeyPatch, confidences: list[float], judged: int, asked: int
) -> None:
    prompts = [prompt for prompt in read_prompts(CALIBRATION) if prompt.setting == "text"]
    found = judged_prompts(prompts, trial.model, (), "set")
    harmful = found.of_kind("harmful")
    sure = {found.texts[at].prompt: confidence for at, confidence in zip(harmful, confidences, strict=True)}

    def answered(self: Prompts) -> Any:
        rows = [sure.get(request.prompt, 0.0) for request in self.requests]
        answers = [Answer((1,), confidence > 0) for confidence in rows]
        # of three tokens, the first has the confidence
        first = np.log(np.array([[c or 0.5, (1 - (c or 0.5)) * 0.6, (1 - (c or 0.5)) * 0.4] for c in rows]))
        done = Asked(answers, np.zeros((len(rows), 1, 1)), np.zeros((len(rows), 1, 1)), first)
        yield list(range(len(rows))), SimpleNamespace(answer=lambda guard, tokens: done)

    monkeypatch.setattr(Prompts, "batches", answered)
    alone = ask_alone(trial, found, ignore_progress)
    own = alone.judged.of_kind("harmful")
    assert (len(own), alone.asked, len(alone.references)) == (judged, asked, len(alone.judged.texts))
    kept = [alone.references[at] for at in own]
    assert all(row.refused for row in kept)
    least = min(row.first.probability for row in kept)
    assert sum(c > least + 1e-9 for c in confidences) <= judged  # no clearer one was left out
    assert all(len(setting.texts) == judged + 12 + 4 for setting in alone.judged.settings if setting.name == "blank")


def test_batches_are_as_large_as_their_caches_and_logits_allow(
    trial: AlignTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [Request("please tell me how to steal the bridge")]
    most = trial.batch_size(requests)
    monkeypatch.setattr(align_trial, "_MEMORY", 0)
    assert (most, trial.batch_size(requests)) == (24, 2)
    tokens = trial.model.batch(requests).ids.shape[1]
    session = trial.model.decoder
    vocabulary = session.runner.outputs[session.logits_output].shape[-1] or 0
    cache = sum(4 * port.shape[1] * port.shape[3] for port in session.cache_inputs.values())  # type: ignore[operator]
    rows = session.runner.outputs[session.logits_output].shape[1] or tokens
    monkeypatch.setattr(align_trial, "_MEMORY", 5 * (3 * tokens * cache + 4 * rows * vocabulary))
    assert trial.batch_size(requests) == 5
