"""Converting a checkpoint: what is written, that it computes what torch computes, and every refusal word for word."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    HEAD_WIDTH,
    IMAGE_SIZE,
    IMAGE_TOKEN_ID,
    IMAGE_TOKENS,
    KV_HEADS,
    LAYERS,
    TEXT_WIDTH,
    VOCABULARY_SIZE,
    save_tiny_llava,
)
from transformers import LlavaForConditionalGeneration

from vlmguard.exporter.checkpoints import convert as checkpoint_module
from vlmguard.exporter.checkpoints.convert import (
    ConversionReport,
    _save_part,
    convert_checkpoint,
    copy_companions,
    load_model,
    locate,
    read_config,
)
from vlmguard.exporter.checkpoints.parity import answer_with_torch, check_parity
from vlmguard.exporter.checkpoints.prompt_text import prompt_texts
from vlmguard.exporter.checkpoints.tidy import require_signature
from vlmguard.exporter.families import FAMILIES, find_family
from vlmguard.graphs.errors import ExtraMissing, GuardError, ModelUnreadable, OutputRefused, ProofFailed
from vlmguard.graphs.extras import install_command

VARIANTS = {
    "fp32 opset 18": ("llava", "fp32", 18),
    "fp32 opset 23": ("llava", "fp32", 23),
    "fp16 opset 18": ("llava", "fp16", 18),
    "interleave fp16 opset 23": ("interleave", "fp16", 23),
}
PARTS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
SUFFIX = {"fp32": "", "fp16": "_fp16"}
NUMPY = {"fp32": np.float32, "fp16": np.float16}
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-2}


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted checkpoint, kept for all tests: each takes many seconds."""

    checkpoint: Path
    out: Path
    dtype: str
    opset: int
    report: ConversionReport

    def path(self, part: str) -> Path:
        return self.out / "onnx" / f"{part}{SUFFIX[self.dtype]}.onnx"

    def session(self, part: str) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(str(self.path(part)), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def conversions(llava: Path, tmp_path_factory: pytest.TempPathFactory):
    """Converts a variant when first asked for it."""
    done: dict[str, Converted] = {}

    def convert(variant: str) -> Converted:
        if variant not in done:
            shape, dtype, opset = VARIANTS[variant]
            source = llava
            if shape == "interleave":
                source = save_tiny_llava(tmp_path_factory.mktemp("interleave"), layers=2, text="qwen2", vision="siglip")
            out = tmp_path_factory.mktemp("converted")
            report = convert_checkpoint(source, out, dtype=dtype, opset=opset)
            done[variant] = Converted(source, out, dtype, opset, report)
        return done[variant]

    return convert


@pytest.fixture
def plain(conversions) -> Converted:
    return conversions("fp32 opset 18")


IN_EVERY_RUN = ("fp32 opset 18", "fp16 opset 18")  # opset 23 is in the zoo's matrix


@pytest.fixture(params=[pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.zoo) for name in VARIANTS])
def converted(request: pytest.FixtureRequest, conversions) -> Converted:
    return conversions(request.param)


# What is written


def test_every_variant_agrees_with_torch(converted: Converted) -> None:
    report = converted.report
    assert [check.name for check in report.parity] == ["image features", "prefill logits", "decode logits", "cache"]
    assert all(check.ok and 0 <= check.worst <= check.limit for check in report.parity)
    assert {check.limit for check in report.parity} == {1e-4 if converted.dtype == "fp32" else 1e-2}
    assert report.worst == max(check.worst for check in report.parity)
    # 2 prompts, 29 and 23 real tokens of them; 8 steps; keys and values of every layer for all of these
    layers = len([name for name in shapes_of(converted, "decoder_model_merged")[0] if name.endswith(".key")])
    assert [check.compared for check in report.parity] == [
        2 * IMAGE_TOKENS * TEXT_WIDTH,
        52 * VOCABULARY_SIZE,
        2 * 8 * VOCABULARY_SIZE,
        68 * 2 * layers * KV_HEADS * HEAD_WIDTH,
    ]


def test_the_layout(plain: Converted, conversions) -> None:
    files = sorted(path.relative_to(plain.out).as_posix() for path in plain.out.rglob("*") if path.is_file())
    assert files == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "onnx/decoder_model_merged.onnx",
        "onnx/embed_tokens.onnx",
        "onnx/vision_encoder.onnx",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in plain.report.copied:
        assert (plain.out / name).read_bytes() == (plain.checkpoint / name).read_bytes()
    assert sorted(plain.report.copied) == [name for name in files if "/" not in name]
    half = conversions("fp16 opset 18")
    assert sorted(path.name for path in (half.out / "onnx").iterdir()) == [
        "decoder_model_merged_fp16.onnx",
        "embed_tokens_fp16.onnx",
        "vision_encoder_fp16.onnx",
    ]


def test_the_report_says_what_was_written(plain: Converted) -> None:
    report = plain.report
    assert (report.checkpoint, report.model_type, report.dtype, report.opset) == (
        str(plain.checkpoint), "llava", "fp32", 18,
    )  # fmt: skip
    assert [graph.part for graph in report.graphs] == list(PARTS)
    for graph in report.graphs:
        path = plain.out / graph.path
        assert graph.size_bytes == path.stat().st_size
        assert graph.nodes == len(onnx.load(path).graph.node)
        assert not graph.external_data


def shapes_of(converted: Converted, part: str) -> tuple[dict[str, list], dict[str, list]]:
    session = converted.session(part)
    return ({i.name: i.shape for i in session.get_inputs()}, {o.name: o.shape for o in session.get_outputs()})


def test_inputs_and_outputs_are_the_layouts(plain: Converted) -> None:
    past = ["batch_size", KV_HEADS, "past_sequence_length", HEAD_WIDTH]
    present = ["batch_size", KV_HEADS, "total_sequence_length", HEAD_WIDTH]
    both = [(layer, kind) for layer in range(LAYERS) for kind in ("key", "value")]
    assert shapes_of(plain, "vision_encoder") == (
        {"pixel_values": ["num_images", 3, IMAGE_SIZE, IMAGE_SIZE]},
        {"image_features": ["num_images", IMAGE_TOKENS, TEXT_WIDTH]},
    )
    assert shapes_of(plain, "embed_tokens") == (
        {"input_ids": ["batch_size", "sequence_length"]},
        {"inputs_embeds": ["batch_size", "sequence_length", TEXT_WIDTH]},
    )
    inputs, outputs = shapes_of(plain, "decoder_model_merged")
    assert inputs == {
        "inputs_embeds": ["batch_size", "sequence_length", TEXT_WIDTH],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{layer}.{kind}": past for layer, kind in both},
    }
    assert list(inputs)[3:5] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert outputs == {
        "logits": ["batch_size", "sequence_length", VOCABULARY_SIZE],
        **{f"present.{layer}.{kind}": present for layer, kind in both},
    }


def test_half_precision_takes_images_as_float32(conversions) -> None:
    half = conversions("fp16 opset 18")
    types = {
        value.name: value.type
        for part in PARTS
        for value in (*half.session(part).get_inputs(), *half.session(part).get_outputs())
    }
    given = {"pixel_values": "tensor(float)", "input_ids": "tensor(int64)"}
    given |= {"attention_mask": "tensor(int64)", "position_ids": "tensor(int64)"}
    assert types == {name: given.get(name, "tensor(float16)") for name in types}


def test_no_dimension_is_a_number_in_words(converted: Converted) -> None:
    words = {"batch_size", "sequence_length", "past_sequence_length", "total_sequence_length", "num_images"}
    for part in PARTS:
        graph = onnx.load(converted.path(part)).graph
        values = (*graph.input, *graph.output, *graph.value_info)
        named = {dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim if dim.dim_param}
        spoken = {word for name in named for word in re.findall(r"[A-Za-z_]\w*", name)}
        assert spoken <= words
        assert not any(re.fullmatch(r"[\d\s]*", name) for name in named)


def test_the_graphs_are_valid_at_their_opset(converted: Converted) -> None:
    for part in PARTS:
        model = onnx.load(converted.path(part))
        onnx.checker.check_model(model, full_check=True)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", converted.opset)]


def strings_in(message) -> list[str]:
    """Every text in a protobuf message, tensors' bytes not included."""
    found = []
    for field, value in message.ListFields():
        for item in value if field.is_repeated else [value]:
            if field.type == field.TYPE_MESSAGE:
                found += strings_in(item)
            elif isinstance(item, str):
                found.append(item)
            elif isinstance(item, bytes) and field.name != "raw_data":
                found.append(item.decode())
    return found


def test_nothing_tells_of_the_machine_it_was_made_on(converted: Converted) -> None:
    for part in PARTS:
        path = converted.path(part)
        content = path.read_bytes()
        libraries = Path(torch.__file__).parent.parent
        for place in (Path.home(), Path.cwd(), libraries, libraries.name, converted.checkpoint, converted.out):
            assert str(place).encode() not in content
        model = onnx.load(path)
        texts = strings_in(model)
        assert len(texts) > len(model.graph.node)
        assert [text for text in texts if "/" in text or "\\" in text or "torch" in text or ".py" in text] == []
        assert not model.metadata_props and not any(node.metadata_props for node in model.graph.node)
        assert (model.producer_name, model.graph.name) == ("vlmguard", "main_graph")
        assert re.match(r"\d+\.\d+", model.producer_version)


def test_nodes_and_weights_are_named_after_modules(plain: Converted) -> None:
    graph = onnx.load(plain.path("decoder_model_merged")).graph
    nodes = [node.name for node in graph.node]
    values = [output for node in graph.node for output in node.output]
    assert len(set(nodes)) == len(nodes) and len(set(values)) == len(values)
    weights = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    checkpoint_names = set(LlavaForConditionalGeneration.from_pretrained(plain.checkpoint).state_dict())
    for layer in range(LAYERS):
        block = f"model.language_model.layers.{layer}"
        assert {f"{block}.Add", f"{block}.Add_1", f"{block}.self_attn.q_proj.MatMul"} <= set(nodes)
        assert weights[f"{block}.mlp.down_proj.weight.T"] == (2 * TEXT_WIDTH, TEXT_WIDTH)
        assert f"{block}.input_layernorm.weight" in weights
    assert weights["lm_head.weight.T"] == (TEXT_WIDTH, VOCABULARY_SIZE)
    from_checkpoint = {name.removesuffix(".T") for name in weights if not name.startswith("constant")}
    assert from_checkpoint - {"model.language_model.rotary_emb.inv_freq"} <= checkpoint_names


@pytest.mark.long
def test_the_same_checkpoint_gives_the_same_bytes_and_nothing_on_stdout(plain: Converted, tmp_path: Path) -> None:
    """Again in another process, with another hash seed."""
    program = (
        "import sys; from pathlib import Path; from vlmguard.exporter.checkpoints.convert import convert_checkpoint; "
        "print(convert_checkpoint(sys.argv[1], Path(sys.argv[2]), verify=False).parity)"
    )
    again = subprocess.run(
        [sys.executable, "-c", program, str(plain.checkpoint), str(tmp_path / "again")],
        env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert again.stdout == "()\n"
    for part in PARTS:
        written = tmp_path / "again" / "onnx" / f"{part}.onnx"
        assert written.read_bytes() == plain.path(part).read_bytes()


def test_large_graphs_keep_their_weights_beside_them(
    plain: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "EXTERNAL_DATA_ABOVE", 8000)
    graph = _save_part(ir.load(plain.path("embed_tokens")), tmp_path, "embed_tokens", "fp32")
    files = sorted(path.name for path in (tmp_path / "onnx").iterdir())
    assert files == ["embed_tokens.onnx", "embed_tokens.onnx_data"]
    assert graph.external_data and graph.size_bytes > VOCABULARY_SIZE * TEXT_WIDTH * 4
    ids = {"input_ids": np.array([[1, 5, 9]])}
    (here,) = onnxruntime.InferenceSession(tmp_path / "onnx" / "embed_tokens.onnx").run(None, ids)
    (there,) = plain.session("embed_tokens").run(None, ids)
    np.testing.assert_array_equal(here, there)


# What it computes


class Decoder:
    """The exported decoder and embeddings, fed with token ids."""

    def __init__(self, converted: Converted) -> None:
        self.embed = converted.session("embed_tokens")
        self.decoder = converted.session("decoder_model_merged")
        self.dtype = NUMPY[converted.dtype]
        self.names = [output.name for output in self.decoder.get_outputs()]

    def __call__(self, ids: np.ndarray, mask: np.ndarray, past: dict[str, np.ndarray] | None = None):
        """The logits of these tokens in float32, and the cache after them."""
        (embeds,) = self.embed.run(None, {"input_ids": ids})
        positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, -ids.shape[1] :]
        if past is None:
            empty = np.zeros((len(ids), KV_HEADS, 0, HEAD_WIDTH), self.dtype)
            past = {i.name: empty for i in self.decoder.get_inputs() if i.name.startswith("past")}
        feeds = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, **past}
        logits, *states = self.decoder.run(self.names, feeds)
        names = [name.replace("present", "past_key_values") for name in self.names[1:]]
        return logits.astype(np.float32), dict(zip(names, states, strict=True))


def some_tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(batch * 100 + length).integers(5, VOCABULARY_SIZE, (batch, length))


@pytest.mark.parametrize("batch", [1, 3])
def test_any_batch_and_any_past(converted: Converted, batch: int) -> None:
    """All at once, one by one, or in uneven pieces: the same logits, and torch's."""
    decoder, ids = Decoder(converted), some_tokens(batch, 9)
    model = LlavaForConditionalGeneration.from_pretrained(converted.checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    tolerance = TOLERANCE[converted.dtype] * np.abs(expected).max()
    for pieces in ([9], [1] * 9, [4, 1, 1, 3], [1, 8]):
        past, done, logits = None, 0, []
        for length in pieces:
            mask = np.ones((batch, done + length), np.int64)
            piece, past = decoder(ids[:, done : done + length], mask, past)
            logits.append(piece)
            done += length
        np.testing.assert_allclose(np.concatenate(logits, axis=1), expected, rtol=0, atol=tolerance)


def test_left_padding_changes_nothing(converted: Converted) -> None:
    """Three prompts of different length in one batch, then two steps: each row as if it were alone."""
    decoder, lengths, steps = Decoder(converted), (7, 4, 1), 2
    rows = [some_tokens(1, length + steps)[0] for length in lengths]
    width = max(lengths)
    ids = np.zeros((len(rows), width + steps), np.int64)
    mask = np.zeros_like(ids)
    for row, (tokens, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[row, width - length :], mask[row, width - length :] = tokens, 1

    prefill, past = decoder(ids[:, :width], mask[:, :width])
    together = [prefill]
    for step in range(width, width + steps):
        logits, past = decoder(ids[:, step : step + 1], mask[:, : step + 1], past)
        together.append(logits)
    batched = np.concatenate(together, axis=1)
    assert np.isfinite(batched).all()

    for row, (tokens, length) in enumerate(zip(rows, lengths, strict=True)):
        alone, _ = decoder(tokens[None], np.ones((1, length + steps), np.int64))
        tolerance = TOLERANCE[converted.dtype] * np.abs(alone).max()
        np.testing.assert_allclose(batched[row, width - length :], alone[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("images", [1, 3])
def test_any_number_of_images(converted: Converted, images: int) -> None:
    """Exactly what `get_image_features` gives, one row of patches per image."""
    pixels = np.random.default_rng(images).standard_normal((images, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    model = LlavaForConditionalGeneration.from_pretrained(converted.checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.stack(model.get_image_features(torch.from_numpy(pixels)).pooler_output).numpy()
    (features,) = converted.session("vision_encoder").run(None, {"pixel_values": pixels})
    tolerance = TOLERANCE[converted.dtype] * np.abs(expected).max()
    assert features.dtype == NUMPY[converted.dtype]
    np.testing.assert_allclose(features.astype(np.float32), expected, rtol=0, atol=tolerance)


# When the exported graphs differ from torch


@pytest.fixture(scope="session")
def family(llava: Path):
    """The row, and the model's config."""
    row = find_family(read_config(llava), str(llava))
    return row, load_model(llava, row, "fp32", print).config


@pytest.fixture(scope="session")
def reference(llava: Path, family):
    row, _ = family
    model = load_model(llava, row, "fp32", print)
    return answer_with_torch(row, model, prompt_texts(llava, model.config))


@pytest.fixture
def refusal_of_parity(plain: Converted, family, reference):
    def refusal(prompt=None, **changed) -> str:
        changed_answer = dataclasses.replace(reference.answer, **changed)
        other = dataclasses.replace(reference, prompt=prompt or reference.prompt, answer=changed_answer)
        with pytest.raises(ProofFailed) as refused:
            check_parity(plain.out / "onnx", "", "fp32", *family, other)
        return str(refused.value)

    return refusal


def test_a_difference_is_refused(refusal_of_parity, reference) -> None:
    answer = reference.answer
    shifted = answer.logits[0].copy()
    shifted[1, -1, 3] = 2 * np.abs(shifted).max()
    difference = np.abs(shifted[1, -1, 3] - answer.logits[0][1, -1, 3]) / shifted[1, -1, 3]
    assert refusal_of_parity(logits=(shifted, *answer.logits[1:])) == (
        f"prefill logits: the exported graph differs from torch by {difference:.1e} of the largest value, allowed "
        f"1e-04 (3,328 values compared); try another opset, or other versions of torch and transformers"
    )


def test_other_shapes_are_refused(refusal_of_parity, reference) -> None:
    assert refusal_of_parity(image_features=reference.answer.image_features[:IMAGE_TOKENS]) == (
        "image features: torch gives shape (16, 32), the exported graph (32, 32)"
    )


def test_another_cache_is_refused(refusal_of_parity, reference) -> None:
    cache = reference.answer.cache
    fewer = {name: state for name, state in cache.items() if not name.startswith("present.2")}
    assert refusal_of_parity(cache=fewer) == (f"caches differ: torch has {sorted(fewer)}, the decoder {sorted(cache)}")


def test_values_that_are_not_finite_are_refused(refusal_of_parity, reference) -> None:
    prompt = reference.prompt
    blank = {"pixel_values": np.full_like(prompt.given["pixel_values"], np.nan)}
    assert refusal_of_parity(dataclasses.replace(prompt, given=blank)) == (
        "image features: the exported graph gives values that are not finite; "
        "try another opset, or other versions of torch and transformers"
    )


def test_a_baked_dimension_is_our_bug() -> None:
    value = ir.Value(name="input_ids", shape=ir.Shape([2, "s1"]), type=ir.TensorType(ir.DataType.INT64))
    graph = ir.Graph([value], [], nodes=[], opset_imports={"": 18})
    said = re.escape("traced input_ids as [2,s1], the model has ('batch_size', 'sequence_length')")
    with pytest.raises(ModelUnreadable, match=said):
        require_signature(graph, {"input_ids": ("batch_size", "sequence_length")}, {})


def test_an_output_of_one_length_may_be_traced_as_an_expression() -> None:
    value = ir.Value(name="image_features", shape=ir.Shape(["64*u0", 32]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([], [value], nodes=[], opset_imports={"": 18})
    require_signature(graph, {}, {"image_features": (64, 32)})
    with pytest.raises(ModelUnreadable, match=re.escape("traced image_features as [64*u0,32], the model has (64, 48)")):
        require_signature(graph, {}, {"image_features": (64, 48)})


# Refusals before anything is written


def refusal(kind: type[GuardError], source: str | Path, out: Path, **options) -> str:
    with pytest.raises(kind) as refused:
        convert_checkpoint(source, out, **options)
    assert type(refused.value) is kind
    return str(refused.value)


@pytest.fixture
def copied(llava: Path, tmp_path: Path) -> Path:
    """The checkpoint again, to be broken."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in llava.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def edit_config(folder: Path, old: str, new: str) -> None:
    path = folder / "config.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_unknown_model_type(copied: Path, tmp_path: Path) -> None:
    edit_config(copied, '"llava"', '"bloomier"')
    assert refusal(GuardError, copied, tmp_path / "out") == (
        f"{copied}: its config.json has model_type 'bloomier', which this transformers "
        f"opens neither with AutoModelForImageTextToText nor with AutoModelForCausalLM. "
        f"Export it to ONNX with its own tools and guard that folder instead"
    )
    assert not (tmp_path / "out").exists()


def test_no_such_folder(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert refusal(ModelUnreadable, absent, tmp_path / "out") == (
        f"{absent}: no such folder; name a checkpoint's folder or a hub id (owner/name)"
    )


def test_a_file_is_no_checkpoint(llava: Path, tmp_path: Path) -> None:
    weights = llava / "model.safetensors"
    assert refusal(ModelUnreadable, weights, tmp_path / "out") == (
        f"{weights}: a file; name the folder that holds config.json and *.safetensors"
    )


def test_a_hub_id_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_, **__):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert refusal(ModelUnreadable, "nobody/nothing", tmp_path / "out") == (
        "nobody/nothing: no such folder, and not on the Hugging Face hub for us (no route to host and more); "
        "check the name, or download it and name its folder"
    )


def test_a_hub_id_downloads_configs_and_safetensors_only(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(repository: str, *, allow_patterns: list[str]) -> str:
        asked[repository] = allow_patterns
        return str(llava)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("llava-hf/llava-1.5-7b-hf") == llava
    (patterns,) = asked.values()
    assert "config.json" in patterns and "*.safetensors" in patterns
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".py", "*")) for pattern in patterns)


def test_no_config(copied: Path, tmp_path: Path) -> None:
    (copied / "config.json").unlink()
    assert refusal(ModelUnreadable, copied, tmp_path / "out") == (
        f"{copied}: no config.json; name the folder of a Hugging Face checkpoint"
    )


def test_config_that_is_not_json(copied: Path, tmp_path: Path) -> None:
    (copied / "config.json").write_text("{")
    assert refusal(ModelUnreadable, copied, tmp_path / "out") == (
        f"{copied / 'config.json'}: not JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
        f"(char 1)); fetch the checkpoint again"
    )


def test_config_that_is_no_object(copied: Path, tmp_path: Path) -> None:
    (copied / "config.json").write_text("[]")
    assert refusal(ModelUnreadable, copied, tmp_path / "out") == (
        f"{copied / 'config.json'}: a JSON list, expected an object; fetch the checkpoint again"
    )


def test_no_safetensors(copied: Path, tmp_path: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    assert refusal(ModelUnreadable, copied, tmp_path / "out") == (
        f"{copied}: no *.safetensors; save the checkpoint with save_pretrained (pickled weights can run code and "
        f"are not opened)"
    )


def test_truncated_weights(copied: Path, tmp_path: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelUnreadable) as refused:
        convert_checkpoint(copied, tmp_path / "out")
    reason = str(refused.value.__cause__)
    assert "deserializing" in reason and "\n" not in reason
    assert str(refused.value) == f"{copied}: its weights cannot be loaded ({reason}); fetch the checkpoint again"


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (
            "Failed to export the model with torch.export. Step 1/3.\n- Modify the model code.\n\n## Exception summary\n\n"
            "<class 'torch.fx.GuardOnDataDependentSymNode'>: Could not guard on Eq(u0, 1)\n\nCaused by: (a.py:1 in b)",
            "(GuardOnDataDependentSymNode: Could not guard on Eq(u0, 1)); try other versions of torch and transformers, or "
            "--exporter genai for the text decoder alone",
        ),
        (
            "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
            "(DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes); the machine has too little free memory",
        ),
    ],
    ids=["torch.export", "memory"],
)
def test_a_part_that_torch_cannot_export(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, sentence: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(failure)

    monkeypatch.setattr(checkpoint_module, "trace_some_way", fail)
    with pytest.raises(ModelUnreadable) as caught:
        convert_checkpoint(llava, tmp_path / "out")
    said = str(caught.value)
    assert said.startswith(f"{llava}: torch cannot export its ") and said.endswith(sentence)


def test_weights_of_another_shape(copied: Path, tmp_path: Path) -> None:
    edit_config(copied, '"intermediate_size": 64', '"intermediate_size": 96')
    assert refusal(ModelUnreadable, copied, tmp_path / "out") == (
        f"{copied}: tensors that do not fit its config.json: 9, the first is "
        f"model.language_model.layers.0.mlp.down_proj.weight (stored [32, 64], expected [32, 96]); "
        f"fetch the checkpoint again"
    )


def test_a_config_that_fits_no_model(copied: Path, tmp_path: Path) -> None:
    edit_config(copied, '"intermediate_size": 64', '"intermediate_size": "many"')
    assert refusal(ModelUnreadable, copied, tmp_path / "out") == (
        f"{copied}: its config.json describes no llava model (Validation error for field 'intermediate_size': "
        f"TypeError: Field 'intermediate_size' expected int, got str (value: 'many')); fetch the checkpoint again"
    )


def test_a_config_of_an_unknown_language_model(copied: Path, tmp_path: Path) -> None:
    edit_config(copied, '"llama"', '"nonsense"')
    assert refusal(ModelUnreadable, copied, tmp_path / "out") == (
        f"{copied}: its config.json describes no llava model (Unrecognized model type for subconfig: nonsense); "
        "fetch the checkpoint again"
    )


def test_missing_weights_are_never_filled_in(copied: Path, tmp_path: Path) -> None:
    weights = copied / "model.safetensors"
    tensors = load_file(weights)
    missing = sorted(name for name in tensors if "layers.1.mlp" in name and "language_model" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name not in missing}, weights, {"format": "pt"})
    assert len(missing) == 3
    assert refusal(ModelUnreadable, copied, tmp_path / "out") == (
        f"{copied}: tensors of the model missing from its weights: 3, the first is "
        f"model.language_model.layers.1.mlp.down_proj.weight; fetch the checkpoint again"
    )


def test_surplus_weights_are_mentioned(copied: Path) -> None:
    weights = copied / "model.safetensors"
    save_file(load_file(weights) | {"adapter.weight": torch.zeros(2)}, weights, {"format": "pt"})
    said: list[str] = []
    load_model(copied, FAMILIES[0], "fp32", lambda stage, done, total: said.append(stage))
    assert said == ["tensors of the checkpoint that are in no part of the model: 1, the first is adapter.weight"]


def test_an_opset_out_of_range(llava: Path, tmp_path: Path) -> None:
    assert refusal(GuardError, llava, tmp_path / "out", opset=17) == (
        "unsupported opset 17; choose 18 to 23 (default 18)"
    )


def test_an_unknown_dtype(llava: Path, tmp_path: Path) -> None:
    assert refusal(GuardError, llava, tmp_path / "out", dtype="bf16") == (
        "unsupported dtype 'bf16'; choose fp32, fp16, w16a32"
    )


def test_an_output_folder_in_use(llava: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    assert refusal(OutputRefused, llava, tmp_path) == f"{tmp_path}: exists and is not an empty folder; name a new one"


@pytest.mark.parametrize("name", ["torch", "onnxscript", "transformers.exporters"])
def test_the_torch_extra_is_named(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert refusal(ExtraMissing, llava, tmp_path / "out") == (
        f"exporting a checkpoint needs {name}, which is not installed; run: {install_command('torch')}"
    )


def test_the_runtime_extra_is_named(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert refusal(ExtraMissing, llava, tmp_path / "out") == (
        f"checking a converted checkpoint runs it in onnxruntime, which is not installed; run: {install_command('cpu')}"
    )


def test_importing_costs_no_framework() -> None:
    program = (
        "import sys, vlmguard.exporter.checkpoints.convert; "
        "print(sorted({'torch', 'transformers', 'onnxruntime', 'huggingface_hub'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


# Small things


def test_weights_are_never_copied(copied: Path, tmp_path: Path) -> None:
    (copied / "training_args.bin").touch()
    (copied / "merges.txt").write_text("a b")
    out = tmp_path / "out"
    out.mkdir()
    names = copy_companions(copied, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert "merges.txt" in names and not any(name.endswith((".bin", ".safetensors")) for name in names)


def test_links_of_the_hubs_cache_become_files(llava: Path, tmp_path: Path) -> None:
    snapshot, out = tmp_path / "snapshot", tmp_path / "out"
    snapshot.mkdir()
    out.mkdir()
    (snapshot / "config.json").symlink_to(llava / "config.json")
    assert copy_companions(snapshot, out) == ("config.json",)
    assert not (out / "config.json").is_symlink()


def test_the_image_token_is_the_configs(reference) -> None:
    prompt = reference.prompt
    assert prompt.image_token == IMAGE_TOKEN_ID
    assert (prompt.input_ids == IMAGE_TOKEN_ID).sum(-1).tolist() == [IMAGE_TOKENS, IMAGE_TOKENS]
    assert prompt.attention_mask.sum(-1).tolist() == [IMAGE_TOKENS + 7, IMAGE_TOKENS + 13]
