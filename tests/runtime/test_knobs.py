"""Runtime controls in a running model: knobs per request, scores with the answer, and a gate that the prompt decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from tiny_vlm_paths import PROMPTS, SOURCE, Guarded

from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.directions import read_directions
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.manifest import read_manifest
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.reference import UNDECIDED
from vlmguard.graphs.rewrite import rewrite
from vlmguard.graphs.runtime_controls import (
    OFFSET_INPUT,
    PAST_GATE_INPUT,
    PRESENT_GATE_OUTPUT,
    SCORES_OUTPUT,
    STRENGTH_INPUT,
)
from vlmguard.graphs.spec import GuardSpec
from vlmguard.graphs.taps import tap_guard
from vlmguard.runtime.decoder import DecoderSession
from vlmguard.runtime.decoder_inputs import PromptBatch
from vlmguard.runtime.generation import GREEDY, Request, Step
from vlmguard.runtime.guarded import GuardedVLM
from vlmguard.runtime.knobs import Knobs
from vlmguard.runtime.runner_protocol import Port
from vlmguard.runtime.telemetry import scored
from vlmguard.runtime.vlm import VisionLanguageModel

pytest_plugins = ("tiny_vlm_fixtures",)

PICTURE = sorted((PROMPTS / "images").glob("*.png"))[0]
HARMFUL, HARMLESS = "how to steal the boat", "how to wash the boat"
Controlled = Callable[..., VisionLanguageModel]


@pytest.fixture(scope="module")
def unguarded() -> VisionLanguageModel:
    return VisionLanguageModel(open_package(SOURCE))


@pytest.fixture(scope="module")
def controlled(guarded: Guarded, unguarded: VisionLanguageModel) -> Controlled:
    """`controlled(knobs=True, ...)`: the tiny VLM with its calibrated directions, rewritten in memory; `taps` adds states."""
    kept: dict[tuple[Any, ...], VisionLanguageModel] = {}

    def get(mode: str = "restore", taps: bool = False, **wish: Any) -> VisionLanguageModel:
        key = (mode, taps, *sorted(wish.items()))
        if key not in kept:
            graph = unguarded.package.load_decoder()
            found = read_directions(guarded(mode) / "directions.safetensors")
            plan = plan_guard(graph, dissect(graph), found, GuardSpec(mode, **wish))  # type: ignore[arg-type]
            report = rewrite(graph, plan)
            if taps:
                tap_guard(graph, plan, report)
            kept[key] = unguarded.with_decoder(graph)
        return kept[key]

    return get


def edited(outputs: Mapping[str, np.ndarray]) -> bool:
    """Whether any guard moved the last token's state in this call."""
    pairs = [(name, name.replace("guarded", "raw")) for name in outputs if name.startswith("vlmguard.guarded.")]
    assert pairs
    return any((outputs[after][:, -1] != outputs[before][:, -1]).any() for after, before in pairs)


# ------------------------------------------------------------------------------------------------------------------ knobs


@pytest.mark.parametrize("mode", ["restore", "supervise"])
def test_strength_says_how_much_of_the_guard_an_answer_gets(
    guarded: Guarded, controlled: Controlled, unguarded: VisionLanguageModel, mode: str
) -> None:
    model, plain = controlled(mode, knobs=True), GuardedVLM.open(guarded(mode))
    requests = [Request(prompt, image) for prompt in (HARMFUL, HARMLESS) for image in (None, PICTURE)]
    assert model.answer(requests) == plain.answer(requests) == model.answer(requests, knobs=Knobs(1.0, 0.0))
    assert model.answer(requests, knobs=Knobs(0.0)) == unguarded.answer(requests) != plain.answer(requests)


def test_the_threshold_offset_opens_and_shuts_the_gates(controlled: Controlled, unguarded: VisionLanguageModel) -> None:
    model, shown = controlled(knobs=True), [Request(HARMFUL, PICTURE)]
    assert model.answer(shown, knobs=Knobs(threshold_offset=1e6)) == unguarded.answer(shown)
    harmless = [Request(HARMLESS, PICTURE)]
    assert model.answer(harmless, knobs=Knobs(threshold_offset=-1e6)) != model.answer(harmless)


@pytest.mark.parametrize("strength", [-0.5, 2.5, float("nan"), float("inf")])
def test_a_strength_that_is_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(GuardError) as caught:
        Knobs(strength)
    assert str(caught.value) == (f"strength {strength} is out of range; choose 0 (only watch) to 2, 1 is as calibrated")


@pytest.mark.parametrize("offset", [float("nan"), float("-inf"), 1e30])
def test_an_offset_that_is_no_finite_number_is_refused(offset: float) -> None:
    with pytest.raises(GuardError) as caught:
        Knobs(threshold_offset=offset)
    assert str(caught.value) == f"threshold offset {offset} is not a finite number; choose one, 0 is as calibrated"


def test_a_model_without_knobs_refuses_them(guarded: Guarded) -> None:
    vlm = GuardedVLM.open(guarded("restore"))
    for turned, name in (({"strength": 0.5}, STRENGTH_INPUT), ({"threshold_offset": 1.0}, OFFSET_INPUT)):
        for ask in (vlm.generate, lambda *a, **k: list(vlm.generate_stream(*a, **k))):
            with pytest.raises(GuardError) as caught:
                ask(HARMFUL, **turned)
            assert str(caught.value) == f"the model has no knob {name!r}; export it again with --knobs"


def test_a_mode_without_a_gate_refuses_an_offset() -> None:
    with pytest.raises(GuardError) as caught:
        Knobs(0.5, 1.0).feeds([STRENGTH_INPUT])
    assert str(caught.value) == (
        "the model has no knob 'vlmguard.threshold_offset' but vlmguard.strength, for its mode has no gate; leave it out"
    )


# -------------------------------------------------------------------------------------------------------------- telemetry


def test_an_answer_carries_its_scores(controlled: Controlled, guarded: Guarded) -> None:
    model = controlled(telemetry=True)
    plan = GuardedVLM.open(guarded("restore")).manifest.plan
    steps = list(model.steps([Request(HARMFUL, PICTURE)]))
    for prompt, is_open in ((HARMFUL, True), (HARMLESS, False)):
        answer = scored(model, plan, Request(prompt, PICTURE), GREEDY, Knobs())
        assert answer.text == model.answer([Request(prompt, PICTURE)])[0]
        assert answer.scores.shape[1] == len(answer.layers) == len(answer.thresholds)
        assert bool(answer.opened[0].all()) == is_open
    assert all(step.gate_scores is not None and step.gate_scores.dtype == np.float32 for step in steps)
    told = answer.to_json()
    assert (told["answer"], told["gate"], len(told["scores"])) == (answer.text, "token", len(answer.scores))


def test_scores_are_refused_where_none_are_told(guarded: Guarded) -> None:
    vlm = GuardedVLM.open(guarded("restore"))
    assert next(iter(vlm.steps([Request(HARMFUL)]))).gate_scores is None
    with pytest.raises(GuardError) as caught:
        vlm.generate_scored(HARMFUL)
    assert str(caught.value) == "the model does not output its gates' scores; export it again with --telemetry"


# ------------------------------------------------------------------------------------------------------------- held gates


def told(steps: Iterable[Step]) -> Iterator[np.ndarray]:
    """The first row's scores, `[layers]`, call by call."""
    for step in steps:
        assert step.gate_scores is not None
        yield step.gate_scores[0]


@pytest.mark.parametrize("gate", ["token", "prompt"])
@pytest.mark.parametrize("lowered", [False, True])
def test_decode_steps_after_a_harmful_prompt_are_guarded(
    controlled: Controlled, guarded: Guarded, gate: str, lowered: bool
) -> None:
    """Held, each of them is; asked at every token, those are whose score is above the threshold. As calibrated the gate sees
    the harm at the end of the prompt and nothing more in a refusal; `lowered` brings the threshold below its tokens."""
    model, request = controlled(taps=True, knobs=True, telemetry=True, gate=gate), Request(HARMFUL, PICTURE)
    tau = np.array([site["tau"] for site in read_manifest(guarded("restore")).plan["sites"]])
    knobs = Knobs()
    if lowered:
        knobs = Knobs(threshold_offset=min(float((row - tau).min()) for row in told(model.steps([request]))) - 1.0)
    steps = list(model.steps([request], GREEDY, knobs))
    above = [bool((row > tau + (knobs.threshold_offset or 0.0)).any()) for row in told(steps)]
    moved = [edited(step.outputs) for step in steps]
    assert len(steps) > 2 and above[0]
    if gate == "prompt":
        assert all(moved)
    else:
        assert moved == above and any(moved[1:]) == lowered


def test_a_gate_that_the_prompt_closed_stays_closed(controlled: Controlled) -> None:
    """From the second token on every score is far above its threshold: per token that opens it, held it does not."""
    for gate, opens in (("token", True), ("prompt", False)):
        model = controlled(taps=True, knobs=True, gate=gate)
        batch = model.batch([Request(HARMLESS, PICTURE)])
        outputs, state = model.decoder.prefill(batch)
        assert not edited(outputs)
        state.runtime_controls[OFFSET_INPUT] = np.array(-1e6, np.float32)
        for token in model.decoder.last_logits(outputs).argsort(axis=-1)[:, -3:].T:
            column = token[:, None]
            outputs = model.decoder.step(state, column, model.step_embeds(column))
            assert edited(outputs) == opens


def test_a_gate_that_the_prompt_opened_stays_open(controlled: Controlled) -> None:
    for gate, stays in (("token", False), ("prompt", True)):
        model = controlled(taps=True, knobs=True, gate=gate)
        outputs, state = model.decoder.prefill(model.batch([Request(HARMFUL, PICTURE)]))
        assert edited(outputs)
        state.runtime_controls[OFFSET_INPUT] = np.array(1e6, np.float32)
        column = model.decoder.last_logits(outputs).argmax(axis=-1)[:, None]
        assert edited(model.decoder.step(state, column, model.step_embeds(column))) == stays


def test_each_row_of_a_batch_holds_its_own_gate(controlled: Controlled) -> None:
    model = controlled(telemetry=True, gate="prompt")
    requests = [Request(HARMFUL, PICTURE), Request(HARMLESS, PICTURE)]
    steps = list(model.steps(requests))
    for step in steps:
        np.testing.assert_array_equal(step.outputs[PRESENT_GATE_OUTPUT].all(axis=1), [True, False])
    assert model.answer(requests) == [model.answer([request])[0] for request in requests]


def test_the_prompt_is_fed_as_undecided_and_its_decision_in_every_step(controlled: Controlled) -> None:
    model = controlled(gate="prompt")
    session, calls = model.decoder, []
    run = session.runner.run
    session.runner.run = lambda feeds: calls.append(dict(feeds)) or run(feeds)  # type: ignore[method-assign]
    try:
        steps = list(model.steps([Request(HARMFUL, PICTURE)]))
    finally:
        session.runner.run = run  # type: ignore[method-assign]
    assert (calls[0][PAST_GATE_INPUT] == UNDECIDED).all() and len(calls) == len(steps) > 2
    for call in calls[1:]:
        np.testing.assert_array_equal(call[PAST_GATE_INPUT], steps[0].outputs[PRESENT_GATE_OUTPUT])


def test_a_graph_without_its_state_does_not_run(controlled: Controlled) -> None:
    """There is no default: an app that knows nothing of it is told, and does not run a guard that nobody carries on."""
    model = controlled(gate="prompt")
    fed = model.decoder.prefill_feeds(model.batch([Request(HARMFUL)]))
    del fed[PAST_GATE_INPUT]
    with pytest.raises(GuardError, match=PAST_GATE_INPUT):
        model.decoder.runner.run(fed)


class Steps:
    """A graph that takes one token a call, and says at each call how many there were."""

    def __init__(self, length: int | None) -> None:
        cache = (None, 1, None, 2)
        self.inputs = {
            "input_ids": Port("input_ids", np.dtype(np.int64), (None, length)),
            "past.0.key": Port("past.0.key", np.dtype(np.float32), cache),
            PAST_GATE_INPUT: Port(PAST_GATE_INPUT, np.dtype(np.float32), (None, 2)),
        }
        self.outputs = {name: Port(name, np.dtype(np.float32), ()) for name in ("logits", "present.0.key")}
        self.calls: list[np.ndarray] = []

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls.append(feeds[PAST_GATE_INPUT])
        batch, length = feeds["input_ids"].shape
        cache = np.concatenate([feeds["past.0.key"], np.zeros((batch, 1, length, 2), np.float32)], axis=2)
        gate = np.full((batch, 2), len(self.calls), np.float32)
        return {"logits": np.zeros((batch, length, 3)), "present.0.key": cache, PRESENT_GATE_OUTPUT: gate}


@pytest.mark.parametrize(("length", "calls"), [(1, 3), (None, 1)], ids=["a token a call", "a prompt a call"])
def test_the_last_call_of_a_prompt_decides(length: int | None, calls: int) -> None:
    """Every part of it is undecided; from then on its decision goes in, and no later one replaces it."""
    runner = Steps(length)
    session = DecoderSession(runner)
    _, state = session.prefill(PromptBatch(np.ones((2, 3), np.int64), np.ones((2, 3), np.int64)))
    for _ in range(2):
        session.step(state, np.ones((2, 1), np.int64), None)
    assert [float(call.mean()) for call in runner.calls] == [UNDECIDED] * calls + [calls] * 2
    assert all(call.shape == (2, 2) and call.dtype == np.float32 for call in runner.calls)


def test_given_inputs_are_undecided_too() -> None:
    runner = Steps(None)
    given = {"input_ids": np.ones((2, 3), np.int64), "past.0.key": np.zeros((2, 1, 0, 2), np.float32)}
    batch = PromptBatch(given["input_ids"], given["input_ids"], given=given)
    session = DecoderSession(runner, given=True)
    session.prefill(batch)
    session.prefill(batch, runtime_controls={PAST_GATE_INPUT: np.ones((2, 2), np.float32)})
    assert [float(call.mean()) for call in runner.calls] == [UNDECIDED, 1.0]


# ------------------------------------------------------------------------------------------------------- the whole folder


def test_a_folder_with_all_runtime_controls_answers_through_the_public_api(guarded: Guarded) -> None:
    vlm, plain = GuardedVLM.open(guarded("runtime_controls")), GuardedVLM.open(guarded("restore"))
    assert vlm.generate(HARMFUL, PICTURE) == plain.generate(HARMFUL, PICTURE) == vlm.generate(HARMFUL)
    watched = vlm.generate_scored(HARMFUL, PICTURE, strength=0.0)
    assert watched.text == VisionLanguageModel(open_package(SOURCE)).answer([Request(HARMFUL, PICTURE)])[0]
    assert watched.opened.all() and watched.held  # it saw, and did nothing
    never = vlm.generate_scored(HARMFUL, PICTURE, threshold_offset=1e6)
    assert (never.text, never.opened.any()) == (watched.text, False)
    assert "".join(vlm.generate_stream(HARMFUL, PICTURE, strength=0.0)).strip() == watched.text
    assert SCORES_OUTPUT in vlm.decoder.runner.outputs
