"""Large weights inside a file stay there: the outline is the same graph, and what is written is what protobuf writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hand_graphs import WIDTH, decoder
from onnx import numpy_helper

from vlmguard.graphs import inline_weights
from vlmguard.graphs.errors import GuardError, ModelUnreadable
from vlmguard.graphs.graph_io import external_files, graph_bytes, in_memory, load_graph, save_graph
from vlmguard.graphs.inline_weights import InFile, read_outline, weights_in_files
from vlmguard.graphs.proof.structure import initializers_untouched, same_graph


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inline_weights, "LARGE_FILE", 0)
    monkeypatch.setattr(inline_weights, "_LARGE_TENSOR", 16)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A decoder with its weights inside."""
    (tmp_path / "model.onnx").write_bytes(ir.to_proto(decoder(layers=2)).SerializeToString(deterministic=True))
    return tmp_path / "model.onnx"


def test_the_outline_has_every_weight_as_a_place_in_the_file(path: Path) -> None:
    whole = onnx.load(path)
    outline = read_outline(path)
    assert outline is not None and len(outline.places) == len(whole.graph.initializer) > 2
    content = path.read_bytes()
    for index, (offset, length) in outline.places.items():
        assert content[offset : offset + length] == whole.graph.initializer[index].raw_data
    assert len(outline.content) < len(content) - WIDTH * WIDTH * 4


def test_the_loaded_graph_is_the_whole_one(path: Path, tmp_path: Path) -> None:
    loaded, whole = load_graph(path), ir.from_proto(onnx.load(path))
    assert weights_in_files(loaded) and external_files(path) == []
    check = same_graph("same", whole, loaded)
    assert check.ok, check.note
    assert graph_bytes(loaded) == path.read_bytes()


def test_a_file_with_another_hard_link_is_serialized_too(path: Path, tmp_path: Path) -> None:
    """As the embedding graph of a guarded folder has, which `package` writes anew for onnxruntime-genai."""
    os.link(path, tmp_path / "linked.onnx")
    assert graph_bytes(load_graph(path)) == path.read_bytes()


def test_a_weight_that_is_said_to_be_inside_is_left_there_too(path: Path) -> None:
    """onnx writes the default place after it has loaded external data."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        tensor.data_location = onnx.TensorProto.DEFAULT
    path.write_bytes(model.SerializeToString())
    assert len(weights_in_files(load_graph(path))) == len(model.graph.initializer)


def test_what_is_saved_is_what_protobuf_writes(path: Path, tmp_path: Path) -> None:
    model = load_graph(path)
    value = next(iter(model.graph.initializers.values()))
    assert isinstance(value.const_value, InFile)
    model.metadata_props["vlmguard.test"] = "1"
    save_graph(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == graph_bytes(model)
    assert initializers_untouched(load_graph(path), load_graph(tmp_path / "out.onnx")).ok


def test_a_weight_that_differs_in_one_bit_is_seen(path: Path, tmp_path: Path) -> None:
    content = bytearray(path.read_bytes())
    weights = weights_in_files(load_graph(path))
    changed = list(weights.values())[-1]
    content[changed.offset + changed.length - 1] ^= 1
    (tmp_path / "other.onnx").write_bytes(content)
    check = initializers_untouched(load_graph(path), load_graph(tmp_path / "other.onnx"))
    assert not check.ok and check.note == changed.name


def test_a_session_maps_the_weights(path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from vlmguard.runtime.runners import open_runner

    content, folder = in_memory(load_graph(path), path.parent)
    places = [t for t in onnx.ModelProto.FromString(content).graph.initializer if t.data_location == 1]
    assert folder == path.parent and len(places) == len(weights_in_files(load_graph(path)))
    feeds = {
        "inputs_embeds": np.random.default_rng(0).normal(size=(2, 3, WIDTH)).astype(np.float32),
        "attention_mask": np.ones((2, 3), np.int64),
    }
    mapped, whole = open_runner(path, folder), open_runner(path.read_bytes(), folder)
    for name, array in whole.run(feeds).items():
        np.testing.assert_array_equal(mapped.run(feeds)[name], array)


def test_a_model_that_is_a_link_is_mapped_from_where_it_leads(path: Path, tmp_path: Path) -> None:
    """Hugging Face's cache is made of such links, and their targets have other names."""
    pytest.importorskip("onnxruntime")
    from vlmguard.runtime.runners import open_runner

    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    path.rename(tmp_path / "blobs" / "0123")
    link = tmp_path / "snapshot" / "model.onnx"
    link.symlink_to(tmp_path / "blobs" / "0123")
    content, folder = in_memory(load_graph(link, trust_links=True), link.parent)
    assert folder == tmp_path / "blobs" and len(content) < link.stat().st_size
    assert set(open_runner(link, link.parent).outputs) == {"logits", "hidden"}


def test_a_graph_of_another_folder_is_serialized_whole(path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    content, _ = in_memory(load_graph(path), tmp_path / "elsewhere")
    assert content == path.read_bytes()
    assert in_memory(load_graph(path), path.parent, maps=False)[0] == path.read_bytes()


def test_a_file_that_would_pass_two_gigabytes_is_refused(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmguard.graphs import graph_io

    monkeypatch.setattr(graph_io, "LARGEST_FILE", 1000)  # of what is written; reading has its own
    with pytest.raises(GuardError) as caught:
        save_graph(load_graph(path), tmp_path / "out.onnx")
    assert str(caught.value) == (
        "out.onnx: the guarded graph passes 2 GiB; save the model with external data first, or choose --lowering lowrank"
    )
    assert not (tmp_path / "out.onnx").exists()


# ------------------------------------------------------------------------------------------------- what is left to protobuf


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def two_graphs(content: bytes) -> bytes:
    """Protobuf merges them."""
    return content + onnx.ModelProto(graph=onnx.GraphProto(name="again")).SerializeToString()


def group(content: bytes) -> bytes:
    return content + b"\x7b"  # field 15 starts a group, which onnx has none of


@pytest.mark.parametrize("change", [truncated, two_graphs, group])
def test_unusual_bytes_are_left_to_protobuf(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))
    assert read_outline(path) is None


def test_a_small_file_and_one_of_another_name_are_read_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_outline(path.rename(path.with_suffix(".bin"))) is None
    monkeypatch.setattr(inline_weights, "LARGE_FILE", 1 << 20)
    assert read_outline(path.with_suffix(".bin").rename(path)) is None


def tampered(path: Path, change: Callable[[onnx.TensorProto], None]) -> str:
    model = onnx.load(path, load_external_data=False)
    change(model.graph.initializer[0])
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelUnreadable) as caught:
        load_graph(path)
    return str(caught.value)


def test_a_tensor_of_another_size_is_refused(path: Path) -> None:
    name = onnx.load(path).graph.initializer[0].name
    said = tampered(path, lambda tensor: tensor.dims.__setitem__(0, 17))
    assert said == f"{path}: tensor {name!r} has shape [17, 16] but 1024 bytes; it is damaged, do not use it"


def test_numbers_in_two_forms_are_refused(path: Path) -> None:
    name = onnx.load(path).graph.initializer[0].name
    said = tampered(path, lambda tensor: tensor.float_data.append(1.0))
    assert said == f"{path}: tensor {name!r} has its numbers in several forms, and readers differ; do not use it"


def test_a_file_that_names_itself_as_external_data_is_refused(path: Path) -> None:
    """Only places that were found in the file itself are trusted."""

    def refer(tensor: onnx.TensorProto) -> None:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", path.name), ("offset", "0"), ("length", "1024")):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value

    assert tampered(path, refer).endswith("which is no file for weights; do not use it")


def test_numbers_are_read_from_the_file(path: Path) -> None:
    whole = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    for name, tensor in weights_in_files(load_graph(path)).items():
        np.testing.assert_array_equal(tensor.numpy(), whole[name])
        assert tensor.tobytes() == whole[name].tobytes() and tensor.nbytes == whole[name].nbytes
