"""Files of strangers: one test per rule of docs/security.md, with its sentence. Nothing here may be read, run or hang."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hugging_face_cache import into_cache
from onnx import TensorProto, helper, numpy_helper
from small_guarded import NAME, edit_graph, guard_small, small_model, tensor_called
from tiny_vlm_paths import digests

from vlmguard.exporter.proof.verify import verify
from vlmguard.graphs import graph_file, staging
from vlmguard.graphs.errors import GuardError, ModelUnreadable, OutputRefused
from vlmguard.graphs.graph_io import load_graph
from vlmguard.graphs.json_files import read_json
from vlmguard.graphs.layouts import open_package

DATA = f"{NAME}.data"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_model(tmp_path / "m")


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(GuardError) as raised:
        action()
    assert isinstance(raised.value, ModelUnreadable | OutputRefused) and "\n" not in str(raised.value)
    return str(raised.value)


def place(model: Path, **says: str) -> None:
    """What `w0` says of its place; an empty text takes the key away."""

    def change(proto: onnx.ModelProto) -> None:
        tensor = tensor_called(proto, "w0")
        said = {entry.key: entry.value for entry in tensor.external_data} | says
        del tensor.external_data[:]
        for key, value in said.items():
            if value:
                tensor.external_data.add(key=key, value=value)

    edit_graph(model.parent, change)


# ---------------------------------------------------------------------------------------------------------- external data


def test_a_place_has_a_name_that_a_file_can_have(model: Path) -> None:
    """Found by the coverage-guided fuzzer."""
    place(model, location="x" * 300)
    assert refusal(lambda: load_graph(model)) == (
        f"{model}: its external data cannot be found (File name too long); do not use it"
    )


@pytest.mark.parametrize(
    "location",
    ["../w.data", "a/../../w.data", "/etc/passwd", "C:\\w.data", "..\\w.data", "\\\\host\\w.data", "C:w.data"],
)
def test_weights_lie_below_the_graphs_folder(model: Path, location: str) -> None:
    place(model, location=location)
    assert refusal(lambda: load_graph(model)) == (
        f"{model}: keeps weights outside its folder ({location}); do not use it, or move them beside it"
    )


@pytest.mark.parametrize("location", ["guard.json", "other.ONNX", "guard.toml", "."])
def test_weights_are_not_kept_in_files_that_are_something_else(model: Path, location: str) -> None:
    place(model, location=location)
    assert refusal(lambda: load_graph(model)) == (
        f"{model}: keeps weights in {location!r}, which is no file for weights; do not use it"
    )


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize("value", ["-1", "+1", "1e3", "0x10", " 1", "1.5", "٣", "9" * 21])
def test_a_place_is_a_whole_number_of_bytes(model: Path, key: str, value: str) -> None:
    place(model, **{key: value})
    assert refusal(lambda: load_graph(model)) == (
        f"{model}: the {key} of 'w0' is {value!r}, expected bytes from 0 on; do not use it"
    )


def test_a_place_ends_inside_the_file(model: Path) -> None:
    place(model, offset="9" * 20)
    size = (model.parent / DATA).stat().st_size
    assert refusal(lambda: load_graph(model)) == (
        f"{model}: its external data {DATA} has {size} bytes, 'w0' ends at {int('9' * 20) + 1024}; it is truncated, "
        "copy it again"
    )


@pytest.mark.parametrize("length", [1020, 1028, 1 << 40])
def test_a_place_is_as_long_as_the_tensor(model: Path, length: int) -> None:
    place(model, length=str(length))
    assert refusal(lambda: load_graph(model)) == (
        f"{model}: 'w0' takes {length} bytes of {DATA}, its shape and dtype take 1024; do not use it"
    )


def test_two_tensors_have_the_same_bytes_or_none_in_common(model: Path) -> None:
    place(model, offset="1024")  # those of w1
    load_graph(model)
    place(model, offset="1000")
    assert refusal(lambda: load_graph(model)) == (
        f"{model}: in {DATA}, 'w0' overlaps another tensor at 1024; do not use it"
    )


def test_a_place_says_nothing_that_nobody_knows(model: Path) -> None:
    place(model, basepath="/")
    assert refusal(lambda: load_graph(model)) == (
        f"{model}: the place of 'w0' has 'basepath', which is no key of external data; do not use it"
    )


def test_a_place_says_nothing_twice(model: Path) -> None:
    edit_graph(model.parent, lambda proto: tensor_called(proto, "w0").external_data.add(key="location", value="x"))
    assert refusal(lambda: load_graph(model)) == f"{model}: the place of 'w0' has 'location', twice; do not use it"


def test_what_a_node_holds_itself_is_under_the_same_rules(model: Path) -> None:
    """A Constant may say that its numbers are elsewhere too."""
    tensor = TensorProto(name="c", dims=[1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")

    def change(proto: onnx.ModelProto) -> None:
        proto.graph.node.insert(0, helper.make_node("Constant", [], ["k"], name="k", value=tensor))

    edit_graph(model.parent, change)
    assert "keeps weights outside its folder (../secret)" in refusal(lambda: load_graph(model))


@pytest.mark.parametrize("what", ["fifo", "device", "folder"])
def test_nothing_but_a_regular_file_is_opened(model: Path, what: str) -> None:
    """A FIFO would wait for ever, a device has no end."""
    data = model.parent / DATA
    data.unlink()
    if what == "fifo":
        os.mkfifo(data)
    elif what == "device":
        data.symlink_to("/dev/zero")
    else:
        data.mkdir()
    assert refusal(lambda: load_graph(model)) == f"{model}: its external data {DATA} is no regular file; do not use it"


def test_a_graph_and_a_config_are_regular_files(tmp_path: Path) -> None:
    for name in ("model.onnx", "config.json"):
        os.mkfifo(tmp_path / name)
    assert refusal(lambda: open_package(tmp_path / "model.onnx")).endswith(
        "is neither a file nor a folder; give a .onnx file or a model folder"
    )
    assert refusal(lambda: load_graph(tmp_path / "model.onnx")) == (
        f"{tmp_path / 'model.onnx'}: no such file; give an ONNX model"
    )
    assert refusal(lambda: read_json(tmp_path / "config.json")) == (
        f"{tmp_path / 'config.json'}: is no regular file; copy it from the model again"
    )


# ------------------------------------------------------------------------------------------------------------------ links


def test_a_link_out_of_the_folder_is_not_followed(model: Path, tmp_path: Path) -> None:
    data = model.parent / DATA
    data.rename(tmp_path / "secret")
    data.symlink_to("../secret")
    assert refusal(lambda: load_graph(model)) == (
        f"{data}: is a link out of the model's folder (to {tmp_path / 'secret'}); do not use it, or copy the model with its "
        "links followed"
    )


def test_nor_is_a_parent_that_is_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (model.parent / DATA).rename(tmp_path / "elsewhere" / "w.data")
    (model.parent / "sub").symlink_to("../elsewhere")
    edit_graph(
        model.parent,
        lambda proto: [
            setattr(entry, "value", "sub/w.data")
            for tensor in proto.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        ],
    )
    assert f"is a link out of the model's folder (to {tmp_path / 'elsewhere' / 'w.data'})" in refusal(
        lambda: load_graph(model)
    )


def test_a_link_inside_the_folder_is(model: Path) -> None:
    data = model.parent / DATA
    data.rename(model.parent / "real")
    data.symlink_to("real")
    load_graph(model)


@pytest.mark.parametrize("name", ["tokenizer.json", "onnx/notes.json"])
def test_no_file_of_the_readers_own_gets_into_a_guarded_folder(model: Path, tmp_path: Path, name: str) -> None:
    """Copied along it would be published with the model."""
    secret = tmp_path / "id_ed25519"
    secret.write_text("private")
    root = tmp_path / "llava"
    (root / "onnx").mkdir(parents=True)
    for file in (NAME, DATA):
        (model.parent / file).rename(root / "onnx" / file)
    (root / "config.json").write_text("{}")
    link = root / name
    link.symlink_to(secret)
    sentence = refusal(lambda: guard_small(root / "onnx" / NAME, tmp_path / "out"))
    assert sentence == (
        f"{link}: is a link out of the model's folder (to {secret}); do not use it, or copy the model with its links followed"
    )
    assert not (tmp_path / "out").exists()


def test_the_hugging_face_cache_is_followed(model: Path, tmp_path: Path) -> None:
    snapshot = into_cache(model.parent, tmp_path / "hub")
    assert (snapshot / NAME).is_symlink() and (snapshot / DATA).is_symlink()
    assert len(load_graph(snapshot / NAME).graph) > 0
    assert {relative for _, relative in open_package(snapshot).files()} == {"config.json", "tokenizer.json"}


def other_repository(snapshot: Path) -> None:
    blobs = snapshot.parents[1] / "blobs"
    shutil.copytree(blobs, snapshot.parents[2] / "models--other" / "blobs")
    relink(snapshot / DATA, "../../../models--other/blobs/")


def no_blob(snapshot: Path) -> None:
    (snapshot.parents[1] / "blobs" / "notes").write_bytes((snapshot / DATA).read_bytes())
    relink(snapshot / DATA, "../../blobs/notes")


def below_blobs(snapshot: Path) -> None:
    deeper = snapshot.parents[1] / "blobs" / "a"
    deeper.mkdir()
    (snapshot / DATA).resolve().rename(deeper / (snapshot / DATA).resolve().name)
    relink(snapshot / DATA, "../../blobs/a/")


def no_repository(snapshot: Path) -> None:
    snapshot.parents[1].rename(snapshot.parents[2] / "innocent")


def relink(link: Path, target: str) -> None:
    name = Path(os.readlink(link)).name if target.endswith("/") else ""
    link.unlink()
    link.symlink_to(target + name)


@pytest.mark.parametrize("change", [other_repository, no_blob, below_blobs, no_repository])
def test_what_only_looks_like_the_hugging_face_cache_is_not(model: Path, tmp_path: Path, change: Any) -> None:
    snapshot = into_cache(model.parent, tmp_path / "hub")
    change(snapshot)
    (found,) = (tmp_path / "hub").rglob(NAME)
    assert "is a link out of the model's folder" in refusal(lambda: load_graph(found))


# ---------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("data", [f"{NAME}.guard.data", "directions.safetensors"])
def test_a_file_that_the_source_lends_is_never_written_to(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    """Weights may be called what we call our own files, and are hard-linked into the guarded folder: to open such a file
    for writing would overwrite the source."""
    monkeypatch.setattr(staging, "BIG", 1)
    monkeypatch.setattr(staging, "_reflink", lambda source, destination: False)
    monkeypatch.setattr("vlmguard.graphs.graph_io._MOVED_FROM", 1)
    (model.parent / DATA).rename(model.parent / data)
    edit_graph(
        model.parent,
        lambda proto: [
            setattr(entry, "value", data)
            for tensor in proto.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        ],
    )
    before = digests(model.parent)
    assert refusal(lambda: guard_small(model, tmp_path / "out")) == (
        f"{data}: the model has a file of this name, which the guarded folder needs for its own; rename it"
    )
    assert digests(model.parent) == before and not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------- limits


def test_a_graph_file_is_no_larger_than_protobuf_can_be(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = model.stat().st_size
    monkeypatch.setattr(graph_file, "LARGEST_FILE", size - 1)
    assert refusal(lambda: load_graph(model)) == (
        f"{model}: has {size} bytes, a graph file ends at {size - 1}; save its weights as external data"
    )


@pytest.mark.parametrize("limit", ["MOST_NODES", "MOST_INITIALIZERS"])
def test_a_graph_has_no_more_nodes_and_initializers_than_a_decoder_can_need(
    model: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(graph_file, limit, 3)
    assert "has more than" in refusal(lambda: load_graph(model))


@pytest.mark.parametrize("name", ["inputs_embeds", "w0"])
def test_names_are_utf8(model: Path, name: str) -> None:
    """Found by the fuzzer: such a graph was read, and could not be written."""
    damaged = b"\xe9" + name.encode()[1:]
    model.write_bytes(model.read_bytes().replace(name.encode(), damaged))
    assert (
        refusal(lambda: load_graph(model)) == f"{model}: holds the name {damaged!r}, which is no UTF-8; do not use it"
    )


def test_bodies_are_not_nested_without_end(model: Path) -> None:
    body = helper.make_graph([helper.make_node("Identity", ["inputs_embeds"], ["y"])], "b", [], [])
    for _ in range(graph_file.DEEPEST + 1):
        body = helper.make_graph(
            [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body.__class__())], "b", [], []
        )
    edit_graph(model.parent, lambda proto: proto.graph.node.extend(body.node))
    assert refusal(lambda: load_graph(model)) == (
        f"{model}: has subgraphs nested more than {graph_file.DEEPEST} deep; is it a decoder?"
    )


def test_a_tensor_holds_what_it_says(model: Path) -> None:
    """Otherwise a few bytes ask for terabytes."""
    edit_graph(
        model.parent,
        lambda proto: proto.graph.initializer.append(
            TensorProto(name="big", dims=[1 << 20, 1 << 20], data_type=TensorProto.FLOAT, raw_data=b"1234")
        ),
    )
    assert refusal(lambda: load_graph(model)) == (
        f"{model}: tensor 'big' has shape [1048576, 1048576] but 4 bytes; it is damaged, do not use it"
    )


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (TensorProto(name="t", dims=[-1], data_type=1), "tensor 't' has a negative dimension [-1]; do not use it"),
        (
            TensorProto(name="t", dims=[1], data_type=99, raw_data=b"1"),
            "tensor 't' has no known dtype (99); do not use it",
        ),
        (
            TensorProto(name="t", dims=[9], data_type=1, float_data=[1]),
            "tensor 't' has shape [9] but 1 numbers; it is damaged, do not use it",
        ),
    ],
)
def test_a_tensor_can_be_a_tensor(model: Path, tensor: TensorProto, sentence: str) -> None:
    edit_graph(model.parent, lambda proto: proto.graph.initializer.append(tensor))
    assert refusal(lambda: load_graph(model)) == f"{model}: {sentence}"


def test_every_way_to_write_numbers_is_read(model: Path) -> None:
    """What the rules must let through: typed fields, packed 4-bit integers, empty tensors, text."""
    tensors = [
        helper.make_tensor("float16", TensorProto.FLOAT16, [3], np.ones(3, np.float16)),
        helper.make_tensor("int4", TensorProto.INT4, [3], [1, 2, 3]),
        helper.make_tensor("typed", TensorProto.FLOAT, [2, 2], [1, 2, 3, 4]),
        numpy_helper.from_array(np.zeros((0, 4), np.float32), "empty"),
        helper.make_tensor("text", TensorProto.STRING, [2], ["a", "b"]),
        helper.make_tensor("bool", TensorProto.BOOL, [1], [True]),
    ]
    edit_graph(model.parent, lambda proto: proto.graph.initializer.extend(tensors))
    assert {tensor.name for tensor in tensors} <= set(load_graph(model).graph.initializers)


# ------------------------------------------------------------------------------------------------------------ foreign code


def test_an_engine_inside_a_graph_is_refused(model: Path) -> None:
    node = helper.make_node(
        "EPContext", ["logits"], ["x"], name="engine", domain="com.microsoft", ep_cache_context="x.engine"
    )
    edit_graph(model.parent, lambda proto: proto.graph.node.append(node))
    assert refusal(lambda: load_graph(model)) == (
        f"{model}: node 'engine' contains a third-party compiled engine (EPContext); start from the graph"
    )


def test_a_library_that_a_config_names_is_refused(tmp_path: Path) -> None:
    small_model(tmp_path / "m")
    config = '{"model": {"decoder": {"filename": "model.onnx", "session_options": {"custom_ops_library": "op.so"}}}}'
    (tmp_path / "m" / "genai_config.json").write_text(config)
    assert refusal(lambda: open_package(tmp_path / "m")) == (
        f"{tmp_path / 'm' / 'genai_config.json'}: loads a library of its own ('op.so'), which is code; do not use it, "
        "or remove custom_ops_library"
    )


def test_nothing_in_the_project_loads_code_of_a_model() -> None:
    """Pickle, remote code, libraries of operators: words that would have to stand somewhere."""
    root = Path(graph_file.__file__).parents[1]
    sources = [
        path
        for folder in ("graphs", "runtime", "exporter", "apps", "plugins")
        for path in (root / folder).rglob("*.py")
    ]
    text = "\n".join(path.read_text(encoding="utf-8") for path in [*sources, root / "cli.py"])
    assert len(sources) > 50
    for word in (
        "import pickle",
        "register_custom_ops_library",
        "torch.load(",
        "trust_remote_code=True",
        "allow_pickle=True",
    ):
        assert word not in text, word
    assert "trust_remote_code=False" in text and "allow_pickle=False" in text


def test_a_guarded_folder_by_reference_still_opens(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links that we made ourselves, under the manifest's digests (`--data reference`)."""
    monkeypatch.setattr(staging, "BIG", 1)
    import vlmguard

    plain = guard_small(model, tmp_path / "plain")
    out = vlmguard.export(
        model, tmp_path / "out", directions=plain / "directions.safetensors", proof="structure", data="reference"
    ).out
    assert (out / DATA).is_symlink() and verify(out, model).ok
