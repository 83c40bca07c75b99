"""Qwen3-VL for onnxruntime-genai: what its folder says, what fails its proof. Answers: `test_packaging_genai_pictures`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import tiny_qwen
from hand_graphs import text_model
from random_directions import random_directions, write_directions
from small_guarded import make_the_manifest_fit

from vlmguard import GuardSpec, export, verify
from vlmguard.exporter.checkpoints.convert import convert_checkpoint
from vlmguard.exporter.checkpoints.genai_around_decoder import has_pipeline
from vlmguard.exporter.packaging.genai import package_genai
from vlmguard.exporter.packaging.genai_pictures import fit_decoder
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.graph_io import save_graph
from vlmguard.graphs.manifest import read_manifest
from vlmguard.graphs.package import ModelPackage

WIDE = (1 + len(tiny_qwen.DEEPSTACK)) * tiny_qwen.TEXT_WIDTH


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source and genai's folder."""
    root = tmp_path_factory.mktemp("deep")
    checkpoint = tiny_qwen.save_byte_qwen("qwen3_vl", root / "checkpoint")
    convert_checkpoint(checkpoint, root / "source", verify=False)
    directions = random_directions(tiny_qwen.TEXT_WIDTH, range(tiny_qwen.LAYERS))
    path = write_directions(root / "directions.safetensors", directions)
    spec = GuardSpec(mode="project", positions="all")
    guarded = export(root / "source", root / "guarded", spec=spec, directions=path, proof="local").out
    return root / "source", package_genai(guarded, root / "genai").out


def declared(graph: Path) -> dict[str, int]:
    """The last size of each input and output with embeddings or features."""
    model = onnx.load(graph).graph
    values = {value.name: value.type.tensor_type.shape.dim for value in (*model.input, *model.output)}
    return {name: dims[-1].dim_value for name, dims in values.items() if "embeds" in name or "features" in name}


@pytest.mark.long
def test_features_of_all_layers_go_through_side_by_side(packaged: tuple[Path, Path]) -> None:
    source, folder = packaged
    assert declared(folder / "vision.onnx") == {"image_features": WIDE}
    assert declared(folder / "embedding.onnx") == {"image_features": WIDE, "inputs_embeds": WIDE}
    assert declared(folder / "model.onnx") == {"inputs_embeds": WIDE}
    model = json.loads((folder / "genai_config.json").read_text())["model"]
    assert (model["type"], model["decoder"]["hidden_size"]) == ("qwen3_vl", WIDE)
    record = read_manifest(folder).packaged
    assert record is not None
    assert record.written == [
        "embedding.onnx",
        "genai_config.json",
        "genai_processor.json",
        "model.onnx",
        "vision.onnx",
    ]
    assert verify(folder, source).ok and verify(folder).ok


def _node(graph: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in graph.graph.node if node.name == f"vlmguard/deepstack/{name}")


def _other_layers(graph: onnx.ModelProto) -> None:
    outputs = _node(graph, "split").output
    outputs[1], outputs[2] = outputs[2], outputs[1]


def _no_layer(graph: onnx.ModelProto) -> None:
    """What the first layer is given is the embedding, not features."""
    first, second, _ = _node(graph, "split").output
    for node in graph.graph.node:
        for place, name in enumerate(node.input):
            if name == second:
                node.input[place] = first


def _other_places(graph: onnx.ModelProto) -> None:
    (entry,) = (entry for entry in graph.metadata_props if entry.key == "vlmguard.deepstack")
    entry.value = "2,3"


def _other_features(graph: onnx.ModelProto) -> None:
    inputs = _node(graph, "joined").input
    inputs[1], inputs[2] = inputs[2], inputs[1]


def _ones(graph: onnx.ModelProto) -> None:
    """Something else than zeros beside the embeddings of words."""
    (pad,) = (node for node in graph.graph.node if node.op_type == "Pad")
    graph.graph.initializer.append(onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [], [1.0]))
    pad.input.append("one")


@pytest.mark.long
@pytest.mark.parametrize(
    ("graph", "edit", "with_source"),
    [
        ("model.onnx", _other_layers, True),
        ("model.onnx", _other_layers, False),
        ("model.onnx", _no_layer, True),
        ("model.onnx", _no_layer, False),
        ("model.onnx", _other_places, True),  # without the source it says nothing about the graph
        ("vision.onnx", _other_features, True),
        ("vision.onnx", _other_features, False),
        ("embedding.onnx", _ones, True),
        ("embedding.onnx", _ones, False),
    ],
)
def test_features_of_another_layer_fail_the_proof(
    graph: str, edit: Callable[[onnx.ModelProto], None], with_source: bool, packaged: tuple[Path, Path], tmp_path: Path
) -> None:
    source, folder = packaged
    folder = Path(shutil.copytree(folder, tmp_path / "edited"))
    model = onnx.load(folder / graph, load_external_data=False)
    edit(model)
    (folder / graph).unlink()  # a link
    onnx.save(model, folder / graph)
    make_the_manifest_fit(folder)
    try:
        proof = verify(folder, source if with_source else None)
    except GuardError:
        return
    assert not proof.ok


@pytest.mark.parametrize(("layers", "taken"), [((0, 2), "deepstack_embeds_0, deepstack_embeds_2"), ((), "no features")])
def test_a_decoder_with_other_features_than_the_vision_encoder_gives_is_refused(
    layers: tuple[int, ...], taken: str, tmp_path: Path
) -> None:
    rows = "".join(f", float[b, s, 2] deepstack_embeds_{layer}" for layer in layers)
    decoder = text_model(
        f"agraph (float[b, s, 2] inputs_embeds{rows}) => (float[b, s, 2] y) {{ y = Neg(inputs_embeds) }}"
    )
    vision = text_model(
        "agraph (float[n, 2] x) => (float[t, 2] image_features, float[t, 2] deepstack_features_0) "
        "{ image_features = Neg(x)\n deepstack_features_0 = Abs(x) }"
    )
    save_graph(vision, tmp_path / "vision.onnx")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    package = ModelPackage(tmp_path, tmp_path / "model.onnx", "genai", vision_encoder=tmp_path / "vision.onnx")
    with pytest.raises(GuardError) as refused:
        fit_decoder(package, decoder)
    assert str(refused.value) == (
        f"{tmp_path / 'model.onnx'}: takes {taken} between its layers, and the vision encoder gives image_features, "
        "deepstack_features_0; convert the checkpoint with `vlmguard convert` and guard that"
    )


def test_the_decoder_of_genais_builder_gets_no_pictures() -> None:
    """It takes no features for DeepStack: with pictures it would be another model."""
    config = {"vision_config": {}, "model_type": "qwen3_vl"}
    assert not has_pipeline(config, "here")
