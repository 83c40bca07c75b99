"""The cache of exported checkpoints: when an export is used again, when it is made anew, and what is removed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from vlmguard.exporter.checkpoints import cache
from vlmguard.exporter.checkpoints.cache import export_to, exported
from vlmguard.graphs import user_cache
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.proof.structure import Check

PARITY = (Check("logits", 7, 1e-6, 1e-4, True),)
Exports = list[tuple[str, str | None]]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exports:
    """What was really exported, into a cache below `tmp_path`."""
    made: Exports = []

    def export(
        checkpoint: Path,
        out: Path,
        exporter: str | None,
        dtype: str | None,
        opset: int | None,
        report_progress: Callable,
    ):
        made.append((Path(checkpoint).name, dtype))
        out.mkdir(parents=True)
        (out / "decoder.onnx").write_bytes(b"graph " * 100)
        return PARITY

    monkeypatch.setattr(cache, "export_checkpoint", export)
    monkeypatch.setenv("VLMGUARD_CACHE", str(tmp_path / "cache"))
    return made


def test_the_second_command_uses_the_export_of_the_first(checkpoint: Path, exports: Exports) -> None:
    said: list[str] = []
    with exported(checkpoint, report_progress=lambda stage, done, total: said.append(stage)) as first:
        assert (first.parity, first.cached) == (PARITY, False)
    with exported(checkpoint, report_progress=lambda stage, done, total: said.append(stage)) as second:
        assert (second.parity, second.cached) == (PARITY, True)
        assert (second.folder / "decoder.onnx").read_bytes() == b"graph " * 100
    assert len(exports) == 1
    assert said == [f"using the export of {checkpoint} in {second.folder.parents[1]}"]


def test_another_option_or_a_changed_file_is_another_export(checkpoint: Path, exports: Exports) -> None:
    for dtype in (None, "fp16", "fp16"):
        with exported(checkpoint, dtype=dtype):
            pass
    assert exports == [("checkpoint", None), ("checkpoint", "fp16")]
    (checkpoint / "model.safetensors").write_bytes(b"other weights")
    with exported(checkpoint) as done:
        assert not done.cached
    os.utime(checkpoint / "config.json", ns=(1, 1))
    with exported(checkpoint) as done:
        assert not done.cached


def test_other_versions_are_another_export(checkpoint: Path, exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    with exported(checkpoint):
        pass
    monkeypatch.setattr(cache, "_version", lambda name: "99" if name == "torch" else "1")
    with exported(checkpoint) as done:
        assert not done.cached


@pytest.mark.parametrize("damage", ["changed", "gone", "record"])
def test_a_damaged_export_is_made_again(checkpoint: Path, exports: Exports, damage: str) -> None:
    with exported(checkpoint) as done:
        path = done.folder / "decoder.onnx"
    if damage == "changed":
        path.write_bytes(b"other")
    elif damage == "gone":
        path.unlink()
    else:
        (path.parents[1] / "export.json").write_text("{}")
    with exported(checkpoint) as again:
        assert not again.cached and (again.folder / "decoder.onnx").read_bytes() == b"graph " * 100
    with exported(checkpoint) as third:
        assert third.cached


def test_a_failed_export_leaves_nothing(
    checkpoint: Path, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(checkpoint: Path, out: Path, *_: object, **__: object) -> None:
        out.mkdir(parents=True)
        raise GuardError("no")

    monkeypatch.setattr(cache, "export_checkpoint", fail)
    with pytest.raises(GuardError, match="no"), exported(checkpoint):
        pass
    assert list((tmp_path / "cache" / "exports").iterdir()) == []


@pytest.mark.parametrize("how", ["option", "variable"])
def test_without_the_cache_nothing_is_kept(
    checkpoint: Path, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "variable":
        monkeypatch.setenv("VLMGUARD_CACHE", "")
    for _ in range(2):
        with exported(checkpoint, cache=how != "option") as done:
            assert done.folder.is_dir() and not done.cached
        assert not done.folder.exists()
    assert len(exports) == 2 and not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_done_without(
    checkpoint: Path, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("VLMGUARD_CACHE", str(tmp_path / "file" / "cache"))
    with exported(checkpoint) as done:
        assert done.folder.is_dir()


def test_the_oldest_exports_go_when_the_cache_is_full(
    checkpoint: Path, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMGUARD_CACHE_SIZE", "2K")  # two exports and their records
    folders = []
    for number in range(3):
        copy = shutil.copytree(checkpoint, tmp_path / f"checkpoint {number}")
        with exported(copy) as done:
            folders.append(done.folder)
        os.utime(done.folder.parent, ns=(number, number))
    assert [folder.exists() for folder in folders] == [False, True, True]


@pytest.mark.skipif(cache.fcntl is None, reason="this system has no locks on folders")
def test_an_export_in_use_stays(
    checkpoint: Path, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMGUARD_CACHE_SIZE", "1")
    with ExitStack() as stack:
        first = stack.enter_context(exported(checkpoint))
        with exported(shutil.copytree(checkpoint, tmp_path / "other")) as second:
            assert first.folder.exists() and second.folder.exists()
    with exported(shutil.copytree(checkpoint, tmp_path / "third")) as third:
        assert [one.folder.exists() for one in (first, second, third)] == [False, False, True]


def test_a_size_that_is_none_is_refused(checkpoint: Path, exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMGUARD_CACHE_SIZE", "much")
    sentence = "VLMGUARD_CACHE_SIZE is 'much'; set it to a size such as 20G"
    with pytest.raises(GuardError, match=sentence), exported(checkpoint):
        pass


def test_the_cache_is_the_platforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VLMGUARD_CACHE", raising=False)
    monkeypatch.setattr(user_cache.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache.cache_folder() == tmp_path / "vlmguard"
    monkeypatch.setattr(user_cache.sys, "platform", "darwin")
    assert user_cache.cache_folder() == Path.home() / "Library" / "Caches" / "vlmguard"


def test_a_folder_of_ones_own_comes_from_the_cache_and_goes_there(
    checkpoint: Path, exports: Exports, tmp_path: Path
) -> None:
    for number in range(2):
        assert export_to(tmp_path / str(number), checkpoint) == PARITY
    with exported(checkpoint, "transformers", "fp32") as done:  # what the defaults are
        assert done.cached
        (done.folder / "decoder.onnx").write_bytes(b"")
    assert [sorted(path.name for path in (tmp_path / name).iterdir()) for name in "01"] == [["decoder.onnx"]] * 2
    assert (tmp_path / "1" / "decoder.onnx").read_bytes() == b"graph " * 100
    assert exports == [("checkpoint", None)]


@pytest.mark.parametrize("how", ["option", "variable"])
def test_a_folder_of_ones_own_without_the_cache(
    checkpoint: Path, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "variable":
        monkeypatch.setenv("VLMGUARD_CACHE", "")
    for number in range(2):
        assert export_to(tmp_path / str(number), checkpoint, cache=how != "option") == PARITY
    assert len(exports) == 2 and not (tmp_path / "cache").exists()
