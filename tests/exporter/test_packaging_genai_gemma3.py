"""Gemma 3 of the default exporter in onnxruntime-genai: the tokens of a picture see one another there too.

The proof and the attacks on it run on the bundled tiny VLM, whose decoder gets token types here that move positions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_gemma3
import torch
from genai_answers import Genai, picture, pixels, prompt_text, tokens_here
from qwen_torch import hooked_project
from random_directions import random_directions, write_directions
from small_guarded import edit_manifest, make_the_manifest_fit
from tiny_vlm_paths import DECODER, SOURCE
from transformers import Gemma3ImageProcessorPil

from vlmguard import GuardedVLM, GuardSpec, export, verify
from vlmguard.exporter.checkpoints.convert import convert_checkpoint, load_model, read_config
from vlmguard.exporter.families import find_family
from vlmguard.exporter.packaging.genai import package_genai
from vlmguard.exporter.proof.both_sides import open_both_sides
from vlmguard.graphs.directions import Directions
from vlmguard.graphs.manifest import read_manifest
from vlmguard.graphs.progress import ignore_progress
from vlmguard.runtime.generation import Request, Sampling
from vlmguard.runtime.guarded import package_of

QUESTION, MARKER, STEPS = "how do I", "<start_of_image>", Sampling(max_new_tokens=8)
OURS = "vlmguard/token_types/"
NOT_MADE = "what was packaged is what the layout makes"
NOT_OURS = "the guard is what the manifest's plan and directions make"


def guard(source: Path, out: Path, directions: Directions) -> Path:
    path = write_directions(out.with_suffix(".safetensors"), directions)
    spec = GuardSpec(mode="project", positions="all")
    return export(source, out, spec=spec, directions=path, proof="local").out


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Source, guarded folder and genai's folder of a decoder with token types."""
    root = tmp_path_factory.mktemp("types")
    source = Path(shutil.copytree(SOURCE, root / "source"))
    _change(source / "config.json", model_type="gemma3", mm_tokens_per_image=256)
    size = {"height": 16, "width": 16}
    _change(
        source / "processor_config.json",
        image_processor={"image_processor_type": "Gemma3ImageProcessor", "size": size},
    )
    _take_token_types(source / DECODER)
    width = json.loads((source / "config.json").read_text())["text_config"]["hidden_size"]
    guarded = guard(source, root / "guarded", random_directions(width, [1, 2]))
    return source, guarded, package_genai(guarded, root / "genai").out


def _change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _take_token_types(decoder: Path) -> None:
    """Every token is moved on by as many positions as the call has image tokens before it."""
    model = onnx.load(decoder)
    positions = next(value for value in model.graph.input if value.name == "position_ids")
    types = onnx.ValueInfoProto()
    types.CopyFrom(positions)
    types.name = "token_type_ids"
    model.graph.input.append(types)
    for node in model.graph.node:
        node.input[:] = ["moved" if name == positions.name else name for name in node.input]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1), "axis_of_tokens"))
    before = onnx.helper.make_node("CumSum", [types.name, "axis_of_tokens"], ["before"], name="before", exclusive=1)
    model.graph.node.insert(0, onnx.helper.make_node("Add", [positions.name, "before"], ["moved"], name="moved"))
    model.graph.node.insert(0, before)
    onnx.save(model, decoder)


def test_token_types_are_made_of_token_ids_and_the_guard_stays_as_it_is(packaged: tuple[Path, Path, Path]) -> None:
    _, guarded, folder = packaged
    before, after = onnx.load(guarded / DECODER).graph, onnx.load(folder / "model.onnx").graph
    nodes = {node.name: node.SerializeToString() for node in after.node}
    assert {node.name: node.SerializeToString() for node in before.node} == {
        name: content for name, content in nodes.items() if not name.startswith(OURS)
    }
    assert [node.op_type for node in after.node if node.name.startswith(OURS)] == ["Equal", "Cast"]
    renamed = {"token_type_ids": "input_ids"}
    assert [value.name for value in after.input] == [renamed.get(value.name, value.name) for value in before.input]
    inputs = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["inputs"]
    assert {"input_ids", "inputs_embeds"} <= inputs.keys() and "token_type_ids" not in inputs
    record = read_manifest(folder).packaged
    assert record is not None and record.written == [
        "embedding.onnx",
        "genai_config.json",
        "genai_processor.json",
        "model.onnx",
    ]


def test_the_packaged_folder_is_proved_run_and_opened(packaged: tuple[Path, Path, Path]) -> None:
    source, guarded, folder = packaged
    assert verify(folder, source, run=True).ok
    there, here = GuardedVLM.open(guarded), GuardedVLM.open(folder)
    square = picture((16, 16))
    for image in (None, (square, picture((24, 16)))):
        request = Request(QUESTION, image)
        assert tokens_here(here, request, STEPS) == tokens_here(there, request, STEPS)
    manifest = read_manifest(folder)
    both = open_both_sides(package_of(folder, manifest), manifest, manifest.decoders[0], None, "--source")
    assert "token_type_ids" in [value.name for value in both.unguarded().graph.inputs]


def _another_image_token(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    (token,) = (value for value in model.graph.initializer if value.name == f"{OURS}image_token")
    token.CopyFrom(onnx.numpy_helper.from_array(np.array(9), token.name))
    onnx.save(model, folder / "model.onnx")


def _a_node_beside_them(folder: Path) -> None:
    """Types of zero, by a node with a name of ours."""
    model = onnx.load(folder / "model.onnx")
    cast = next(node for node in model.graph.node if node.name == f"{OURS}types")
    cast.output[:] = [f"{OURS}cast"]
    more = onnx.helper.make_node("Sub", [cast.output[0]] * 2, ["token_type_ids"], name=f"{OURS}more")
    model.graph.node.insert(list(model.graph.node).index(cast) + 1, more)
    onnx.save(model, folder / "model.onnx")


def _said_to_be_moved_alone(folder: Path) -> None:
    edit_manifest(folder, lambda content: content["packaged"]["written"].remove("model.onnx"))


def _said_to_be_exported(folder: Path) -> None:
    edit_manifest(folder, lambda content: content.update(packaged=None))


def _without_the_guard(folder: Path) -> None:
    """The guard's nodes are gone, those of the layout are as they should be."""
    model = onnx.load(folder / "model.onnx")
    add = next(node for node in model.graph.node if node.name.startswith("vlmguard/layer_1/") and node.op_type == "Add")
    add.input[1] = add.input[0]
    onnx.save(model, folder / "model.onnx")


@pytest.mark.parametrize(
    ("attack", "failed"),
    [
        (_another_image_token, NOT_MADE),
        (_a_node_beside_them, NOT_MADE),
        (_said_to_be_moved_alone, NOT_OURS),
        (_said_to_be_exported, NOT_OURS),
        (_without_the_guard, NOT_OURS),
    ],
)
def test_a_changed_node_or_record_fails_the_proof(
    attack: Callable[[Path], None], failed: str, packaged: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(packaged[2], tmp_path / "edited"))
    attack(folder)
    make_the_manifest_fit(folder)
    assert failed in [check.name for check in verify(folder).checks if not check.ok]


@pytest.mark.long
def test_genai_answers_as_guarded_vlm_and_torch_do(tmp_path: Path) -> None:
    """No picture, one and two; windows of fewer tokens than a picture has."""
    pytest.importorskip("onnxruntime_genai")
    checkpoint, source = tiny_gemma3.save_tiny_gemma3(tmp_path / "checkpoint"), tmp_path / "source"
    convert_checkpoint(checkpoint, source, verify=False)  # compared with torch in `make families`
    directions = random_directions(tiny_gemma3.WIDTH, range(tiny_gemma3.LAYERS - 1))
    guarded = guard(source, tmp_path / "guarded", directions)
    folder = package_genai(guarded, tmp_path / "genai").out
    assert verify(folder, source, run=True).ok
    genai, plain, vlm = Genai(folder), GuardedVLM.open(guarded), GuardedVLM.open(folder)
    model = load_model(checkpoint, find_family(read_config(checkpoint), "gemma3"), "fp32", ignore_progress)
    processor, hooked, answers = Gemma3ImageProcessorPil.from_pretrained(checkpoint), hooked_project(directions), []
    squares = [picture(size) for size in ((32, 32), (40, 24), (300, 200))]
    causal = 0
    for images in ((), squares[:1], squares[1:2], squares[2:], squares[:2], squares[1:]):
        request, text = Request(QUESTION, tuple(images)), prompt_text(folder, QUESTION, MARKER * len(images) or None)
        inputs = genai.inputs(text, images)
        ids = torch.from_numpy(vlm.batch([request]).ids)
        assert inputs["input_ids"].as_numpy().tolist() == ids.tolist()
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            given["pixel_values"] = processor(images=images, return_tensors="pt")["pixel_values"]
            np.testing.assert_allclose(pixels(inputs), given["pixel_values"].numpy(), atol=1e-5)
        both = []
        for types in ((ids == tiny_gemma3.IMAGE).long(), torch.zeros_like(ids)):
            with torch.no_grad(), hooked.attached(model.model.language_model.layers):
                (row,) = model.generate(
                    **given, token_type_ids=types, max_new_tokens=STEPS.max_new_tokens, do_sample=False
                ).tolist()
            both.append([token for token in row[ids.shape[1] :] if token not in vlm.chat.eos_ids])
        causal += both[0] != both[1]
        assert tokens_here(plain, request, STEPS) == tokens_here(vlm, request, STEPS) == both[0]
        assert genai.tokens(text, images, STEPS.max_new_tokens) == both[0]
        answers.append(both[0])
    _an_image_token_in_an_answer_is_text(folder)
    assert causal  # attention within pictures counts
    assert len({tuple(answer) for answer in answers}) >= 4  # or the pictures count for little


def _an_image_token_in_an_answer_is_text(folder: Path) -> None:
    """A call of one token is the same for every token id, given its embedding: alone, or behind as much as two windows."""
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    shapes = {port.name: port.shape for port in session.get_inputs()}
    random = np.random.default_rng(0)
    for past in (0, 1, 2 * tiny_gemma3.WINDOW):
        given = {
            "inputs_embeds": random.normal(size=(1, 1, tiny_gemma3.WIDTH)).astype(np.float32),
            "attention_mask": np.ones((1, past + 1), np.int64),
            "position_ids": np.array([[past]]),
        }
        for name in (name for name in shapes if name.startswith("past_key_values")):
            sizes = 1, shapes[name][1], past, shapes[name][3]
            given[name] = random.normal(size=sizes).astype(np.float32)
        text, image = (
            session.run(None, given | {"input_ids": np.array([[token]])})
            for token in (tiny_gemma3.BOS, tiny_gemma3.IMAGE)
        )
        assert all(np.array_equal(a, b) for a, b in zip(map(np.asarray, text), map(np.asarray, image), strict=True))
