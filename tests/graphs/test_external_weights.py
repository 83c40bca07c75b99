"""Numbers are read from each file that opening a graph accepted: hard-linked by an export, or in Hugging Face's cache."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hand_graphs import uncalibrated
from hugging_face_cache import into_cache
from text_decoder import decoder

from vlmguard.exporter.pipeline import export
from vlmguard.exporter.proof.verify import verify
from vlmguard.graphs import inline_weights, staging
from vlmguard.graphs.directions import directions_bytes
from vlmguard.graphs.errors import ModelUnreadable
from vlmguard.graphs.graph_io import graph_bytes, load_graph, save_graph
from vlmguard.graphs.spec import GuardSpec


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A decoder with its weights in a file beside it."""
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / "model.onnx"
    onnx.save(ir.to_proto(decoder()), path, save_as_external_data=True, location="weights.data", size_threshold=0)
    return path


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A decoder with its weights in the graph's own file, as if that were a large one."""
    (tmp_path / "source").mkdir()
    monkeypatch.setattr(inline_weights, "LARGE_FILE", 1)
    monkeypatch.setattr(inline_weights, "_LARGE_TENSOR", 1)
    return save(tmp_path / "source" / "model.onnx")


def save(path: Path) -> Path:
    save_graph(decoder(), path)
    return path


def require_same_numbers(path: Path) -> None:
    """Every weight is left where it is, and read in each way."""
    weights, plain = load_graph(path).graph.initializers, decoder().graph.initializers
    assert weights.keys() == plain.keys()
    for name, value in plain.items():
        tensor, expected = weights[name].const_value, value.const_value
        assert isinstance(tensor, ir.ExternalTensor | inline_weights.InFile)
        np.testing.assert_array_equal(tensor.numpy(), expected.numpy())
        np.testing.assert_array_equal(np.asarray(tensor), expected.numpy())
        assert tensor.tobytes() == expected.tobytes()
        with (path.parent / "copied").open("wb") as file:
            tensor.tofile(file)
        assert (path.parent / "copied").read_bytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["beside", "inside"])
def test_a_file_with_two_names_is_read(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path: Path = request.getfixturevalue(kind)
    before = graph_bytes(load_graph(path))
    os.link(path if kind == "inside" else path.with_name("weights.data"), tmp_path / "second name")
    require_same_numbers(path)
    assert graph_bytes(load_graph(path)) == before  # the same references


def test_a_link_of_hugging_faces_cache_is_read(beside: Path, tmp_path: Path) -> None:
    require_same_numbers(into_cache(beside.parent, tmp_path) / "model.onnx")


def test_a_link_out_of_the_folder_is_still_refused(beside: Path, tmp_path: Path) -> None:
    data = beside.with_name("weights.data")
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelUnreadable, match="is a link out of the model's folder"):
        load_graph(beside)


def test_a_constant_of_a_node_is_read(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g () => (float[2] y) { y = Constant <value = float[2] {1, 2}> () }'
    )
    tensor = model.graph.node[0].attribute[0].t
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([1, 2], np.float32)))
    (tmp_path / "d").write_bytes(tensor.raw_data)
    onnx.external_data_helper.set_external_data(tensor, location="d", offset=0, length=8)
    tensor.ClearField("raw_data")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    os.link(tmp_path / "d", tmp_path / "second name")
    (node,) = load_graph(tmp_path / "m.onnx").graph
    np.testing.assert_array_equal(node.attributes["value"].as_tensor().numpy(), [1, 2])


def test_a_guard_in_the_weights_is_proved_where_an_export_linked_them(
    beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fold` reads the source's weights, and its proof the guarded model's; after one export each has a second name."""
    monkeypatch.setattr(staging, "BIG", 1)
    monkeypatch.setattr(staging, "_reflink", lambda source, destination: False)
    (beside.parent / "directions.safetensors").write_bytes(directions_bytes(uncalibrated((0,), 1)))
    spec = GuardSpec(mode="project", positions="all", lowering="fold", direction_of=0)
    for name in ("first", "second"):
        result = export(beside, tmp_path / name, spec=spec)
        assert all(check.ok for check in result.proof)
    assert beside.with_name("weights.data").stat().st_nlink == 3
    assert verify(tmp_path / "second", beside, run=True).ok
