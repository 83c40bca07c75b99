"""Which folders belong to a model, and what a path is refused for before anything is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmguard.graphs.errors import GuardError, ManifestMismatch, ModelUnreadable
from vlmguard.graphs.places import (
    expanded,
    model_folders,
    require_file,
    require_guarded_folder,
    require_model,
)


def test_the_folder_above_is_the_models_only_if_its_part_is_named_so(tmp_path: Path) -> None:
    for name in ("onnx", "onnx-community", "genai", "checkpoint"):
        assert model_folders(tmp_path / "m" / name) == (tmp_path / "m" / name, tmp_path / "m")
    for name in ("m", "ONNX", "models", "onnx-2"):
        assert model_folders(tmp_path / name) == (tmp_path / name,)


def test_a_leading_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded(Path("~/a/b")) == tmp_path / "a" / "b"
    assert expanded(Path("a/b~/.c")) == Path("a/b~/.c")
    for path, sentence in (
        (
            Path("a/~/b"),
            "a/~/b: has a folder named ~, which a shell would not reach; write the home folder's full path",
        ),
        (
            Path("~nobody-of-this-name/x"),
            "~nobody-of-this-name/x: ~nobody-of-this-name names no user of this machine; write the folder's full path",
        ),
    ):
        with pytest.raises(GuardError) as raised:
            expanded(path)
        assert str(raised.value) == sentence


def test_what_is_not_there_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for action, kind, sentence in (
        (
            lambda: require_model(tmp_path / "m.onnx"),
            ModelUnreadable,
            f"{tmp_path / 'm.onnx'}: no such file or folder; give a .onnx file or a model folder",
        ),
        (
            lambda: require_guarded_folder(tmp_path / "g"),
            ManifestMismatch,
            f"{tmp_path / 'g'}: no such folder; give one that `vlmguard-export` wrote",
        ),
        (
            lambda: require_guarded_folder(file),
            ManifestMismatch,
            f"{file}: is a file; give the guarded folder that it lies in",
        ),
        (
            lambda: require_guarded_folder(tmp_path),
            ManifestMismatch,
            f"{tmp_path}: has no guard.json, so it is not a guarded folder; export it first",
        ),
        (lambda: require_file(tmp_path, "no such file"), GuardError, f"{tmp_path}: is a folder; give a file"),
        (lambda: require_file(tmp_path / "k", "no such key"), GuardError, f"{tmp_path / 'k'}: no such key"),
    ):
        with pytest.raises(kind) as raised:
            action()
        assert str(raised.value) == sentence
    require_model(file)
    require_model("org/name")  # may be a hub id
    require_file(file, "")
