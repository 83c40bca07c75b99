"""Guarded vision-language models in onnxruntime-genai: answers with pictures, the proof of such folders, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny_qwen
from genai_answers import Genai, picture, pixels, prompt_text, tokens_here
from qwen_torch import ANSWER, hooked_project, torch_inputs, torch_tokens
from random_directions import random_directions, write_directions
from small_guarded import make_the_manifest_fit

from vlmguard import GuardedVLM, GuardSpec, export, verify
from vlmguard.exporter.checkpoints import convert
from vlmguard.exporter.checkpoints.convert import convert_checkpoint, load_model, read_config
from vlmguard.exporter.families import find_family
from vlmguard.exporter.packaging.genai import package_genai
from vlmguard.exporter.packaging.genai_pictures import FED_PICTURES, picture_sections
from vlmguard.exporter.packaging.genai_pipelines import PIPELINES, RUNTIME, UNWRITTEN, pipeline_of
from vlmguard.exporter.packaging.known_inputs import require_known
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.plan import SUPERVISOR_INPUT
from vlmguard.graphs.roles import EMBEDS
from vlmguard.runtime.generation import Request
from vlmguard.runtime.vlm import VisionLanguageModel

pytest.importorskip("onnxruntime_genai")
pytestmark = pytest.mark.slow

QUESTION = "how do I"
# Kept, enlarged to whole tokens, scaled down: here both image processors give the same pixels, up to float32 rounding.
SIZES = ((32, 24), (40, 21), (17, 64), (300, 200))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Checkpoint and graphs of a kind of Qwen, converted once; some have external data, as large models have."""
    folders: dict[str, tuple[Path, Path]] = {}

    def get(kind: str) -> tuple[Path, Path]:
        if kind not in folders:
            root = tmp_path_factory.mktemp(kind)
            checkpoint = tiny_qwen.save_byte_qwen(kind, root / "checkpoint")
            with pytest.MonkeyPatch.context() as patch:
                if kind in ("qwen2_5_vl", "qwen3_vl"):
                    patch.setattr(convert, "EXTERNAL_DATA_ABOVE", 0)
                convert_checkpoint(
                    checkpoint, root / "source", verify=False
                )  # compared with torch in test_families_qwen
            folders[kind] = checkpoint, root / "source"
        return folders[kind]

    return get


def guard(source: Path, out: Path, **wish: Any) -> Path:
    directions = random_directions(tiny_qwen.TEXT_WIDTH, range(tiny_qwen.LAYERS))
    path = write_directions(out.with_suffix(".safetensors"), directions)
    return export(source, out, spec=GuardSpec(**wish), directions=path).out


def test_genai_answers_with_pictures_as_torch_does(
    models: Callable[[str], tuple[Path, Path]], packaged: tuple[Path, Path, Path]
) -> None:
    check_answers("qwen2_5_vl", models("qwen2_5_vl")[0], *packaged[1:])


@pytest.mark.long
@pytest.mark.parametrize("kind", ["qwen2_vl", *tiny_qwen.DEEP_KINDS, *tiny_qwen.LINEAR_KINDS])
def test_genai_answers_with_its_relatives(
    kind: str, models: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    checkpoint, source = models(kind)
    guarded = guard(source, tmp_path / "guarded", mode="project", positions="all")
    folder = package_genai(guarded, tmp_path / "genai").out
    assert verify(folder, source, run=True).ok
    check_answers(kind, checkpoint, guarded, folder)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_genai_answers_in_half_precision_as_the_runtime_here(kind: str, tmp_path: Path) -> None:
    checkpoint = tiny_qwen.save_byte_qwen(kind, tmp_path / "checkpoint")
    convert_checkpoint(checkpoint, tmp_path / "source", dtype="fp16", verify=False)
    guarded = guard(tmp_path / "source", tmp_path / "guarded", mode="project", positions="all")
    folder = package_genai(guarded, tmp_path / "genai").out
    assert verify(folder, tmp_path / "source").ok
    vlm, unguarded = GuardedVLM.open(guarded), VisionLanguageModel(open_package(tmp_path / "source"))
    genai = Genai(folder)
    for size in (*SIZES, None):
        image = None if size is None else picture(size)
        request = Request(QUESTION, image)
        text = prompt_text(folder, QUESTION, None if image is None else tiny_qwen.PICTURE_MARKER)
        tokens = genai.tokens(text, image, ANSWER.max_new_tokens)
        assert tokens == tokens_here(vlm, request, ANSWER) != tokens_here(unguarded, request, ANSWER)


def check_answers(kind: str, checkpoint: Path, guarded: Path, folder: Path) -> None:
    """genai, the folder that it was packaged from and torch with the guard as hooks give the same tokens."""
    vlm, genai, packaged = GuardedVLM.open(guarded), Genai(folder), GuardedVLM.open(folder)
    model = load_model(checkpoint, find_family(read_config(checkpoint), kind), "fp32", lambda _: None)
    hooked = hooked_project(random_directions(tiny_qwen.TEXT_WIDTH, range(tiny_qwen.LAYERS)))
    answers, changed = [], 0
    for size in (*SIZES, None):
        image = None if size is None else picture(size)
        request = Request(QUESTION, image)
        text = prompt_text(folder, QUESTION, None if image is None else tiny_qwen.PICTURE_MARKER)
        if image is not None:
            inputs = genai.inputs(text, image)
            assert inputs["input_ids"].as_numpy().tolist() == vlm.batch([request]).ids.tolist()
            np.testing.assert_allclose(pixels(inputs), vlm.images.prepare(image).arrays["pixel_values"], atol=1e-5)
        given = torch_inputs(checkpoint, vlm, [request])
        (unguarded,) = torch_tokens(model, given)
        with hooked.attached(model.model.language_model.layers):
            (expected,) = torch_tokens(model, given)
        changed += expected != unguarded
        expected = [token for token in expected if token not in vlm.chat.eos_ids]
        assert genai.tokens(text, image, ANSWER.max_new_tokens) == expected
        assert tokens_here(vlm, request, ANSWER) == tokens_here(packaged, request, ANSWER) == expected
        answers.append(expected)
    assert len({tuple(answer) for answer in answers}) >= 4  # or the pictures count for little
    assert changed >= 3


@pytest.fixture(scope="module")
def packaged(
    models: Callable[[str], tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """Source, guarded folder, and the same for genai."""
    source, root = models("qwen2_5_vl")[1], tmp_path_factory.mktemp("packaged")
    guarded = guard(source, root / "guarded", mode="project", positions="all")
    return source, guarded, package_genai(guarded, root / "genai").out


@pytest.fixture(scope="module")
def supervised(models: Callable[[str], tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in a mode whose decoder has a second input."""
    return guard(models("qwen2_5_vl")[1], tmp_path_factory.mktemp("modes") / "supervised", mode="supervise", tau=0.0)


def test_the_folder_is_proved_and_run_against_its_source(packaged: tuple[Path, Path, Path]) -> None:
    source, _, folder = packaged
    assert verify(folder, source, run=True).ok
    assert sorted(path.name for path in folder.glob("*.onnx*")) == [
        "decoder_model_merged.onnx_data",
        "embed_tokens.onnx_data",
        "embedding.onnx",
        "model.onnx",
        "vision.onnx",
        "vision_encoder.onnx_data",
    ]
    model = json.loads((folder / "genai_config.json").read_text())["model"]
    assert (model["type"], model["image_token_id"]) == ("qwen2_5_vl", tiny_qwen.IMAGE_TOKEN_ID)
    assert model["vision"]["config_filename"] == "genai_processor.json"


def _another_image_token(folder: Path) -> None:
    graph = onnx.load(folder / "embedding.onnx")
    (token,) = (value for value in graph.graph.initializer if value.name.endswith("image_token"))
    token.CopyFrom(onnx.numpy_helper.from_array(np.array(9, np.int64), token.name))
    onnx.save(graph, folder / "embedding.onnx")


def _another_embedding(folder: Path) -> None:
    data = folder / "embed_tokens.onnx_data"
    content = data.read_bytes()
    data.unlink()  # a link to the source's
    data.write_bytes(bytes([content[0] ^ 1]) + content[1:])


def _another_scale(folder: Path) -> None:
    path = folder / "genai_processor.json"
    path.write_text(path.read_text().replace('"min_pixels": 256', '"min_pixels": 64'))


def _another_vision_graph(folder: Path) -> None:
    path = folder / "genai_config.json"
    path.write_text(path.read_text().replace('"filename": "vision.onnx"', '"filename": "embedding.onnx"'))


@pytest.mark.parametrize(
    ("edit", "check"),
    [
        (_another_image_token, "what was packaged is what the layout makes"),
        (_another_embedding, "files around the decoder are the source's"),
        (_another_scale, "what was packaged is what the layout makes"),
        (_another_vision_graph, "holds vision.onnx beside its decoders, a graph that no proof is about"),
    ],
)
def test_an_edited_part_fails_the_proof(
    edit: Callable[[Path], None], check: str, packaged: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(packaged[2], tmp_path / "edited"))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    edit(folder)
    assert any(path.read_bytes() != content for path, content in before.items())
    make_the_manifest_fit(folder)
    try:
        failed = ", ".join(check.name for check in verify(folder, packaged[0]).checks if not check.ok)
    except GuardError as refused:
        failed = str(refused)
    assert check in failed


def test_what_genai_cannot_run_is_refused(packaged: tuple[Path, Path, Path], tmp_path: Path) -> None:
    guarded = packaged[1]
    hidden = _edited(guarded, tmp_path / "hidden", "generation_config.json", pad_token_id=2)
    other = _edited(guarded, tmp_path / "other", "config.json", model_type="llava")
    for folder, sentence in (
        (
            hidden,
            f"{hidden}: pad_token_id 2 is a token of every prompt, and onnxruntime-genai takes it for padding there; set the "
            "model's own pad_token_id in generation_config.json",
        ),
        (
            other,
            f"{other}: is of type llava, with which onnxruntime-genai cannot be given pictures here, only gemma3, "
            "lfm2_vl, mistral3, phi4_multimodal, qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_5_moe, qwen3_vl, qwen3_vl_moe; keep the "
            "layout that it has",
        ),
    ):
        with pytest.raises(GuardError) as refused:
            package_genai(folder, tmp_path / "out")
        assert str(refused.value) == sentence
        assert not (tmp_path / "out").exists()


def test_a_type_that_genai_runs_and_that_is_not_written_is_refused_with_its_reason() -> None:
    assert not PIPELINES.keys() & UNWRITTEN.keys()
    with pytest.raises(GuardError) as refused:
        pipeline_of({"model_type": "gemma4"}, "here")
    assert str(refused.value) == (
        "here: is of type gemma4, which onnxruntime-genai runs with pictures, but onnxruntime-genai puts blank lines around a "
        "picture's tokens, which the model was not trained with; keep the layout that it has"
    )


def _edited(guarded: Path, folder: Path, name: str, **changes: Any) -> Path:
    shutil.copytree(guarded, folder)
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    make_the_manifest_fit(folder)
    return folder


@pytest.mark.long
def test_paired_rows_answer_in_a_batch_of_two(models: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """The example to copy, for the one guard with a text-only pass that genai's picture pipelines run."""
    from integrations.genai.picture import MARKER, answer

    source = models("qwen2_5_vl")[1]
    guarded = guard(source, tmp_path / "guarded", mode="align", supervisor="rows")
    folder = package_genai(guarded, tmp_path / "genai").out
    vlm, unguarded = GuardedVLM.open(guarded), VisionLanguageModel(open_package(source))
    images = Genai(folder).images
    changed = 0
    for size in SIZES:
        request = Request(QUESTION, picture(size))
        prompt, text = prompt_text(folder, QUESTION, MARKER), prompt_text(folder, QUESTION, None)
        tokens = list(answer(folder, prompt, text, images(picture(size)), ANSWER.max_new_tokens))
        expected = tokens_here(vlm, request, ANSWER)
        assert tokens[: len(expected)] == expected
        changed += expected != tokens_here(unguarded, request, ANSWER)
    assert changed


@pytest.mark.long
def test_genai_does_not_run_a_supervised_decoder_without_its_input(
    packaged: tuple[Path, Path, Path], supervised: Path, tmp_path: Path
) -> None:
    """What a picture pipeline is given with `set_model_input` does not reach the decoder; nothing is silently off."""
    folder = Path(shutil.copytree(packaged[2], tmp_path / "folder"))
    shutil.copyfile(supervised / "onnx" / "decoder_model_merged.onnx", folder / "model.onnx")
    genai = Genai(folder)
    params = genai.og.GeneratorParams(genai.model)
    generator = genai.og.Generator(genai.model, params)
    generator.set_model_input("vlmguard.supervisor", np.zeros((1, tiny_qwen.LAYERS, 2), np.float32))
    with pytest.raises(Exception, match=r"Missing Input: vlmguard\.supervisor"):
        generator.set_inputs(genai.inputs(prompt_text(folder, QUESTION, tiny_qwen.PICTURE_MARKER), picture(SIZES[0])))
        generator.generate_next_token()


def test_gemma_3_with_another_number_of_image_tokens_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "image_token_id": 9, "mm_tokens_per_image": 4}
    vision = ir.Graph([], [], nodes=[])
    sentence = (
        f"{tmp_path}: mm_tokens_per_image is 4, and onnxruntime-genai writes 256 image tokens for every picture; keep the "
        "layout that it has"
    )
    with pytest.raises(GuardError) as refused:
        picture_sections(config, vision, tmp_path)
    assert str(refused.value) == sentence
    with pytest.raises(
        GuardError, match=r"lacks an id or a number that onnxruntime-genai needs \('mm_tokens_per_image' is missing\)"
    ):
        picture_sections({"model_type": "gemma3", "image_token_id": 9}, vision, tmp_path)


@pytest.mark.parametrize(
    "others", [{"past_recurrent.1": ("batch", 4, 8, "width")}, {"past_recurrent.1": ("batch", 4, 8, 16)}, {}]
)
def test_linear_layers_whose_states_have_no_size_in_common_are_refused(
    others: dict[str, tuple[int | str, ...]],
) -> None:
    """genai makes the states of all layers as large as those of the first, and all their sizes but the batch's fixed."""
    conv = {f"past_conv.{layer}": ("batch", 64, 4) for layer in range(2)}
    same = {f"past_recurrent.{layer}": ("batch", 4, 8, 8) for layer in range(2)}

    def decoder(shapes: dict[str, tuple[int | str, ...]]) -> ir.Graph:
        values = [
            ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
            for name, shape in shapes.items()
        ]
        return ir.Graph(values, [], nodes=[])

    pipeline = PIPELINES["qwen3_5"]
    assert pipeline.of_decoder(2, decoder(conv | same)) == {}
    wrong = conv | same | others if others else conv
    with pytest.raises(GuardError) as refused:
        pipeline.of_decoder(2, decoder(wrong))
    assert str(refused.value) == (
        "its linear layers have no states of one size (past_recurrent), as onnxruntime-genai feeds them; keep the layout that "
        "it has"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "token_type_ids",
            "in this decoder the tokens of a picture see one another; package it with --genai, or keep the layout that it has",
        ),
        (
            SUPERVISOR_INPUT,
            "modes supervise and combined need a text-only pass before each answer; export in mode restore",
        ),
    ],
)
def test_a_decoder_with_an_input_that_genai_does_not_feed_is_refused(name: str, reason: str) -> None:
    """Token types where no pipeline makes them; a mode of two passes."""
    inputs = [ir.Value(name=each, type=ir.TensorType(ir.DataType.INT64)) for each in (EMBEDS, name)]
    decoder = ir.Model(ir.Graph(inputs, [], nodes=[]), ir_version=9)
    with pytest.raises(GuardError) as refused:
        require_known(decoder, "model.onnx", RUNTIME, FED_PICTURES)
    assert str(refused.value) == f"model.onnx: takes {name!r}, which onnxruntime-genai does not feed: {reason}"
