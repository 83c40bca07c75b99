"""Folders as apps get them: every variant guarded, links of a cache followed, big weights neither read nor written again.

The models are small and made by hand, so that each rule is seen alone.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hand_graphs import WIDTH, decoder, merged
from hugging_face_cache import into_cache
from random_directions import random_directions, write_directions
from tiny_vlm_paths import DECODER, SOURCE, digests

import vlmguard
from vlmguard.exporter.pipeline import export
from vlmguard.exporter.proof.verify import verify
from vlmguard.graphs.anatomy import guarded_layers
from vlmguard.graphs.errors import AnatomyNotFound, GuardError, ManifestMismatch, ModelUnreadable
from vlmguard.graphs.graph_io import external_files, in_memory, load_graph
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.manifest import read_manifest
from vlmguard.graphs.spec import GuardSpec

pytest.importorskip("onnxruntime")

BIG = 16 << 20
WISH = GuardSpec(mode="project", positions="all")


@pytest.fixture
def directions(tmp_path: Path) -> Path:
    return write_directions(tmp_path / "d.safetensors", random_directions(WIDTH, [0, 1]))


@pytest.fixture
def tiny_directions(tmp_path: Path) -> Path:
    return write_directions(tmp_path / "tiny.safetensors", random_directions(128, [1, 3]))


def save(model: ir.Model, path: Path, data: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    proto = ir.to_proto(model)
    if data is None:
        onnx.save(proto, path)
    else:
        onnx.save(proto, path, save_as_external_data=True, location=data, size_threshold=0)
    return path


def refusal(error: type[GuardError], call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------------------- variants


@pytest.fixture
def variants(tmp_path: Path) -> Path:
    """An onnx-community folder with a plain, a half-precision and a merged decoder."""
    root = tmp_path / "model"
    save(decoder(layers=2), root / "onnx" / "decoder_model_merged.onnx")
    save(decoder("skip_norm", layers=2, dtype="float16"), root / "onnx" / "decoder_model_merged_fp16.onnx")
    save(merged(layers=2), root / "onnx" / "decoder_model_merged_q4.onnx")
    (root / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    return root


NAMES = [f"decoder_model_merged{suffix}.onnx" for suffix in ("", "_fp16", "_q4")]


def test_every_variant_is_guarded_and_proved(variants: Path, directions: Path, tmp_path: Path) -> None:
    result = export(variants, tmp_path / "out", directions=directions, spec=WISH)
    assert [done.path for done in result.decoders] == [f"onnx/{name}" for name in NAMES]
    manifest = read_manifest(result.out)
    assert manifest.decoder == f"onnx/{NAMES[0]}" and manifest.proved == "full"
    for name, record, done in zip(NAMES, manifest.decoders, result.decoders, strict=True):
        assert guarded_layers(load_graph(result.out / "onnx" / name).graph) == (0, 1)
        assert record.proof == [check.to_json() for check in done.proof] and all(check.ok for check in done.proof)
        assert any(check.name.startswith("guarded states equal the numpy reference") for check in done.proof)
        assert record.source["decoder"] == name and record.plan["layers"] == [0, 1]
    assert {site["body"] for site in manifest.decoders[2].plan["sites"]} == {"else_branch", "then_branch"}
    found = verify(result.out, variants)
    assert found.ok
    for name in NAMES:  # each check says whose it is
        assert sum(check.name.startswith(f"{name}: ") for check in found.checks) == 7


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_that_lost_its_guard_is_caught(variants: Path, directions: Path, tmp_path: Path, name: str) -> None:
    out = export(variants, tmp_path / "out", directions=directions, spec=WISH).out
    path = out / "onnx" / name
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name.startswith("vlmguard/layer_1/"))
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 0, tensor.name))
    onnx.save(model, path)
    sentence = f"{out}: onnx/{name} is not the file that was proved (SHA-256 differs); export again"
    assert (
        refusal(ManifestMismatch, verify, out) == refusal(ManifestMismatch, vlmguard.GuardedVLM.open, out) == sentence
    )
    manifest = json.loads((out / "guard.json").read_text())
    manifest["files"][f"onnx/{name}"]["sha256"] = digests(out)[f"onnx/{name}"]
    (out / "guard.json").write_text(json.dumps(manifest))
    failing = [check.name for check in verify(out).checks if not check.ok]
    assert failing == [f"{name}: the guard is what the manifest's plan and directions make"]


def test_one_variant_alone_leaves_the_others_out_and_says_so(variants: Path, directions: Path, tmp_path: Path) -> None:
    result = export(variants, tmp_path / "out", directions=directions, spec=WISH, variant="fp16")
    assert sorted(path.name for path in (result.out / "onnx").iterdir()) == [NAMES[1]]
    told = f"left out, because they would be unguarded decoders: onnx/{NAMES[0]}, onnx/{NAMES[2]}"
    assert told in result.plan.notes and verify(result.out, variants / "onnx" / NAMES[1]).ok


def test_a_broken_variant_is_an_error_that_names_its_file(variants: Path, directions: Path, tmp_path: Path) -> None:
    broken = variants / "onnx" / NAMES[2]
    broken.write_bytes(broken.read_bytes()[:99])
    sentence = refusal(ModelUnreadable, export, variants, tmp_path / "out", directions=directions, spec=WISH)
    assert sentence.startswith(f"{broken}: is not an ONNX model or is truncated (")
    assert not (tmp_path / "out").exists()
    export(variants, tmp_path / "out", directions=directions, spec=WISH, variant="")  # the others are as good as before


def test_a_variant_without_a_stream_is_an_error_that_names_its_file(
    variants: Path, directions: Path, tmp_path: Path
) -> None:
    strange = save(merged(layers=2, other_layers=1), variants / "onnx" / NAMES[2])
    sentence = refusal(AnatomyNotFound, export, variants, tmp_path / "out", directions=directions, spec=WISH)
    assert sentence.startswith(f"{strange}: else_branch of the If 'either': the config declares 2 layers, ")
    assert not (tmp_path / "out").exists()


def test_another_model_is_no_variant(variants: Path, directions: Path, tmp_path: Path) -> None:
    other = save(decoder(layers=3), variants / "onnx" / NAMES[2])
    (variants / "config.json").write_text("{}")
    assert refusal(AnatomyNotFound, export, variants, tmp_path / "out", directions=directions, spec=WISH) == (
        f"{other}: has 3 layers of width {WIDTH}, {NAMES[0]} in the same folder 2 of width {WIDTH}; move it to a folder "
        "of its own"
    )


def test_decoders_of_a_manifest_are_those_of_the_folder(variants: Path, directions: Path, tmp_path: Path) -> None:
    out = export(variants, tmp_path / "out", directions=directions, spec=WISH).out
    manifest = json.loads((out / "guard.json").read_text())
    del manifest["decoders"][1]
    (out / "guard.json").write_text(json.dumps(manifest))
    held = ", ".join(sorted(f"onnx/{name}" for name in NAMES))
    sentence = f"{out}: holds the decoders {held}, the manifest lists onnx/{NAMES[0]}, onnx/{NAMES[2]}; export again"
    assert (
        refusal(ManifestMismatch, verify, out) == refusal(ManifestMismatch, vlmguard.GuardedVLM.open, out) == sentence
    )


# ------------------------------------------------------------------------------------------------- Hugging Face's cache


def outside(folder: Path, directory: Path) -> Path:
    """The tiny VLM with its decoder's weights in a file beside it."""
    shutil.copytree(folder, directory)
    model = onnx.load(directory / DECODER)
    onnx.save(model, directory / DECODER, save_as_external_data=True, location="decoder_model_merged.onnx_data")
    return directory


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return into_cache(outside(SOURCE, tmp_path / "plain"), tmp_path / "hub")


def test_a_snapshot_of_the_cache_is_guarded_like_any_folder(
    snapshot: Path, tiny_directions: Path, tmp_path: Path
) -> None:
    assert external_files(snapshot / DECODER) == [snapshot / "onnx" / "decoder_model_merged.onnx_data"]
    wish = GuardSpec(mode="steer", tau=1e6)
    result = export(snapshot, tmp_path / "out", directions=tiny_directions, spec=wish, allow_no_effect=True)
    assert all(check.ok for check in result.proof) and verify(result.out, snapshot, run=True).ok
    assert not [path for path in result.out.rglob("*") if path.is_symlink()]  # the links were followed
    weights = "onnx/decoder_model_merged.onnx_data"
    assert digests(result.out)[weights] == digests(tmp_path / "plain")[weights]
    closed = vlmguard.GuardedVLM.open(result.out)  # its gate never opens
    plain = export(tmp_path / "plain", tmp_path / "again", directions=tiny_directions, spec=wish, allow_no_effect=True)
    other = vlmguard.GuardedVLM.open(plain.out)
    assert closed.generate("what is this", max_new_tokens=6) == other.generate("what is this", max_new_tokens=6)
    shutil.rmtree(tmp_path / "hub")
    assert closed.generate("hello", max_new_tokens=2) == other.generate("hello", max_new_tokens=2)
    assert verify(result.out).ok


def test_directions_are_extracted_from_a_snapshot(snapshot: Path, tmp_path: Path) -> None:
    from tiny_vlm_paths import ANCHORS

    anchors = tmp_path / "anchors.jsonl"
    anchors.write_text("\n".join(ANCHORS.read_text(encoding="utf-8").splitlines()[:6]))
    found = [
        vlmguard.extract_directions(model, tmp_path / f"{number}.safetensors", anchors=anchors, rank=1)
        for number, model in enumerate((snapshot, tmp_path / "plain"))
    ]
    for number, layer in found[0].layers.items():
        np.testing.assert_array_equal(layer.ssd, found[1].layers[number].ssd)


def test_links_that_lead_to_several_folders_are_refused_where_a_runtime_must_follow_them(tmp_path: Path) -> None:
    """onnxruntime opens external data of one folder; a cache's blobs are in one."""
    model = decoder()
    path = save(model, tmp_path / "m" / "model.onnx")
    proto = onnx.load(path)
    for number, tensor in enumerate(proto.graph.initializer):
        array = onnx.numpy_helper.to_array(tensor)
        real = tmp_path / str(number) / "blob"
        real.parent.mkdir()
        real.write_bytes(array.tobytes())
        (path.parent / f"{number}.data").symlink_to(real)
        onnx.external_data_helper.set_external_data(tensor, f"{number}.data", 0, array.nbytes)
        tensor.ClearField("raw_data")
    path.write_bytes(proto.SerializeToString())
    assert refusal(ModelUnreadable, in_memory, load_graph(path, trust_links=True), path.parent) == (
        f"{path.parent}: the links to its external data lead to 2 folders; copy the model to one, links followed"
    )


# ------------------------------------------------------------------------------------------------------- big files: --data


def heavy(folder: Path, size: int = BIG + 4096) -> Path:
    """A decoder that reads two of its weights from a file that is large, and a hole but for them."""
    path = save(decoder(layers=2), folder / "model.onnx")
    proto = onnx.load(path)
    data = folder / "model.onnx.data"
    offset = size - 4096
    with data.open("wb") as file:
        file.truncate(size)
        for tensor in proto.graph.initializer:
            array = onnx.numpy_helper.to_array(tensor)
            file.seek(offset)
            file.write(array.tobytes())
            onnx.external_data_helper.set_external_data(tensor, data.name, offset, array.nbytes)
            tensor.ClearField("raw_data")
            offset += 1280
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("data", ["link", "copy", "reference"])
def test_big_weights_are_linked_copied_or_referred_to(tmp_path: Path, directions: Path, data: Any) -> None:
    source = heavy(tmp_path / "m")
    out = export(source, tmp_path / "out", directions=directions, spec=WISH, data=data).out
    weights, original = out / "model.onnx.data", source.with_name("model.onnx.data")
    assert weights.is_symlink() == (data == "reference")
    if data != "link":  # which may be a reflink or a hard link
        assert weights.samefile(original) == (data == "reference")
    assert digests(out)["model.onnx.data"] == digests(source.parent)["model.onnx.data"]
    assert verify(out, source, run=True).ok  # our own sessions follow the link too
    assert {path.name for path in out.iterdir()} == {
        *("model.onnx", "model.onnx.data", "guard.json", "directions.safetensors")
    }


def test_an_edit_of_the_source_shows_in_what_refers_to_it(tmp_path: Path, directions: Path) -> None:
    """`reference` promises no copy: who changes the source changes the guarded model, and `verify` says so."""
    source = heavy(tmp_path / "m")
    out = export(source, tmp_path / "out", directions=directions, spec=WISH, data="reference").out
    with source.with_name("model.onnx.data").open("r+b") as file:
        file.write(b"x")
    assert refusal(ManifestMismatch, verify, out) == (
        f"{out}: model.onnx.data is not the file that was proved (SHA-256 differs); export again"
    )
    source.with_name("model.onnx.data").unlink()
    assert refusal(ManifestMismatch, verify, out) == f"{out}: model.onnx.data is missing; export again"


# ------------------------------------------------------------------------------- unhashed weights, proofs that were not run


def test_weights_that_were_not_hashed_are_said_to_be(tmp_path: Path, directions: Path) -> None:
    source = heavy(tmp_path / "m")
    out = export(source, tmp_path / "out", directions=directions, spec=WISH, digests=False).out
    manifest = read_manifest(out)
    unhashed = [name for name, record in manifest.files.items() if record.sha256 is None]
    assert unhashed == ["model.onnx.data"] and manifest.files["model.onnx"].sha256 == digests(out)["model.onnx"]
    (record,) = manifest.decoders
    assert record.source["external_data"] == {"model.onnx.data": None}
    alone, beside = verify(out), verify(out, source)
    assert alone.ok and beside.ok
    assert alone.checks[0].compared == len(manifest.files) - 1
    assert alone.checks[0].note == "by size alone, as requested at export: model.onnx.data"
    (external,) = [check for check in beside.checks if check.name == "external weights are the source's files"]
    assert external.ok and external.compared == 1


def test_a_proof_of_the_structure_alone_is_completed_by_verify(tmp_path: Path, tiny_directions: Path) -> None:
    wish = GuardSpec(mode="steer", tau=0.0)
    result = export(SOURCE, tmp_path / "out", directions=tiny_directions, spec=wish, proof="structure")
    assert [check.name for check in result.proof] == [
        "inputs and outputs unchanged",
        "every planned site guarded exactly once",
        "no path avoids a guard (dominators)",
        "untouched initializers identical",
    ]
    assert read_manifest(result.out).proved == "structure"
    sentence = (
        f"{result.out}: only the structure of its guard was proved, nothing was run; run `vlmguard verify --run` with "
        "--source first"
    )
    assert refusal(ManifestMismatch, vlmguard.GuardedVLM.open, result.out) == sentence
    for source in (None, SOURCE):  # the structure again is not the rest
        assert verify(result.out, source).ok
        assert refusal(ManifestMismatch, vlmguard.GuardedVLM.open, result.out) == sentence
    assert refusal(GuardError, verify, result.out, run=True) == (
        "running the proof compares with what the folder was made from; give that with --source"
    )
    found = verify(result.out, SOURCE, run=True)
    assert found.ok and found.manifest.proved == read_manifest(result.out).proved == "full"
    assert isinstance(vlmguard.GuardedVLM.open(result.out).generate("hello", max_new_tokens=2), str)
    assert verify(result.out, SOURCE).ok


# ------------------------------------------------------------------------------------------------------------------- size

SPARSE = 512 << 20
GUARD_IT = """
import resource, sys
from vlmguard.exporter.pipeline import export
from vlmguard.graphs.spec import GuardSpec

def read():  # bytes through read(2); pages of a mapped file would show in the peak
    fields = dict(line.split(": ") for line in open("/proc/self/io"))
    return int(fields["rchar"])

before, memory = read(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export(sys.argv[1], sys.argv[2], directions=sys.argv[3], spec=GuardSpec(mode="project", positions="all"),
       digests=False, proof="structure")
print(read() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/io is Linux's")
def test_a_large_model_is_guarded_without_its_weights_being_read(tmp_path: Path, directions: Path) -> None:
    source = heavy(tmp_path / "m", SPARSE)
    data = source.with_name("model.onnx.data")
    if data.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("this file system has no sparse files")
    done = subprocess.run(
        [sys.executable, "-c", GUARD_IT, str(source), str(tmp_path / "out"), str(directions)],
        capture_output=True,
        text=True,
        check=True,
    )
    read, grown = map(int, done.stdout.split())
    assert read < 32 << 20  # modules that are imported late are read too
    assert grown < 128 << 10  # KiB
    out = tmp_path / "out"
    written = sum(
        path.stat().st_blocks * 512 for path in out.rglob("*") if path.is_file() and path.stat().st_nlink == 1
    )
    assert written < 1 << 20 and (out / "model.onnx.data").stat().st_size == SPARSE
    assert (out / "model.onnx.data").stat().st_blocks == data.stat().st_blocks
    assert guarded_layers(open_package(out).load_decoder().graph) == (0, 1)


def test_large_numbers_of_the_guard_get_a_file_of_their_own(tmp_path: Path) -> None:
    """A model with its weights outside stays one whose graph file is small."""
    wide = write_directions(tmp_path / "wide.safetensors", random_directions(128, list(range(6))))
    source = outside(SOURCE, tmp_path / "m")
    wish = GuardSpec(mode="project", positions="all", lowering="dense")
    out = export(source, tmp_path / "out", directions=wide, spec=wish).out
    data = out / f"{DECODER}.guard.data"
    assert data.stat().st_size == 6 * 128 * 128 * 4
    assert external_files(out / DECODER) == sorted([data, out / "onnx" / "decoder_model_merged.onnx_data"])
    assert f"{DECODER}.guard.data" in read_manifest(out).files
    assert verify(out, source, run=True).ok
    content = bytearray(data.read_bytes())
    content[7] ^= 1
    data.write_bytes(content)
    assert refusal(ManifestMismatch, verify, out) == (
        f"{out}: {DECODER}.guard.data is not the file that was proved (SHA-256 differs); export again"
    )
    manifest = json.loads((out / "guard.json").read_text())
    manifest["files"][f"{DECODER}.guard.data"]["sha256"] = digests(out)[f"{DECODER}.guard.data"]
    (out / "guard.json").write_text(json.dumps(manifest))
    assert not verify(out).ok
