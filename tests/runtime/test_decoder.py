"""`DecoderSession`: what it feeds a graph, call by call, and that a KV cache changes nothing but the time it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_directions import random_directions

from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.modes import MODES
from vlmguard.graphs.package import ModelPackage
from vlmguard.graphs.plan import COORDINATES_OUTPUT, PROMPT_SUPERVISOR_INPUT, SUPERVISOR_INPUT, SUPERVISOR_INPUTS
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.reference import NO_SUPERVISOR
from vlmguard.graphs.rewrite import rewrite
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.decoder import DecoderSession, open_decoder
from vlmguard.runtime.decoder_inputs import PER_LAYER, PromptBatch
from vlmguard.runtime.images.prompt_images import PromptImages
from vlmguard.runtime.runner_protocol import Port

pytest_plugins = ("zoo_fixtures",)

VOCABULARY, HEADS, SIZE = 7, 2, 4
CACHE = ("past_key_values.0.key", "past_key_values.0.value")


class FakeRunner:
    """Keeps what it is fed; gives logits of the right shape, and a cache that grew by the tokens of the call."""

    def __init__(self, *names: str, outputs: tuple[str, ...] = (), cache_shape: tuple = (None, HEADS, None, SIZE)):
        shapes = {name: cache_shape for name in names if "past" in name}
        shapes |= {"inputs_embeds": (None, None, 3), **dict.fromkeys(SUPERVISOR_INPUTS, (None, 2, 1))}
        dtypes = dict.fromkeys(("input_ids", "attention_mask", "position_ids"), np.int64)
        self.inputs = {
            name: Port(name, np.dtype(dtypes.get(name, np.float32)), shapes.get(name, (None, None))) for name in names
        }
        presents = [name.replace("past_key_values", "present") for name in names if "past" in name]
        self.outputs = {name: Port(name, np.dtype(np.float32), ()) for name in outputs or ("logits", *presents)}
        self.calls: list[dict[str, np.ndarray]] = []

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls.append(dict(feeds))
        text = feeds["input_ids"] if "input_ids" in feeds else feeds["inputs_embeds"]
        batch, length = text.shape[:2]
        given: dict[str, np.ndarray] = {"logits": np.zeros((batch, length, VOCABULARY), np.float32)}
        for name, past in feeds.items():
            if "past" in name:
                fresh = np.full((batch, HEADS, length, SIZE), len(self.calls), np.float32)
                given[name.replace("past_key_values", "present")] = np.concatenate([past, fresh], axis=2)
        return given


# Row 0 has two tokens of padding on the left.
IDS = np.array([[0, 0, 3, 4], [5, 6, 1, 2]])
MASK = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])


def embedded(ids: np.ndarray) -> np.ndarray:
    return np.repeat(ids[..., None], 3, axis=2).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- what it feeds


def test_prefill_and_steps_feed_a_cached_graph_one_token_at_a_time() -> None:
    runner = FakeRunner("input_ids", "attention_mask", "position_ids", *CACHE)
    session = DecoderSession(runner)
    _, state = session.prefill(PromptBatch(IDS, MASK))
    session.step(state, np.array([[5], [6]]), None)
    session.step(state, np.array([[1], [2]]), None)
    prefill, first, second = runner.calls
    np.testing.assert_array_equal(prefill["input_ids"], IDS)
    np.testing.assert_array_equal(prefill["attention_mask"], MASK)
    np.testing.assert_array_equal(prefill["position_ids"], [[0, 0, 0, 1], [0, 1, 2, 3]])  # padding does not count
    assert {prefill[name].shape for name in CACHE} == {(2, HEADS, 0, SIZE)}
    np.testing.assert_array_equal(first["input_ids"], [[5], [6]])
    np.testing.assert_array_equal(first["position_ids"], [[2], [4]])
    np.testing.assert_array_equal(first["attention_mask"], np.pad(MASK, ((0, 0), (0, 1)), constant_values=1))
    np.testing.assert_array_equal(second["position_ids"], [[3], [5]])
    assert second["attention_mask"].shape == (2, 6)
    for name in CACHE:  # what the call before gave, in the order in which it was given
        np.testing.assert_array_equal(second[name][0, 0, :, 0], [1, 1, 1, 1, 2])


class FakeEmbeddings:
    """Gives an embedding graph's two outputs: rows for the decoder's first layer, and a row for each of its two layers."""

    def __init__(self) -> None:
        self.inputs = {"input_ids": Port("input_ids", np.dtype(np.int64), (None, None))}
        shapes = {"inputs_embeds": (None, None, 3), PER_LAYER: (None, None, 2, 1)}
        self.outputs = {name: Port(name, np.dtype(np.float32), shape) for name, shape in shapes.items()}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids = feeds["input_ids"]
        return {"inputs_embeds": embedded(ids), PER_LAYER: np.stack([ids, -ids], -1)[..., None].astype(np.float32)}


def test_embeddings_for_each_layer_come_from_the_embedding_graph_in_every_call() -> None:
    runner = FakeRunner("inputs_embeds", "attention_mask", PER_LAYER, *CACHE)
    session = DecoderSession(runner, embed=FakeEmbeddings())
    _, state = session.prefill(PromptBatch(IDS, MASK, embedded(IDS)))
    column = np.array([[3], [4]])
    session.step(state, column, embedded(column))
    assert [call[PER_LAYER][..., 0, 0].tolist() for call in runner.calls] == [IDS.tolist(), column.tolist()]
    assert (runner.calls[0][PER_LAYER][..., 1, 0] == -IDS).all()


def test_a_grid_of_patches_says_nothing_to_a_decoder_that_counts_tokens() -> None:
    runner = FakeRunner("inputs_embeds", "attention_mask", "position_ids", *CACHE)
    images = PromptImages(positions=np.full((3, *IDS.shape), 9))
    DecoderSession(runner).prefill(PromptBatch(IDS, MASK, embedded(IDS), images))
    assert runner.calls[0]["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_a_graph_without_a_cache_gets_the_whole_sequence_again() -> None:
    runner = FakeRunner("inputs_embeds", "attention_mask", "position_ids")
    session = DecoderSession(runner)
    _, state = session.prefill(PromptBatch(IDS, MASK, embedded(IDS)))
    for tokens in (np.array([[5], [6]]), np.array([[1], [2]])):
        session.step(state, tokens, embedded(tokens))
    whole = np.concatenate([IDS, [[5, 1], [6, 2]]], axis=1)
    np.testing.assert_array_equal(runner.calls[-1]["inputs_embeds"], embedded(whole))
    np.testing.assert_array_equal(runner.calls[-1]["position_ids"], [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
    assert runner.calls[-1]["attention_mask"].shape == (2, 6)


def test_only_inputs_that_the_graph_has_are_fed() -> None:
    runner = FakeRunner("input_ids")
    DecoderSession(runner).prefill(PromptBatch(IDS, MASK))
    assert list(runner.calls[0]) == ["input_ids"]


def test_the_supervisors_coordinates_go_into_every_call() -> None:
    runner = FakeRunner("input_ids", SUPERVISOR_INPUT, *CACHE)
    session = DecoderSession(runner)
    assert session.supervised and session.supervisor_shape == (2, 1)
    heard = np.arange(4).reshape(2, 2, 1) / 4
    _, state = session.prefill(PromptBatch(IDS, MASK), heard)
    session.step(state, np.array([[5], [6]]), None)
    assert len(runner.calls) == 2
    for call in runner.calls:
        assert call[SUPERVISOR_INPUT].dtype == np.float32
        np.testing.assert_array_equal(call[SUPERVISOR_INPUT], heard)


def test_at_the_prompts_end_the_coordinates_go_into_the_prompts_call_alone() -> None:
    runner = FakeRunner("input_ids", PROMPT_SUPERVISOR_INPUT, *CACHE)
    session = DecoderSession(runner)
    assert session.supervised and session.edits_prompt_end and session.supervisor_shape == (2, 1)
    heard = np.arange(4).reshape(2, 2, 1) / 4
    _, state = session.prefill(PromptBatch(IDS, MASK), heard)
    for _ in range(2):
        session.step(state, np.array([[5], [6]]), None)
    prompt, *steps = runner.calls
    np.testing.assert_array_equal(prompt[PROMPT_SUPERVISOR_INPUT], heard)
    assert len(steps) == 2
    for call in steps:
        assert call[PROMPT_SUPERVISOR_INPUT].dtype == np.float32
        np.testing.assert_array_equal(call[PROMPT_SUPERVISOR_INPUT], np.full((2, 2, 1), NO_SUPERVISOR, np.float32))


def test_a_prompt_that_is_fed_a_token_a_call_gets_the_coordinates_with_its_last_one() -> None:
    runner = FakeRunner("input_ids", PROMPT_SUPERVISOR_INPUT, *CACHE)
    runner.inputs["input_ids"] = Port("input_ids", np.dtype(np.int64), (None, 1))
    session = DecoderSession(runner)
    assert session.one_token
    heard = np.ones((2, 2, 1))
    _, state = session.prefill(PromptBatch(IDS, MASK), heard)
    session.step(state, np.array([[5], [6]]), None)
    told = [bool((call[PROMPT_SUPERVISOR_INPUT] == 1).all()) for call in runner.calls]
    silent = [bool((call[PROMPT_SUPERVISOR_INPUT] == np.float32(NO_SUPERVISOR)).all()) for call in runner.calls]
    assert told == [False, False, False, True, False] and silent == [not one for one in told]


def test_an_edit_that_no_cache_keeps_is_refused_at_the_first_token_of_the_answer() -> None:
    session = DecoderSession(FakeRunner("input_ids", PROMPT_SUPERVISOR_INPUT))
    _, state = session.prefill(PromptBatch(IDS, MASK), np.zeros((2, 2, 1)))
    with pytest.raises(GuardError) as caught:
        session.step(state, np.array([[5], [6]]), None)
    assert str(caught.value) == (
        "this guard edits the end of the prompt, and the decoder has no KV cache that keeps the edit for the answer; export "
        "the model with a cache, or choose another mode"
    )


def test_last_logits_are_float32_at_the_last_position() -> None:
    session = DecoderSession(FakeRunner("input_ids"))
    logits = np.arange(2 * 3 * VOCABULARY).reshape(2, 3, VOCABULARY).astype(np.float16)
    found = session.last_logits({"logits": logits})
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, logits[:, 2])
    # some exporters give the last position only
    np.testing.assert_array_equal(session.last_logits({"logits": logits[:, 2]}), logits[:, 2])


def test_heads_and_their_size_come_from_the_config_where_the_graph_leaves_them_open() -> None:
    runner = FakeRunner("input_ids", *CACHE, cache_shape=(None, None, None, None))
    DecoderSession(runner, kv_heads=HEADS, head_size=SIZE).prefill(PromptBatch(IDS, MASK))
    assert runner.calls[0][CACHE[0]].shape == (2, HEADS, 0, SIZE)


# ------------------------------------------------------------------------------------------------------------- refusals


def refusal(*names: str, **options: Any) -> str:
    """The sentence with which a session on such a graph, or its first prefill, is refused."""
    with pytest.raises(GuardError) as caught:
        DecoderSession(FakeRunner(*names, **options)).prefill(PromptBatch(IDS, MASK))
    return str(caught.value)


def test_a_supervised_graph_without_its_text_only_pass_is_refused() -> None:
    assert refusal("input_ids", SUPERVISOR_INPUT) == (
        "this graph is guarded with a supervisor and needs the text-only coordinates; run the text-only pass first, as "
        "GuardedVLM does"
    )


def test_a_graph_without_text_is_refused() -> None:
    assert refusal("pixel_values", "attention_mask") == (
        "the decoder takes neither input_ids nor inputs_embeds, but pixel_values, attention_mask"
    )


def test_an_input_that_nobody_can_give_is_refused() -> None:
    assert refusal("input_ids", "cache_position") == (
        "the decoder has an unknown input 'cache_position'; export it in a standard layout, or give example "
        "inputs with --proof-inputs"
    )


def test_a_cache_that_no_output_refills_is_refused() -> None:
    assert refusal("input_ids", *CACHE, outputs=("logits", "present.1.key")) == (
        "cache input 'past_key_values.0.key' has no output to refill it among logits, present.1.key ..."
    )


def test_a_cache_of_unknown_size_is_refused() -> None:
    assert refusal("input_ids", *CACHE, cache_shape=(None, None, None, SIZE)) == (
        "cache input 'past_key_values.0.key' has shape (None, None, None, 4) and no config has the number and size of "
        "heads; put the model's config.json beside it"
    )


# ---------------------------------------------------------------------------------------------------------- real graphs


def test_cached_steps_equal_one_call_on_the_whole_sequence(zoo: Callable[[str], Any]) -> None:
    """Row 0 is padded on the left, which must not matter either: alone, it gives the same."""
    model = zoo("llava-torchscript-fp32")
    session = open_decoder(open_package(model.path))
    embeds = np.random.default_rng(0).normal(size=(2, 8, model.width)).astype(np.float32)
    mask = np.ones((2, 8), np.int64)
    mask[0, :2] = 0
    ids = np.zeros_like(mask)
    outputs, state = session.prefill(PromptBatch(ids[:, :5], mask[:, :5], embeds[:, :5]))
    rolled = [session.last_logits(outputs)]
    for step in (5, 6, 7):
        here = slice(step, step + 1)
        rolled.append(session.last_logits(session.step(state, ids[:, here], embeds[:, here])))
    whole, _ = session.prefill(PromptBatch(ids, mask, embeds))
    np.testing.assert_allclose(np.stack(rolled, axis=1), whole["logits"][:, 4:], atol=1e-4)
    alone, _ = session.prefill(PromptBatch(ids[:1, 2:], mask[:1, 2:], embeds[:1, 2:]))
    np.testing.assert_allclose(alone["logits"][0, 2:], whole["logits"][0, 4:], atol=1e-4)


def rolled_out(package: ModelPackage, spec: GuardSpec, steps: int = 6) -> tuple[np.ndarray, list[np.ndarray]]:
    """Greedy tokens of two prompts of one length through a guarded graph, and the logits that they came from."""
    graph = package.load_decoder()
    anatomy = dissect(graph)
    plan = plan_guard(graph, anatomy, random_directions(anatomy.width, [1, 2]), spec)
    rewrite(graph, plan)
    session = open_decoder(package, graph)
    ids = np.random.default_rng(3).integers(3, 250, (2, 7))
    mask = np.ones_like(ids)
    supervisor = None
    if session.supervised:
        text = PromptBatch(ids[:, 3:], mask[:, 3:])
        outputs, _ = session.prefill(text, np.full((2, *session.supervisor_shape), NO_SUPERVISOR, np.float32))
        supervisor = outputs[COORDINATES_OUTPUT]
    outputs, state = session.prefill(PromptBatch(ids, mask), supervisor)
    logits = [session.last_logits(outputs)]
    for _ in range(steps):
        logits.append(session.last_logits(session.step(state, logits[-1].argmax(axis=1)[:, None], None)))
    return state.ids[:, ids.shape[1] :], logits


@pytest.fixture(scope="module")
def cached_and_not(zoo: Callable[[str], Any]) -> tuple[ModelPackage, ModelPackage]:
    """One model, exported twice: by onnxruntime-genai's builder with a cache, and without one."""
    return tuple(open_package(Path(zoo(name).path)) for name in ("llama-genai-fp32", "llama-torchscript-fp32"))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "align"])  # `align` is refused there
def test_without_a_cache_a_graph_guarded_everywhere_says_the_same(
    cached_and_not: tuple[ModelPackage, ModelPackage], mode: str
) -> None:
    (tokens, logits), (again, expected) = (rolled_out(p, GuardSpec(mode, positions="all")) for p in cached_and_not)
    assert tokens.shape == (2, 6)
    np.testing.assert_array_equal(tokens, again)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_without_a_cache_last_is_the_last_token_of_each_call_only(
    cached_and_not: tuple[ModelPackage, ModelPackage],
) -> None:
    """The first answer token agrees. Later, a cache keeps what earlier edits did, and a whole new call does not."""
    (_, logits), (_, expected) = (rolled_out(p, GuardSpec("project", positions="last")) for p in cached_and_not)
    np.testing.assert_allclose(logits[0], expected[0], atol=1e-4)
    assert not np.allclose(logits[1], expected[1], atol=1e-2)
