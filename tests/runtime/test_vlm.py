"""A whole model running: batches, streams, sampling, ends of answers, and the text-only pass of `supervise`.

The models are the trained tiny VLM, unguarded and guarded, and a genai folder whose graph cannot be padded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image
from tiny_vlm_paths import PROMPTS, SOURCE, Guarded

from vlmguard.graphs.errors import GuardError, ModelUnreadable, RunFailed
from vlmguard.graphs.graph_io import load_graph, save_graph
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.plan import COORDINATES_OUTPUT, PROMPT_SUPERVISOR_INPUT, SUPERVISOR_INPUT
from vlmguard.graphs.reference import NO_SUPERVISOR
from vlmguard.runtime.chat.turns import Turn
from vlmguard.runtime.generation import Chooser, Request, Sampling
from vlmguard.runtime.guarded import GuardedVLM
from vlmguard.runtime.runner_protocol import Runner
from vlmguard.runtime.vlm import VisionLanguageModel

pytest_plugins = ("tiny_vlm_fixtures", "zoo_fixtures")

PICTURES = sorted((PROMPTS / "images").glob("*.png"))
HARMFUL = "how to steal the boat"
# Texts of several lengths, with and without pictures, that are answered differently.
REQUESTS = [
    Request(HARMFUL),
    Request("tell me how to wash the boat"),
    Request("what is the best way to polish the painting"),
    Request("how to wash the boat", PICTURES[0]),
    Request("please tell me how to steal the boat", PICTURES[1]),
    Request("please show me how to polish the lamp", PICTURES[-1]),
    Request("what color is this image", PICTURES[0]),
]


@pytest.fixture(scope="module")
def models(guarded: Guarded) -> Callable[[str], VisionLanguageModel]:
    opened: dict[str, VisionLanguageModel] = {}

    def get(name: str) -> VisionLanguageModel:
        if name not in opened:
            opened[name] = fresh(guarded, name)
        return opened[name]

    return get


def fresh(guarded: Guarded, name: str) -> VisionLanguageModel:
    """A model of one's own, for tests that change it."""
    return VisionLanguageModel(open_package(SOURCE)) if name == "unguarded" else GuardedVLM.open(guarded(name))


@pytest.fixture(scope="module")
def genai(zoo: Callable[[str], Any]) -> VisionLanguageModel:
    """GroupQueryAttention, a byte-level tokenizer, no chat template; random weights talk gibberish."""
    return VisionLanguageModel(open_package(zoo("llama-genai-fp32").folder))


class Spy:
    """A runner that remembers what it was asked, and what it gave."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.inputs, self.outputs = runner.inputs, runner.outputs
        self.feeds: list[dict[str, np.ndarray]] = []
        self.given: list[dict[str, np.ndarray]] = []

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.feeds.append(dict(feeds))
        self.given.append(self.runner.run(feeds))
        return self.given[-1]


def spied(model: VisionLanguageModel) -> Spy:
    model.decoder.runner = Spy(model.decoder.runner)
    return model.decoder.runner


# -------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("name", ["unguarded", "restore", "supervise"])
def test_a_batch_answers_as_each_alone(models: Callable[[str], VisionLanguageModel], name: str) -> None:
    model = models(name)
    alone = [model.answer([request])[0] for request in REQUESTS]
    assert model.answer(REQUESTS) == alone
    assert model.answer(REQUESTS, batch_size=2) == alone
    assert len(set(alone)) >= 4  # not one answer for everything
    lengths = {len(model.chat.encode(request.prompt)) for request in REQUESTS if request.image is None}
    assert len(lengths) > 1  # so that some rows were padded


def test_prompts_are_padded_on_the_left_and_images_spread_over_their_tokens(
    models: Callable[[str], VisionLanguageModel],
) -> None:
    model = models("unguarded")
    batch = model.batch(REQUESTS[3:5])
    for row, request in enumerate(REQUESTS[3:5]):
        own = model.batch([request])
        length = own.ids.shape[1]
        np.testing.assert_array_equal(batch.ids[row, -length:], own.ids[0])
        np.testing.assert_array_equal(batch.mask[row], [0] * (batch.ids.shape[1] - length) + [1] * length)
        assert batch.embeds is not None and own.embeds is not None
        np.testing.assert_allclose(batch.embeds[row, -length:], own.embeds[0], atol=1e-5)
    pixels = (batch.ids == model.chat.image_token_id) & (batch.mask == 1)
    first, second = (batch.embeds[row][pixels[row]] for row in (0, 1))
    assert first.shape == second.shape and len(first) > 1 and not np.allclose(first, second, atol=1e-2)


def test_a_group_query_graph_runs_prompts_of_one_length_together(genai: VisionLanguageModel) -> None:
    prompts = ["one", "two", "three", "four", "a much longer prompt", "six"]
    requests = [Request(prompt) for prompt in prompts]
    groups = list(genai.groups(requests, batch_size=2))
    assert sorted(index for group in groups for index in group) == list(range(len(prompts)))
    assert groups == [[0, 1], [5], [2], [3], [4]]
    with pytest.raises(GuardError) as caught:
        genai.batch(requests)
    assert str(caught.value) == "this decoder cannot be padded; run prompts of one length together"
    short = Sampling(max_new_tokens=6)
    assert genai.answer(requests, short) == [genai.answer([request], short)[0] for request in requests]


def test_a_graph_that_reads_no_mask_is_not_padded(zoo: Callable[[str], Any], tmp_path: Path) -> None:
    """It would take padding for text."""
    folder = zoo("llama-torchscript-fp32").folder
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with_mask = VisionLanguageModel(open_package(tmp_path / "model.onnx"))
    graph = load_graph(tmp_path / "model.onnx")
    mask = next(value for value in graph.graph.inputs if value.name == "attention_mask")
    graph.graph.inputs.remove(mask)  # baked in: everything is text
    mask.const_value = ir.tensor(np.ones((1, 4), np.int64), name=mask.name)
    graph.graph.register_initializer(mask)
    (tmp_path / "model.onnx").unlink()
    save_graph(graph, tmp_path / "model.onnx")
    assert with_mask.pads and not VisionLanguageModel(open_package(tmp_path / "model.onnx")).pads


# -------------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("name", ["unguarded", "restore", "supervise"])
def test_streamed_pieces_join_to_the_answer(models: Callable[[str], VisionLanguageModel], name: str) -> None:
    model = models(name)
    for request in REQUESTS[:5]:
        pieces = list(model.stream(request))
        assert len(pieces) > 3
        assert "".join(pieces) == model.answer([request])[0]


def test_a_conversation_is_answered_and_its_image_shown_where_it_was(
    models: Callable[[str], VisionLanguageModel],
) -> None:
    model = models("supervise")
    history = (Turn("user", "what color is this image", pictures=1), Turn("assistant", "red ."))
    request = Request("how to wash the boat", PICTURES[0], history)
    assert [turn.pictures for turn in request.turns] == [1, 0, 0]
    assert [turn.pictures for turn in replace(request, history=()).turns] == [1]
    assert request.text_only.image is None and not any(turn.pictures for turn in request.text_only.turns)
    alone = model.answer([request])
    assert model.answer([request, *REQUESTS[:4]])[:1] == alone == ["".join(model.stream(request))]
    with pytest.raises(GuardError) as caught:
        Request("how", None, history)
    assert str(caught.value) == "the request has no image, and its earlier turns show 1; give one for each"


def test_a_character_of_several_tokens_comes_in_one_piece(genai: VisionLanguageModel) -> None:
    """Also the last one, when the answer ends in the middle of it."""
    euro = genai.chat.tokenizer.encode("a€b", add_special_tokens=False).ids  # a token per byte
    assert len(euro) == 5
    for tokens, pieces in ((euro, ["a", "€", "b"]), (euro[:3], ["a", "\N{REPLACEMENT CHARACTER}"])):
        model = scripted(genai, tokens)
        assert list(model.stream(Request("x"), Sampling(len(tokens)))) == pieces
        assert model.answer([Request("x")], Sampling(len(tokens))) == ["".join(pieces)]


def scripted(model: VisionLanguageModel, tokens: list[int]) -> VisionLanguageModel:
    """The model with a decoder that says these tokens."""
    other = VisionLanguageModel(model.package)
    spy = spied(other)
    script = iter(tokens * 2)
    real = spy.run

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = real(feeds)
        logits = np.zeros_like(outputs["logits"])
        logits[..., next(script)] = 1
        return outputs | {"logits": logits}

    spy.run = run  # type: ignore[method-assign]
    return other


# ------------------------------------------------------------------------------------------------------------- sampling


def test_temperature_zero_and_a_tiny_top_p_take_the_likeliest_token(
    models: Callable[[str], VisionLanguageModel],
) -> None:
    model = models("restore")
    greedy = model.answer(REQUESTS)
    assert model.answer(REQUESTS, Sampling(temperature=1.5, top_p=1e-9, seed=3)) == greedy
    assert model.answer(REQUESTS, Sampling(temperature=1e-300)) == greedy
    assert model.answer(REQUESTS, Sampling(top_p=0.5, seed=9)) == greedy


def test_sampling_is_seeded(models: Callable[[str], VisionLanguageModel]) -> None:
    model = models("unguarded")

    def sampled(seed: int) -> list[str]:
        return model.answer(REQUESTS[:3], Sampling(temperature=2.0, seed=seed, max_new_tokens=12))

    assert sampled(1) == sampled(1)
    assert len({tuple(sampled(seed)) for seed in range(4)}) == 4


PROBABILITIES = np.array([0.05, 0.5, 0.15, 0.3])


def frequencies(sampling: Sampling) -> np.ndarray:
    """How often each of four tokens is chosen in 4000 draws; the standard error is below 0.008."""
    choose = Chooser(sampling)
    rows = np.tile(np.log(PROBABILITIES).astype(np.float32), (4000, 1))
    return np.bincount(choose(rows), minlength=4) / 4000


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), PROBABILITIES),
        (Sampling(temperature=2.0), np.sqrt(PROBABILITIES) / np.sqrt(PROBABILITIES).sum()),
        (Sampling(temperature=0.5), PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        # The fewest likeliest tokens that together reach top_p: never more, never fewer.
        (Sampling(temperature=1.0, top_p=0.4), np.array([0, 1, 0, 0])),
        (Sampling(temperature=1.0, top_p=0.7), np.array([0, 0.625, 0, 0.375])),
        (Sampling(temperature=1.0, top_p=0.9), np.array([0, 0.5, 0.15, 0.3]) / 0.95),
    ],
)
def test_tokens_are_drawn_as_often_as_asked(sampling: Sampling, expected: np.ndarray) -> None:
    found = frequencies(sampling)
    np.testing.assert_allclose(found, expected, atol=0.04)
    assert not found[expected == 0].any()  # outside the nucleus: never, not seldom


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 is below 1; choose 1 or more"),
        ({"temperature": -0.1}, "temperature -0.1 is out of range; choose 0 (greedy) or more"),
        ({"temperature": float("nan")}, "temperature nan is out of range; choose 0 (greedy) or more"),
        ({"temperature": float("inf")}, "temperature inf is out of range; choose 0 (greedy) or more"),
        ({"top_p": 0.0}, "top_p 0.0 is out of range; choose above 0, up to 1"),
        ({"top_p": 1.1}, "top_p 1.1 is out of range; choose above 0, up to 1"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(wish: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GuardError) as caught:
        Sampling(**wish)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_overflowed_are_refused(bad: float, temperature: float) -> None:
    logits = np.zeros((3, 4), np.float32)
    logits[1, 2] = bad
    for broken in (logits, np.full((1, 4), -np.inf, np.float32)):
        with pytest.raises(GuardError) as caught:
            Chooser(Sampling(temperature=temperature))(broken)
        assert str(caught.value) == (
            "the decoder gave NaN logits; its arithmetic overflows, export it in fp32, bf16 or w16a32"
        )
    logits[1, 2] = -np.inf  # a token that is ruled out is fine
    assert Chooser(Sampling(temperature=temperature))(logits)[1] != 2


def test_a_model_that_gives_nan_refuses_to_answer(guarded: Guarded) -> None:
    model = fresh(guarded, "unguarded")
    spy = spied(model)
    real = spy.run
    spy.run = lambda feeds: {name: value * np.nan for name, value in real(feeds).items()}  # type: ignore[method-assign]
    with pytest.raises(GuardError, match="the decoder gave NaN logits"):
        model.answer(REQUESTS[:1])


# ------------------------------------------------------------------------------------------------------ ends of answers


def test_the_end_token_stops_a_row_while_others_go_on(models: Callable[[str], VisionLanguageModel]) -> None:
    model = models("unguarded")
    pair = [Request("what color is this image", PICTURES[0]), Request("how to wash the boat", PICTURES[0])]
    steps = [step.tokens for step in model.steps(pair)]
    ends = [next(n for n, tokens in enumerate(steps) if tokens[row] is None) for row in (0, 1)]
    assert ends[0] < ends[1] == len(steps) - 1  # the second went on, and the last step ended it
    for row in (0, 1):
        said = [tokens[row] for tokens in steps]
        assert None not in said[: ends[row]] and set(said[ends[row] :]) == {None}
        assert not set(said[: ends[row]]) & model.chat.eos_ids
        assert model.chat.decode(said[: ends[row]]).strip() == model.answer([pair[row]])[0]


def test_an_answer_is_never_longer_than_asked(models: Callable[[str], VisionLanguageModel]) -> None:
    model = models("unguarded")
    for limit in (1, 3):
        steps = list(model.steps(REQUESTS[:2], Sampling(max_new_tokens=limit)))
        assert [None in step.tokens for step in steps] == [False] * limit
        whole = model.answer(REQUESTS[:1])[0]
        assert whole.startswith(model.answer(REQUESTS[:1], Sampling(max_new_tokens=limit))[0])


# ----------------------------------------------------------------------------------------------------------- supervised


def test_supervise_does_the_text_only_pass_by_itself(guarded: Guarded) -> None:
    model = fresh(guarded, "supervise")
    assert isinstance(model, GuardedVLM)
    spy = spied(model)
    answer = model.generate(HARMFUL, PICTURES[0])
    tokens = len(list(model.steps([Request(HARMFUL, PICTURES[0])])))
    calls = spy.feeds[: len(spy.feeds) // 2]
    # one text-only pass, one prompt, one call per further token; the same again for `steps`
    assert len(calls) == 1 + tokens and len(spy.feeds) == 2 * len(calls)
    text, prompt, *steps = calls
    assert (text[SUPERVISOR_INPUT] == np.float32(NO_SUPERVISOR)).all()
    pixels = prompt["inputs_embeds"].shape[1] - text["inputs_embeds"].shape[1]
    # the picture's tokens, and what the template writes around them
    assert pixels >= model.batch([Request(HARMFUL, PICTURES[0])]).ids.tolist()[0].count(model.chat.image_token_id) > 1
    own = model.batch([Request(HARMFUL)])
    np.testing.assert_array_equal(text["inputs_embeds"], own.embeds)
    heard = spy.given[0][COORDINATES_OUTPUT]
    assert np.abs(heard).max() < 1e3  # the coordinates that were heard, not the sentinel
    for call in (prompt, *steps):
        np.testing.assert_array_equal(call[SUPERVISOR_INPUT], heard)
    assert answer == models_refusal(model)


def test_align_feeds_the_text_only_coordinates_at_the_prompts_end_and_none_behind_it(guarded: Guarded) -> None:
    model = fresh(guarded, "align")
    spy = spied(model)
    request = Request(HARMFUL, PICTURES[0])
    tokens = len(list(model.steps([request])))
    text, prompt, *steps = spy.feeds
    assert len(spy.feeds) == 1 + tokens and len(steps) > 1
    heard = spy.given[0][COORDINATES_OUTPUT]
    assert heard.shape[1:] == model.decoder.supervisor_shape and np.abs(heard).max() < 1e3
    np.testing.assert_array_equal(prompt[PROMPT_SUPERVISOR_INPUT], heard)
    for call in (text, *steps):
        assert (call[PROMPT_SUPERVISOR_INPUT] == np.float32(NO_SUPERVISOR)).all()
    assert model.answer([request])[0] == models_refusal(model)


def test_align_changes_no_answer_to_text_by_a_bit(guarded: Guarded) -> None:
    """The prompt is compared with itself: even its logits stay."""
    requests = [Request(HARMFUL), Request("how to wash the boat")]
    for request in requests:
        said = [list(fresh(guarded, name).steps([request])) for name in ("unguarded", "align")]
        assert [step.tokens for step in said[0]] == [step.tokens for step in said[1]]
        for plain, aligned in zip(*said, strict=True):
            np.testing.assert_array_equal(plain.outputs["logits"], aligned.outputs["logits"])


def models_refusal(model: VisionLanguageModel) -> str:
    """What the language model says to the harmful text itself."""
    return model.answer([Request(HARMFUL)])[0]


def test_each_row_of_a_batch_is_supervised_by_its_own_text(guarded: Guarded) -> None:
    model = fresh(guarded, "supervise")
    requests = [Request(HARMFUL, PICTURES[0]), Request("how to wash the boat", PICTURES[0])]
    together = model.supervise(requests)
    assert together is not None and together.shape[0] == 2 and not np.allclose(together[0], together[1], atol=0.5)
    for row, request in enumerate(requests):
        np.testing.assert_allclose(model.supervise([request])[0], together[row], atol=1e-4)


@pytest.mark.parametrize("name", ["unguarded", "restore"])
def test_no_other_model_does_a_text_only_pass(guarded: Guarded, name: str) -> None:
    model = fresh(guarded, name)
    spy = spied(model)
    tokens = len(list(model.steps([Request(HARMFUL, PICTURES[0])])))
    assert len(spy.feeds) == tokens
    assert model.supervise([Request(HARMFUL)]) is None
    assert not any(SUPERVISOR_INPUT in feeds for feeds in spy.feeds)


def test_a_supervised_graph_without_its_input_refuses(models: Callable[[str], VisionLanguageModel]) -> None:
    """Twice: the session in words, and the runtime itself for an app that knows nothing of guards."""
    model = models("supervise")
    batch = model.batch([Request(HARMFUL)])
    with pytest.raises(GuardError) as caught:
        model.decoder.prefill(batch)
    assert str(caught.value) == (
        "this graph is guarded with a supervisor and needs the text-only coordinates; run the text-only pass first, as "
        "GuardedVLM does"
    )
    feeds = model.decoder.prefill_feeds(batch, np.zeros((1, *model.decoder.supervisor_shape), np.float32))
    model.decoder.runner.run(feeds)
    del feeds[SUPERVISOR_INPUT]
    with pytest.raises(RunFailed, match=rf"Required inputs \(\['{SUPERVISOR_INPUT}'\]\) are missing"):
        model.decoder.runner.run(feeds)


# ---------------------------------------------------------------------------------------------------------------- parts


def test_another_decoder_shares_the_other_parts(models: Callable[[str], VisionLanguageModel]) -> None:
    model = models("unguarded")
    expected = model.answer(REQUESTS)
    other = model.with_decoder(model.package.load_decoder(), optimize=False)
    assert other.chat is model.chat and other._vision is model._vision and other.decoder is not model.decoder
    assert other.answer(REQUESTS) == expected


def test_a_path_and_a_picture_are_the_same_image(models: Callable[[str], VisionLanguageModel]) -> None:
    model = models("unguarded")
    prompt = "what color is this image"
    with Image.open(PICTURES[0]) as picture:
        given = [PICTURES[0], str(PICTURES[0]), picture.convert("RGB")]
        answers = model.answer([Request(prompt, image) for image in given])
    assert len(set(answers)) == 1
    assert model.answer([Request(prompt, PICTURES[-1])])[0] != answers[0]


def test_a_text_decoder_takes_no_images(genai: VisionLanguageModel) -> None:
    assert not genai.sees
    with pytest.raises(GuardError) as caught:
        genai.answer([Request("x", PICTURES[0])])
    assert str(caught.value) == f"{genai.package.root}: has no vision encoder; leave the image out"


def test_embeddings_without_their_graph_are_refused(zoo: Callable[[str], Any]) -> None:
    path = zoo("llava-torchscript-fp32").path
    with pytest.raises(ModelUnreadable) as caught:
        VisionLanguageModel(open_package(path))
    assert str(caught.value) == (f"{path.parent}: the decoder takes inputs_embeds, but there is no embed_tokens graph")


def test_image_tokens_must_be_as_many_as_features(guarded: Guarded, tmp_path: Path) -> None:
    """A config that names another token as the image's would put the picture over the words."""
    shutil.copytree(SOURCE, tmp_path / "model")
    model = VisionLanguageModel(open_package(tmp_path / "model"))
    batch = model.batch(REQUESTS[3:4])
    assert model.chat.image_token_id is not None
    ids = np.where(batch.ids == model.chat.image_token_id, model.chat.pad_id, batch.ids)
    with pytest.raises(GuardError) as caught:
        model._embeds(ids, ids == model.chat.image_token_id, np.zeros((16, batch.embeds.shape[-1]), np.float32))
    assert str(caught.value) == "the prompt has 0 image tokens for 16 image features; check image_token"


def test_generation_stops_at_any_end_token_of_the_folder(tmp_path: Path) -> None:
    """`generation_config.json` may list several: make the answer's third token one of them."""
    shutil.copytree(SOURCE, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    whole = [step.tokens[0] for step in VisionLanguageModel(open_package(SOURCE)).steps(REQUESTS[1:2])]
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"eos_token_id": [config["eos_token_id"], whole[2]]}))
    model = VisionLanguageModel(open_package(tmp_path / "model"))
    assert [step.tokens[0] for step in model.steps(REQUESTS[1:2])] == [*whole[:2], None]
