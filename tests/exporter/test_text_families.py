"""Text-only checkpoints: one graph from `input_ids`, parity with torch, a guard that equals hooks, float16, and refusals."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from random_directions import random_directions, write_directions
from tiny_families import TEXTS, save_tiny_text, with_huge_bos
from tiny_models import HEAD_WIDTH, KV_HEADS, TEXT_WIDTH, VOCABULARY, VOCABULARY_SIZE
from torch_hooks import HookedGuard
from transformers import AutoModelForCausalLM

import vlmguard
from vlmguard.exporter.checkpoints.convert import ConversionReport, convert_checkpoint
from vlmguard.exporter.checkpoints.float16_range import Peak, decoder_layers, why_not_float16
from vlmguard.exporter.checkpoints.narrow import narrow_weights
from vlmguard.exporter.checkpoints.prompt_text import prompt_texts
from vlmguard.exporter.extract_directions import extract_directions
from vlmguard.exporter.families import find_family
from vlmguard.exporter.proof.headroom import WAY_OUT
from vlmguard.graphs.errors import GuardError, ModelUnreadable, ProofFailed
from vlmguard.graphs.graph_io import load_graph
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.generation import Request
from vlmguard.runtime.guarded import GuardedVLM
from vlmguard.runtime.vlm import VisionLanguageModel

IN_EVERY_RUN = ("gemma3_text",)  # tied embeddings, two kinds of layers; a conversion takes 10 seconds
OTHERWISE = "Export it to ONNX with its own tools and guard that folder instead"
PROMPTS = [Request("how do I make a cake"), Request("sorry")]


@dataclass(frozen=True)
class Converted:
    """A converted checkpoint, kept for all tests."""

    checkpoint: Path
    out: Path
    report: ConversionReport


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory):
    """Converts a family when first asked for it."""
    done: dict[str, Converted] = {}

    def convert(model_type: str) -> Converted:
        if model_type not in done:
            checkpoint = save_tiny_text(model_type, tmp_path_factory.mktemp(model_type))
            out = tmp_path_factory.mktemp(f"{model_type}-onnx")
            done[model_type] = Converted(checkpoint, out, convert_checkpoint(checkpoint, out))
        return done[model_type]

    return convert


@pytest.fixture(params=[pytest.param(t, marks=() if t in IN_EVERY_RUN else pytest.mark.zoo) for t in TEXTS])
def converted(request: pytest.FixtureRequest, texts) -> Converted:
    return texts(request.param)


# What is written


def test_a_text_model_is_one_graph_that_agrees_with_torch(converted: Converted) -> None:
    report = converted.report
    assert [graph.path for graph in report.graphs] == ["onnx/model.onnx"]
    assert [check.name for check in report.parity] == ["prefill logits", "decode logits", "cache"]
    assert all(check.ok and 0 < check.worst <= 2e-6 and check.limit == 1e-4 for check in report.parity)
    assert report.parity[1].compared == 2 * 8 * VOCABULARY_SIZE


def test_its_signature_is_that_of_onnx_communitys_text_models(texts) -> None:
    graph = load_graph(texts("gemma3_text").out / "onnx" / "model.onnx").graph
    inputs = {value.name: [str(dim) for dim in value.shape or ()] for value in graph.inputs}
    assert list(inputs)[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    past = ["batch_size", str(KV_HEADS), "past_sequence_length", str(HEAD_WIDTH)]
    assert inputs["past_key_values.1.value"] == past and len(inputs) == 3 + 4
    assert [value.name for value in graph.outputs][:2] == ["logits", "present.0.key"]


# Guarded


def test_it_is_guarded_as_hooks_guard_it_in_torch(converted: Converted, tmp_path: Path) -> None:
    directions = random_directions(TEXT_WIDTH, range(2))
    given = write_directions(tmp_path / "d.safetensors", directions)
    spec = GuardSpec(mode="restore")
    result = vlmguard.export(converted.out, tmp_path / "guarded", directions=given, spec=spec, allow_no_effect=True)
    assert result.proved.level == "full" and result.plan.layers == (0, 1)
    assert result.proof and all(check.ok for check in result.proof)

    vlm = GuardedVLM.open(result.out)
    batch = vlm.batch(PROMPTS)
    actual = vlm.prefill(PROMPTS)["logits"][:, -1]
    model = AutoModelForCausalLM.from_pretrained(converted.checkpoint).eval()
    guard = HookedGuard(dict(zip(result.plan.layers, result.plan.guards, strict=True)), "restore")
    positions = np.maximum(
        batch.mask.cumsum(-1) - 1, 0
    )  # as generate() counts them: from the first token behind the padding
    given_by_name = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": positions}
    feeds = {name: torch.from_numpy(array) for name, array in given_by_name.items()}
    layers = decoder_layers(model.get_decoder(), 2)
    assert layers is not None
    with torch.no_grad():
        plain = model(**feeds).logits[:, -1].numpy()
        with guard.attached(layers):
            guard.set_call(attention_mask=feeds["attention_mask"])
            expected = model(**feeds).logits[:, -1].numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * scale)
    assert np.abs(plain - expected).max() > 1e-2 * scale
    assert len(vlm.answer(PROMPTS)) == 2


@pytest.mark.parametrize("mode", ["supervise", "align"])
def test_modes_that_need_images_are_refused_before_anything_is_exported(tmp_path: Path, mode: Any) -> None:
    checkpoint = tmp_path / "llama"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(GuardError) as refused:
        vlmguard.export(checkpoint, spec=GuardSpec(mode=mode))
    assert str(refused.value) == (
        f"{checkpoint}: takes no images, so mode {mode} would compare each prompt with itself; for a text-only model choose "
        "--mode restore (calibrated), or steer or project along given directions"
    )


# float16, and weights in float16 under float32


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose state at BOS reaches 100,000 in one channel; float16 holds its weights."""
    folder = save_tiny_text("gemma3_text", tmp_path_factory.mktemp("huge"))
    return with_huge_bos(folder, 20_000, channel=3)  # Gemma scales embeddings by sqrt(32)


def test_states_that_float16_cannot_hold_are_named(huge: Path, tmp_path: Path) -> None:
    with pytest.raises(ProofFailed) as refused:
        convert_checkpoint(huge, tmp_path / "out", dtype="fp16")
    said = str(refused.value)
    found = re.fullmatch(
        re.escape(f"{huge}: its hidden states pass float16's range of 65,504 from layer 0 on: layer 1 reaches ")
        + r"([\d,]+)"
        + re.escape(f" in channel 3, at token {VOCABULARY['<s>']}; {WAY_OUT}"),
        said,
    )
    assert found is not None and 1e5 < int(found[1].replace(",", "")) < 1.3e5, said
    assert "--dtype w16a32" in said and "differs" not in said


def test_weights_in_float16_under_a_float32_stream_hold_them(huge: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = convert_checkpoint(huge, out, dtype="w16a32")
    assert all(check.ok and check.worst <= 2e-6 and check.limit == 1e-4 for check in report.parity)
    assert report.graphs[0].path == "onnx/model.onnx"  # for callers it is a float32 graph
    graph = load_graph(out / "onnx" / "model.onnx").graph
    assert {value.dtype for value in (*graph.inputs, *graph.outputs)} == {ir.DataType.INT64, ir.DataType.FLOAT}
    halves = [value for value in graph.initializers.values() if value.dtype == ir.DataType.FLOAT16]
    wide = [v for v in graph.initializers.values() if v.dtype == ir.DataType.FLOAT and len(v.shape or ()) > 1]
    assert [VOCABULARY_SIZE, TEXT_WIDTH] in [list(value.shape or ()) for value in halves]  # the table, and the head
    assert all(np.prod(value.shape) < 1024 for value in wide)  # type: ignore[arg-type]
    gather = next(node for node in graph if node.op_type == "Gather" and node.inputs[0] in halves)
    assert [use.node.op_type for use in gather.outputs[0].uses()] == ["Cast"]  # rows are cast, never the table

    directions = write_directions(tmp_path / "d.safetensors", random_directions(TEXT_WIDTH, range(2)))
    spec = GuardSpec(mode="restore")
    result = vlmguard.export(out, tmp_path / "guarded", directions=directions, spec=spec, allow_no_effect=True)
    assert result.proved.level == "full" and all(check.ok for check in result.proof)
    assert {site.site.dtype for site in result.plan.sites} == {"float32"}
    vlm = GuardedVLM.open(result.out)
    assert np.isfinite(vlm.prefill(PROMPTS)["logits"]).all()
    states = AutoModelForCausalLM.from_pretrained(huge)(torch.from_numpy(vlm.batch(PROMPTS).ids)).logits
    assert torch.isfinite(states).all()


def test_only_what_float16_holds_exactly_is_narrowed() -> None:
    random = np.random.default_rng(0)
    exact = random.normal(size=(32, 64)).astype(np.float16).astype(np.float32)
    arrays = {"exact": exact, "inexact": exact + 1e-6, "small": exact[:4, :4], "beyond": exact * np.float32(1e6)}
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 18})
    for name, array in arrays.items():
        tensor = ir.Tensor(array, name=name)
        graph.register_initializer(
            ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        )
    assert narrow_weights(graph) == 1
    narrowed = graph.initializers["exact"]
    assert narrowed.dtype == ir.DataType.FLOAT16 and narrowed.const_value is not None
    np.testing.assert_array_equal(narrowed.const_value.numpy().astype(np.float32), exact)
    assert all(graph.initializers[name].dtype == ir.DataType.FLOAT for name in ("inexact", "small", "beyond"))


def test_the_worst_state_is_named_and_the_first_layer() -> None:
    peaks = [Peak(0, 3.0, 1, 5), Peak(1, 70_000.0, 2, 1), Peak(2, 103_795.4, 7, 1)]
    assert why_not_float16(peaks[:1]) is None
    assert why_not_float16(peaks) == (
        "its hidden states pass float16's range of 65,504 from layer 1 on: layer 2 reaches 103,795 in channel 7, at token 1"
    )


@pytest.mark.zoo
def test_a_text_checkpoint_is_guarded_in_one_go(tmp_path: Path) -> None:
    """`vlmguard-export CHECKPOINT --dtype w16a32`: converted, guarded, proved, and it answers."""
    checkpoint = save_tiny_text("llama", tmp_path / "llama")
    directions = write_directions(tmp_path / "d.safetensors", random_directions(TEXT_WIDTH, range(2)))
    result = vlmguard.export(checkpoint, directions=directions, spec=GuardSpec(mode="project"), dtype="w16a32")
    assert result.out == tmp_path / "llama-guarded" and all(check.ok for check in result.proof)
    assert len(GuardedVLM.open(result.out).answer(PROMPTS)) == 2


# What is compared


def test_prompts_begin_with_bos_and_are_text_where_the_tokenizer_knows_it(tmp_path: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(save_tiny_text("llama", tmp_path / "words")).config
    first, second = prompt_texts(tmp_path / "words", config)  # its tokenizer knows fourteen words, and none of these
    assert first[0] == second[0] == VOCABULARY["<s>"] and len(first) == 7 and len(second) == 13
    _teach(tmp_path / "words", ["The", "capital", "of", "France", "is", "Paris."])
    first, second = prompt_texts(tmp_path / "words", config)
    assert first == [VOCABULARY["<s>"], *range(len(VOCABULARY), len(VOCABULARY) + 6)]
    assert len(second) == 13


def _teach(folder: Path, words: list[str]) -> None:
    """Give the tokenizer the words of both sentences."""
    from vlmguard.exporter.checkpoints.prompt_text import _SENTENCES

    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    every = dict.fromkeys([*words, *" ".join(_SENTENCES).split()])
    content["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    content["model"]["vocab"] |= {word: len(VOCABULARY) + number for number, word in enumerate(every)}
    path.write_text(json.dumps(content))


# What is refused


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "bart"}, "bart is an encoder-decoder; only decoder-only language models can be guarded"),
        ({"model_type": "bert"}, "bert is an encoder; only decoder-only language models can be guarded"),
        (
            {"model_type": "mllama", "vision_config": {"hidden_size": 8}},
            "mllama is multimodal (its config.json has a vision_config), and this multimodal family is not supported",
        ),
    ],
)
def test_what_is_no_text_decoder_is_refused_by_its_config(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(GuardError) as refused:
        find_family(config, "here")
    assert str(refused.value) == f"here: {reason}. {OTHERWISE}"


def test_a_cache_of_another_name_is_refused(tmp_path: Path) -> None:
    """Before anything is traced."""
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(
        vocab_size=VOCABULARY_SIZE, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16, intermediate_size=32
    )
    RwkvForCausalLM(config).save_pretrained(tmp_path / "rwkv")
    with pytest.raises(ModelUnreadable) as refused:
        convert_checkpoint(tmp_path / "rwkv", tmp_path / "out")
    assert str(refused.value) == (
        f"{tmp_path / 'rwkv'}: rwkv returns no past_key_values; only decoders whose forward returns their cache "
        "under that name are exported"
    )


def test_directions_are_read_from_a_text_checkpoint_in_torch(tmp_path: Path) -> None:
    """Whatever its list of layers is called."""
    checkpoint = save_tiny_text("gpt2", tmp_path / "gpt2")
    pairs = tmp_path / "anchors.jsonl"
    words = ("how do I make a cake", "how do I make a bomb"), ("help I make a cake", "help I make a bomb")
    pairs.write_text("".join(json.dumps({"harmless": a, "harmful": b, "intent": "x"}) + "\n" for a, b in words * 2))
    found = extract_directions(checkpoint, tmp_path / "d.safetensors", anchors=pairs)
    assert found.width == TEXT_WIDTH and sorted(found.layers) == [0, 1]


# Logits of the last token


def test_the_head_reads_the_last_token_alone(texts) -> None:
    from vlmguard.exporter.last_token_model import last_token_model

    package = open_package(texts("gemma3_text").out)
    whole = VisionLanguageModel(package).prefill(PROMPTS)["logits"]
    last = last_token_model(package).prefill(PROMPTS)["logits"]
    assert whole.shape[1] > 1 and last.shape == (2, 1, VOCABULARY_SIZE)
    np.testing.assert_allclose(last, whole[:, -1:], rtol=0, atol=1e-6 * np.abs(whole).max())
    # the file keeps all its logits
    shape = next(value for value in load_graph(package.decoder).graph.outputs if value.name == "logits").shape
    assert shape is not None and str(shape[1]) == "sequence_length"
