"""`guard.json`: read back as written, refused as anything else; and the folder is what it says, file by file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmguard.graphs.digests import sha256_file
from vlmguard.graphs.errors import ManifestMismatch
from vlmguard.graphs.manifest import (
    MANIFEST_NAME,
    SCHEMA,
    DecoderRecord,
    FileRecord,
    Manifest,
    read_manifest,
    record_files,
    require_intact,
)

BIG = 16 << 20  # from here on a digest may be taken from the manifest


def decoder_record(path: str = "onnx/model.onnx") -> DecoderRecord:
    return DecoderRecord(
        path=path,
        source={"decoder": "model.onnx", "sha256": "00", "external_data": {}},
        plan={"layers": [1, 2], "notes": ["a – b"]},
        report={"nodes": 3},
        proof=[{"name": "inputs and outputs unchanged", "ok": True}],
    )


def manifest_of(folder: Path, unhashed: tuple[str, ...] = (), **changes: Any) -> Manifest:
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    digests = {name: sha256_file(path) for name, path in paths.items() if name not in unhashed}
    parts: dict[str, Any] = {
        "schema_": SCHEMA,
        "created": "2026-11-20T12:00:00+00:00",
        "files": record_files(folder, paths, digests),
        "decoders": [decoder_record()],
        "layout": "onnx-community",
        "proved": "full",
        "versions": {"vlmguard": "0.1.0"},
        "spec": {"mode": None, "layers": [1, 2]},
    }
    return Manifest(**(parts | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A guarded folder, in so far as a manifest can tell."""
    root = tmp_path / "guarded"
    (root / "onnx").mkdir(parents=True)
    (root / "onnx" / "model.onnx").write_bytes(b"graph")
    (root / "onnx" / "model.onnx_data").write_bytes(b"weights")
    (root / "config.json").write_text("{}")
    manifest = manifest_of(root)
    (root / MANIFEST_NAME).write_text(manifest.to_text(), encoding="utf-8")
    return root


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(ManifestMismatch) as raised:
        action()
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ----------------------------------------------------------------------------------------------------------------- reading


def test_a_manifest_is_read_back_as_it_was_written(folder: Path) -> None:
    manifest = read_manifest(folder)
    text = (folder / MANIFEST_NAME).read_text(encoding="utf-8")
    assert manifest.to_text() == text
    assert json.loads(text)["schema"] == SCHEMA == "vlmguard.guard/2"
    assert text.endswith("}\n") and "a – b" in text
    assert manifest.calibration is None
    assert list(manifest.files) == ["config.json", "onnx/model.onnx", "onnx/model.onnx_data"]
    weights = folder / "onnx" / "model.onnx_data"
    assert manifest.files["onnx/model.onnx_data"] == FileRecord(
        size=len(b"weights"),
        modified_ns=0,
        sha256=sha256_file(weights),  # of big files alone a time is kept
    )
    assert (manifest.decoder, manifest.plan) == ("onnx/model.onnx", {"layers": [1, 2], "notes": ["a – b"]})


def test_a_calibration_is_kept(folder: Path) -> None:
    manifest = manifest_of(folder, calibration={"budget": 0.01})
    (folder / MANIFEST_NAME).write_text(manifest.to_text(), encoding="utf-8")
    assert read_manifest(folder).calibration == {"budget": 0.01}


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    assert refusal(lambda: read_manifest(tmp_path)) == (
        f"{tmp_path}: has no guard.json, so it is not a guarded folder; export it first"
    )


def test_a_manifest_that_is_a_folder_is_none(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).mkdir()
    assert "has no guard.json" in refusal(lambda: read_manifest(tmp_path))


@pytest.mark.parametrize("found", ["vlmguard.guard/1", "vlmguard.guard/3", "", None, 1])
def test_another_schema_is_refused(folder: Path, found: object) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": found}))
    assert refusal(lambda: read_manifest(folder)) == (
        f"{path}: schema is {found!r}, this version reads 'vlmguard.guard/2'; export again"
    )


FIELDS = ["created", "files", "decoders", "layout", "proved", "versions", "spec"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_missing_is_refused(folder: Path, field: str) -> None:
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_text())
    del content[field]
    path.write_text(json.dumps(content))
    assert refusal(lambda: read_manifest(folder)) == f"{path}: is malformed ({field}: Field required); export again"


@pytest.mark.parametrize("field", ["path", "source", "plan", "report", "proof"])
def test_a_decoder_that_is_half_recorded_is_refused(folder: Path, field: str) -> None:
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_text())
    del content["decoders"][0][field]
    path.write_text(json.dumps(content))
    sentence = f"{path}: is malformed (decoders.0.{field}: Field required); export again"
    assert refusal(lambda: read_manifest(folder)) == sentence


RECORD = decoder_record().model_dump()
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"decoders": {}}, "decoders: Input should be a valid list"),
    ({"decoders": [RECORD | {"path": 3}]}, "decoders.0.path: Input should be a valid string"),
    ({"files": []}, "files: Input should be a valid dictionary"),
    (
        {"files": {"a": {"size": "1", "modified_ns": 1, "sha256": None}}},
        "files.a.size: Input should be a valid integer",
    ),
    ({"files": {"a": {"size": 1, "modified_ns": 1}}}, "files.a.sha256: Field required"),
    ({"proved": "almost"}, "proved: Input should be 'full', 'local' or 'structure'"),
    ({"decoders": [RECORD | {"proof": {}}]}, "decoders.0.proof: Input should be a valid list"),
    ({"decoders": [RECORD | {"proof": ["ok"]}]}, "decoders.0.proof.0: Input should be a valid dictionary"),
    ({"decoders": [RECORD | {"plan": None}]}, "decoders.0.plan: Input should be a valid dictionary"),
    ({"calibration": "yes"}, "calibration: Input should be a valid dictionary"),
    ({"signature": "x"}, "signature: Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=[str(change) for change, _ in WRONG])
def test_a_field_of_another_type_is_refused(folder: Path, change: dict[str, Any], said: str) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert refusal(lambda: read_manifest(folder)) == f"{path}: is malformed ({said}); export again"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"schema": "vlmguard.guard/2"', b"[]", b'"guard"', b"null", b"\xff\xfe{}", b"[" * 100_000],
    ids=["empty", "brace", "cut", "list", "text", "null", "no UTF-8", "deep"],
)
def test_what_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    path = folder / MANIFEST_NAME
    path.write_bytes(content)
    sentence = refusal(lambda: read_manifest(folder))
    assert sentence.startswith(f"{path}: is malformed (") and sentence.endswith("); export again")


def test_every_cut_of_a_manifest_is_refused(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    content = path.read_bytes()
    for cut in range(0, len(content) - 2, 7):
        path.write_bytes(content[:cut])
        assert "is malformed" in refusal(lambda: read_manifest(folder))


# ------------------------------------------------------------------------------------------------------------------ intact


def check(folder: Path, **changes: Any) -> int:
    """Against the manifest that was written with the folder, or that one changed."""
    return require_intact(folder, read_manifest(folder).model_copy(update=changes))


def test_an_intact_folder_is_counted(folder: Path) -> None:
    assert check(folder) == 3


def test_what_is_no_graph_may_be_added(folder: Path) -> None:
    """A README, a download's cache: nothing that an app could load instead of the guarded decoder."""
    (folder / "README.md").write_text("hello")
    assert check(folder) == 3


@pytest.mark.parametrize("name", ["config.json", "onnx/model.onnx", "onnx/model.onnx_data"])
def test_a_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert refusal(lambda: check(folder)) == f"{folder}: {name} is missing; export again"


@pytest.mark.parametrize("name", ["config.json", "onnx/model.onnx", "onnx/model.onnx_data"])
@pytest.mark.parametrize(
    "change", [lambda old: old + b" ", lambda old: old[:-1], lambda old: bytes([old[0] ^ 1]) + old[1:]]
)
def test_a_changed_file_is_refused(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    path = folder / name
    path.write_bytes(change(path.read_bytes()))
    assert refusal(lambda: check(folder)) == (
        f"{folder}: {name} is not the file that was proved (SHA-256 differs); export again"
    )


@pytest.mark.parametrize("name", ["model.onnx", "onnx/decoder_model_merged_q4.onnx", ".cache/model.onnx", "a/b/c.onnx"])
def test_an_added_graph_is_refused(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"another")
    assert refusal(lambda: check(folder)) == (f"{folder}: {name} was added after the proof; remove it, or export again")


@pytest.mark.parametrize("name", ["../outside", "onnx/../../outside", "/etc/hostname"])
def test_a_file_outside_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_bytes(b"x")
    files = read_manifest(folder).files
    files = {"onnx/model.onnx": files["onnx/model.onnx"], name: FileRecord(size=1, modified_ns=0, sha256="00")}
    assert refusal(lambda: check(folder, files=files)) == (
        f"{folder / MANIFEST_NAME}: lists a file outside the folder ({name}); export again"
    )


def test_a_manifest_that_does_not_cover_the_decoder_is_refused(folder: Path) -> None:
    """Nothing compared is nothing proved."""
    expected = f"{folder / MANIFEST_NAME}: does not list the decoder 'onnx/model.onnx'; export again"
    files = read_manifest(folder).files
    assert refusal(lambda: check(folder, files={})) == expected
    without = {name: digest for name, digest in files.items() if name != "onnx/model.onnx"}
    assert refusal(lambda: check(folder, files=without)) == expected
    other = f"{folder / MANIFEST_NAME}: does not list the decoder 'other.onnx'; export again"
    second = [decoder_record(), decoder_record("other.onnx")]
    assert refusal(lambda: check(folder, decoders=second)) == other
    none = f"{folder / MANIFEST_NAME}: does not list the decoder None; export again"
    assert refusal(lambda: check(folder, decoders=[])) == none


# ------------------------------------------------------------------------------------------------- big files, read once


def big_weights(folder: Path, unhashed: bool = False) -> Path:
    """Weights that are large enough for the short way; a hole, so that they cost nothing."""
    path = folder / "onnx" / "model.onnx_data"
    with path.open("wb") as file:
        file.truncate(BIG)
    (folder / MANIFEST_NAME).unlink()
    manifest = manifest_of(folder, ("onnx/model.onnx_data",) if unhashed else ())
    (folder / MANIFEST_NAME).write_text(manifest.to_text(), encoding="utf-8")
    return path


def change_in_secret(path: Path) -> None:
    """Other bytes, the old size and time."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_opening_reads_no_big_file_that_nobody_touched(folder: Path) -> None:
    big_weights(folder)
    read: list[int] = []
    manifest = read_manifest(folder)
    assert require_intact(folder, manifest, again=False, report_count=lambda done, total: read.append(total)) == 3
    assert set(read) == {len(b"{}") + len(b"graph")}
    assert require_intact(folder, manifest, report_count=lambda done, total: read.append(total)) == 3
    assert read[-1] == len(b"{}") + len(b"graph") + BIG


def test_a_big_file_changed_in_secret_passes_opening_and_not_the_proof(folder: Path) -> None:
    """What opening in a second costs, and why `verify` reads everything."""
    change_in_secret(big_weights(folder))
    manifest = read_manifest(folder)
    assert require_intact(folder, manifest, again=False) == 3
    assert refusal(lambda: require_intact(folder, manifest)) == (
        f"{folder}: onnx/model.onnx_data is not the file that was proved (SHA-256 differs); export again"
    )


def test_a_big_file_that_was_written_again_is_hashed(folder: Path) -> None:
    path = big_weights(folder)
    os.utime(path, ns=(0, 0))
    assert require_intact(folder, read_manifest(folder), again=False) == 3  # the same bytes: a copy is as good
    change_in_secret(path)
    sentence = f"{folder}: onnx/model.onnx_data is not the file that was proved (SHA-256 differs); export again"
    assert refusal(lambda: require_intact(folder, read_manifest(folder), again=False)) == sentence


def test_a_small_file_changed_in_secret_is_noticed_at_once(folder: Path) -> None:
    path = folder / "onnx" / "model.onnx_data"
    change_in_secret(path)
    assert "SHA-256 differs" in refusal(lambda: require_intact(folder, read_manifest(folder), again=False))


def test_a_file_without_a_digest_is_known_by_its_size(folder: Path) -> None:
    path = big_weights(folder, unhashed=True)
    assert check(folder) == 3
    change_in_secret(path)
    assert check(folder) == 3  # as was asked
    with path.open("ab") as file:
        file.write(b"x")
    assert refusal(lambda: check(folder)) == (
        f"{folder}: onnx/model.onnx_data is not the file that was proved (its size differs); export again"
    )


@pytest.mark.parametrize("name", ["config.json", "onnx/model.onnx", "onnx/model.onnx_data"])
def test_only_a_big_file_of_weights_may_go_without_a_digest(folder: Path, name: str) -> None:
    """`--no-digest` hashes everything else; a manifest that says otherwise was not written by it."""
    (folder / MANIFEST_NAME).unlink()
    (folder / MANIFEST_NAME).write_text(manifest_of(folder, (name,)).to_text(), encoding="utf-8")
    assert refusal(lambda: check(folder)) == (
        f"{folder / MANIFEST_NAME}: has no digest of {name}, which only big weights may lack; export again"
    )
