"""`guard.json`: read back as written, refused as anything else; and the folder is what it says, file by file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmguard.graphs.errors import ManifestMismatch
from vlmguard.graphs.manifest import MANIFEST_NAME, SCHEMA, Manifest, read_manifest, require_intact
from vlmguard.graphs.package import sha256_file


def manifest_of(folder: Path, **changes: Any) -> Manifest:
    files = {path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*") if path.is_file()}
    parts: dict[str, Any] = {
        "schema_": SCHEMA,
        "created": "2026-11-20T12:00:00+00:00",
        "files": files,
        "decoder": "onnx/model.onnx",
        "layout": "onnx-community",
        "source": {"decoder": "model.onnx", "sha256": "00", "external_data": {}},
        "versions": {"vlmguard": "0.1.0"},
        "spec": {"mode": None, "layers": [1, 2]},
        "plan": {"layers": [1, 2], "notes": ["a – b"]},
        "report": {"nodes": 3},
        "proof": [{"name": "inputs and outputs unchanged", "ok": True}],
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
    assert json.loads(text)["schema"] == SCHEMA == "vlmguard.guard/1"
    assert text.endswith("}\n") and "a – b" in text
    assert manifest.calibration is None
    assert sorted(manifest.files) == ["config.json", "onnx/model.onnx", "onnx/model.onnx_data"]


def test_a_calibration_is_kept(folder: Path) -> None:
    manifest = manifest_of(folder, calibration={"budget": 0.01})
    (folder / MANIFEST_NAME).write_text(manifest.to_text(), encoding="utf-8")
    assert read_manifest(folder).calibration == {"budget": 0.01}


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    assert refusal(lambda: read_manifest(tmp_path)) == (
        f"{tmp_path}: has no guard.json, so nothing says that it is guarded; export it first"
    )


def test_a_manifest_that_is_a_folder_is_none(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).mkdir()
    assert "has no guard.json" in refusal(lambda: read_manifest(tmp_path))


@pytest.mark.parametrize("found", ["vlmguard.guard/2", "vlmguard.guard/0", "", None, 1])
def test_another_schema_is_refused(folder: Path, found: object) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": found}))
    assert refusal(lambda: read_manifest(folder)) == (
        f"{path}: schema is {found!r}, this version reads 'vlmguard.guard/1'; export again"
    )


FIELDS = ["created", "files", "decoder", "layout", "source", "versions", "spec", "plan", "report", "proof"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_missing_is_refused(folder: Path, field: str) -> None:
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_text())
    del content[field]
    path.write_text(json.dumps(content))
    assert refusal(lambda: read_manifest(folder)) == f"{path}: is malformed ({field}: Field required); export again"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"decoder": 3}, "decoder: Input should be a valid string"),
    ({"files": []}, "files: Input should be a valid dictionary"),
    ({"files": {"a": 1}}, "files.a: Input should be a valid string"),
    ({"proof": {}}, "proof: Input should be a valid list"),
    ({"proof": ["ok"]}, "proof.0: Input should be a valid dictionary"),
    ({"plan": None}, "plan: Input should be a valid dictionary"),
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
    [b"", b"{", b'{"schema": "vlmguard.guard/1"', b"[]", b'"guard"', b"null", b"\xff\xfe{}", b"[" * 100_000],
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
    files = {"onnx/model.onnx": sha256_file(folder / "onnx/model.onnx"), name: "00"}
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
    assert refusal(lambda: check(folder, decoder="other.onnx")) == other
