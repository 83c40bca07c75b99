"""A folder of transformers' `export_for_generation`: both decoder graphs are guarded, and transformers still loads it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from random_directions import random_directions, write_directions
from zoo.generation_folders import DECODE, PROMPT, GenerationFolder

import vlmguard
from vlmguard.exporter.proof.verify import verify
from vlmguard.graphs.anatomy import guarded_layers
from vlmguard.graphs.digests import sha256_file
from vlmguard.graphs.errors import ManifestMismatch
from vlmguard.graphs.graph_io import load_graph
from vlmguard.graphs.manifest import read_manifest
from vlmguard.graphs.spec import GuardSpec

pytest.importorskip("onnxruntime")
pytest_plugins = ("zoo_fixtures",)
pytestmark = pytest.mark.zoo  # minutes to export

Folders = Callable[[str], GenerationFolder]


def guarded(source: GenerationFolder, tmp_path: Path, tau: float) -> Path:
    file = write_directions(tmp_path / "d.safetensors", random_directions(source.width, [0, 1]))
    wish = GuardSpec(mode="steer", tau=tau, positions="all")
    return vlmguard.export(source.folder, tmp_path / "out", directions=file, spec=wish, allow_no_effect=True).out


def said(folder: Path, source: GenerationFolder) -> dict[str, Any]:
    """What transformers itself says with the folder's graphs, on what `generate()` would hand to each."""
    from transformers.exporters import ExportedModel

    runners = ExportedModel.from_pretrained(folder).runners
    calls = source.calls(2, 9, 1)
    answers = {}
    for part, output in ((PROMPT, "last_hidden_state"), (DECODE, "logits")):
        given = copy.deepcopy({k: v for k, v in calls[part][1].items() if k in runners[part].metadata.kwargs})
        answers[part] = runners[part](**given)[output]
    return answers


def test_both_graphs_are_guarded_and_transformers_loads_them(generation_folders: Folders, tmp_path: Path) -> None:
    import torch

    source = generation_folders("llava-generation")
    out = guarded(source, tmp_path, tau=1e6)  # a gate that nothing opens
    manifest = read_manifest(out)
    assert [record.path for record in manifest.decoders] == [f"{DECODE}.onnx", f"{PROMPT}.onnx"]
    for record in manifest.decoders:
        assert guarded_layers(load_graph(out / record.path).graph) == (0, 1)
        assert all(check["ok"] for check in record.proof)
    assert verify(out, source.folder).ok
    expected, found = said(source.folder, source), said(out, source)
    for part in (PROMPT, DECODE):
        assert torch.equal(expected[part], found[part]), part


def test_a_graph_that_was_tampered_with_is_caught(generation_folders: Folders, tmp_path: Path) -> None:
    source = generation_folders("llava-generation")
    out = guarded(source, tmp_path, tau=0.0)
    path = out / f"{PROMPT}.onnx"
    model = onnx.load(path, load_external_data=False)
    tau = next(tensor for tensor in model.graph.initializer if tensor.name == "vlmguard/layer_1/tau")
    tau.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tau) + 9, tau.name))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ManifestMismatch) as caught:
        verify(out)
    sentence = f"{out}: {PROMPT}.onnx is not the file that was proved (SHA-256 differs); export again"
    assert str(caught.value) == sentence
    manifest = json.loads((out / "guard.json").read_text())
    manifest["files"][path.name]["sha256"] = sha256_file(path)
    (out / "guard.json").write_text(json.dumps(manifest))
    failing = [check.name for check in verify(out).checks if not check.ok]
    assert failing == [f"{PROMPT}.onnx: the guard is what the manifest's plan and directions make"]
