"""The step behind transformers' own exporter: the real one, on a tiny LLaVA in one graph, pictures and all."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from random_directions import random_directions, write_directions
from tiny_models import IMAGE_TOKEN_ID, IMAGE_TOKENS, TEXT_WIDTH, llava_config

import vlmguard
from vlmguard.exporter.proof.verify import verify
from vlmguard.graphs.anatomy import guarded_layers
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.graph_io import load_graph
from vlmguard.graphs.spec import GuardSpec

pytest.importorskip("onnxruntime")
pytest.importorskip("transformers.exporters")

LAYERS = 1  # each takes seconds to export
TOLERANCE = 1e-4
NOTHING_OPENS = 1e6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What a user has: the model, what it was exported with, what the exporter made of it; and directions."""
    import torch
    from transformers import LlavaForConditionalGeneration
    from transformers.exporters import OnnxConfig, OnnxExporter

    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(llava_config(LAYERS, "llama", "clip")).eval()
    ids = torch.randint(IMAGE_TOKEN_ID + 1, 19, (2, IMAGE_TOKENS + 6))
    ids[:, 2 : 2 + IMAGE_TOKENS] = IMAGE_TOKEN_ID
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 16, 16)}
    exported = OnnxExporter().export(model, dict(inputs), OnnxConfig(dynamic=True))
    folder = tmp_path_factory.mktemp("exported") / "saved"
    exported.save_pretrained(folder)
    directions = random_directions(TEXT_WIDTH, range(LAYERS))
    file = write_directions(folder.parent / "d.safetensors", directions)
    return SimpleNamespace(
        model=model, inputs=inputs, exported=exported, folder=folder, directions=directions, file=file
    )


def said(folder: Path, inputs: Any) -> np.ndarray:
    """The logits, as transformers' own runner gives them for a folder."""
    from transformers.exporters import ExportedModel

    return ExportedModel.from_pretrained(folder)(**inputs).logits.numpy()


def test_a_model_in_memory_is_guarded_and_transformers_says_what_hooks_say(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    import torch
    from torch_hooks import HookedGuard

    out = tmp_path / "out"
    wish = GuardSpec(mode="project", layers=(0,))
    done = vlmguard.guard_exported(made.exported, out, inputs=made.inputs, spec=wish, directions=made.file)
    assert all(check.ok for check in done.proof)
    assert any("given inputs (inputs.npz)" in check.note for check in done.proof)
    assert guarded_layers(load_graph(out / "model.onnx").graph) == (0,)
    assert verify(out).ok

    hooks = HookedGuard(made.directions.layers, mode="project")
    with torch.no_grad(), hooks.attached(made.model.model.language_model.layers):
        hooks.set_call(attention_mask=made.inputs["attention_mask"])
        expected = made.model(**made.inputs).logits.numpy()
    found = said(out, made.inputs)
    assert np.abs(found - expected)[:, -1].max() < TOLERANCE
    assert np.abs(found - said(made.folder, made.inputs))[:, -1].max() > 100 * TOLERANCE


def test_a_folder_is_guarded_and_a_closed_gate_changes_nothing(made: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wish = GuardSpec(mode="steer", tau=NOTHING_OPENS)
    vlmguard.guard_exported(made.folder, out, inputs=made.inputs, spec=wish, directions=made.file)
    assert verify(out, made.folder).ok
    assert np.array_equal(said(out, made.inputs), said(made.folder, made.inputs))


def test_transformers_runner_refuses_a_guard_that_wants_a_supervisor(made: SimpleNamespace, tmp_path: Path) -> None:
    out, wish = tmp_path / "out", GuardSpec(mode="supervise", alpha=1.0)
    vlmguard.guard_exported(made.folder, out, inputs=made.inputs, spec=wish, directions=made.file)
    with pytest.raises(ValueError, match=r"The graph takes \['vlmguard.supervisor'\]"):
        said(out, made.inputs)


# Refusals


def refusal(exported: Any, out: Path, **options: Any) -> str:
    with pytest.raises(GuardError) as refused:
        vlmguard.guard_exported(exported, out, **options)
    assert not out.exists()
    return str(refused.value)


def test_without_a_picture_the_proof_runs_on_made_ones(made: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = vlmguard.guard_exported(made.folder, out, spec=GuardSpec(mode="project"), directions=made.file)
    assert done.proved.level == "full"
    (closed,) = [c for c in done.decoders[0].proof if c.name == "closed gate equals the original bit for bit"]
    assert (
        "seeded random inputs" in closed.note and "the graph takes 'pixel_values', which no prompt fills" in closed.note
    )


def test_a_processor_for_a_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "saved", tmp_path / "out", processor=object()) == (
        f"{tmp_path / 'saved'}: is a folder already, a processor is for a model in memory; save it there with save_pretrained"
    )


def test_what_is_not_onnx(tmp_path: Path) -> None:
    openvino = SimpleNamespace(export_format="openvino")
    assert refusal(openvino, tmp_path / "out") == (
        "a SimpleNamespace of format openvino was given, the guard goes into ONNX; export with OnnxExporter, or name the folder"
    )


def test_inputs_for_several_graphs(tmp_path: Path) -> None:
    text = '<ir_version: 9, opset_import: ["" : 18]> g (float[B, S, 8] x) => (float[B, S, 8] past_key_values) {BODY}'
    graph = onnx.parser.parse_model(text.replace("BODY", "past_key_values = Neg(x)"))
    names = ("decode.onnx", "language_model.onnx")
    for name in names:
        onnx.save(graph, tmp_path / name)
    (tmp_path / "export.json").write_text(json.dumps({"components": {name: {"file": name} for name in names}}))
    assert refusal(tmp_path, tmp_path.parent / "out", inputs={}) == (
        "inputs are for a model in one graph, this export has decode.onnx, language_model.onnx; leave them out"
    )
