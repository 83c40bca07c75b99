"""A small guarded package, made once from a hand-written graph, and the edits of somebody who tampers with it.

The manifest is always made to fit: every digest is that of the edited file. What is caught then is caught by the proof.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from hand_graphs import Kind, decoder, directions
from onnx import numpy_helper
from random_directions import write_directions

import vlmguard
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.directions import read_directions
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.proof.strip import strip_guard

NAME = "model.onnx"


def small_model(folder: Path, kind: Kind = "add", outside: bool = True, seed: int = 0) -> Path:
    """A decoder of three layers, its weights in `model.onnx.data`."""
    folder.mkdir(parents=True)
    proto = ir.to_proto(decoder(kind, layers=3, seed=seed))
    data = {"save_as_external_data": True, "location": f"{NAME}.data", "size_threshold": 0} if outside else {}
    onnx.save(proto, folder / NAME, **data)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"model": {}}')
    return folder / NAME


def guard_small(model: Path, out: Path, **wish: Any) -> Path:
    """Guarded on layers 0 and 1; nothing is run."""
    found = write_directions(model.parent.parent / f"{out.name}.safetensors", directions((0, 1)))
    try:
        spec = vlmguard.GuardSpec(**wish)
        return vlmguard.export(model, out, directions=found, spec=spec, proof="structure").out
    finally:
        found.unlink()


def edit_manifest(folder: Path, change: Callable[[dict], Any]) -> None:
    path = folder / "guard.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def make_the_manifest_fit(folder: Path) -> None:
    """What somebody would do who changes a file and does not want it seen."""

    def fit(content: dict) -> None:
        for name in content["files"]:
            path = folder / name
            content["files"][name] |= {"sha256": sha256(path), "size": path.stat().st_size}

    edit_manifest(folder, fit)


def make_the_plan_fit(folder: Path) -> None:
    """What our own code plans for the graph as it is now, written into the manifest; no change where it refuses the graph."""
    package = open_package(folder)
    try:
        model = package.load_decoder()
        strip_guard(model)
        manifest = json.loads((folder / "guard.json").read_text(encoding="utf-8"))
        spec = {key: tuple(value) if isinstance(value, list) else value for key, value in manifest["spec"].items()}
        found = read_directions(folder / "directions.safetensors")
        plan = plan_guard(model, dissect(model), found, vlmguard.GuardSpec(**spec))
    except vlmguard.GuardError:
        return
    edit_manifest(folder, lambda content: content["decoders"][0].update(plan=plan.to_json()))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def edit_graph(folder: Path, change: Callable[[onnx.ModelProto], Any]) -> None:
    """The decoder's protobuf, changed in place; weights outside stay outside."""
    model = onnx.load(folder / NAME, load_external_data=False)
    change(model)
    (folder / NAME).write_bytes(model.SerializeToString())


def node_called(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def tensor_called(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def set_numbers(tensor: onnx.TensorProto, change: Callable[[np.ndarray], np.ndarray]) -> None:
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(array), array.dtype), tensor.name))


def one_ulp(array: np.ndarray) -> np.ndarray:
    """The last number of an array, to its neighbour: the least that can be changed."""
    changed = np.array(array)
    changed.reshape(-1)[-1] = np.nextafter(changed.reshape(-1)[-1], np.float32(1e9))
    return changed
