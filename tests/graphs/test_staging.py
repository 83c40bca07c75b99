"""A folder is written whole or not at all: by success, by failure, by a kill in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

from vlmguard.graphs import stage_locks, staging
from vlmguard.graphs.digests import BIG
from vlmguard.graphs.errors import GuardError, OutputRefused
from vlmguard.graphs.replaceable import WRITTEN_NAME, foreign_file, written_record
from vlmguard.graphs.staging import bring, require_writable, staged, write_file


def listing(folder: Path) -> list[str]:
    """Hidden ones too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def refusal(action) -> str:
    with pytest.raises(OutputRefused) as raised:
        action()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def write(out: Path, content: str = "new", force: bool = False) -> None:
    with staged(out, force) as stage:
        (stage / "onnx").mkdir()
        (stage / "onnx" / "model.onnx").write_text(content)


# --------------------------------------------------------------------------------------------------------------- success


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with staged(out) as stage:
        assert stage.parent == out.parent  # one file system, so that the last step is one rename
        assert stage.name.startswith(".out.vlmguard-")
        (stage / "file").write_text("x")
        assert not out.exists()
    assert listing(tmp_path) == ["deep", "deep/er", "deep/er/out", "deep/er/out/file"]
    assert out.stat().st_mode & 0o777 == 0o755  # mkdtemp makes folders that nobody else can read


def test_a_relative_folder_is_meant_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with staged(Path("out")) as stage:
        (stage / "file").write_text("x")
        monkeypatch.chdir("/")
    assert listing(tmp_path) == ["out", "out/file"]


# --------------------------------------------------------------------------------------------------------------- failure


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("force", [False, True])
def test_a_failure_leaves_nothing_and_the_old_folder_alone(
    tmp_path: Path, failure: type[BaseException], force: bool
) -> None:
    out = tmp_path / "out"
    if force:
        write(out, "old")
    before = listing(tmp_path)
    with pytest.raises(failure), staged(out, force) as stage:
        (stage / "half").write_text("x")
        raise failure
    assert listing(tmp_path) == before
    assert not force or (out / "onnx" / "model.onnx").read_text() == "old"


def test_a_disk_that_fails_inside_the_block_is_said_in_one_line(tmp_path: Path) -> None:
    def fill() -> None:
        with staged(tmp_path / "out") as stage:
            (stage / "file").write_text("x")
            raise OSError(28, "No space left on device")

    assert refusal(fill) == f"{tmp_path / 'out'}: cannot be written (No space left on device); choose another OUT"
    assert listing(tmp_path) == []


# ------------------------------------------------------------------------------------------------------- two runs at once


def writing(out: Path) -> str:
    return f"{out}: another run is writing it; wait for it, or choose another OUT"


@pytest.mark.parametrize("force", [False, True])
def test_the_second_of_two_threads_is_refused(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "out"
    with staged(out) as stage:
        (stage / "file").write_text("first")
        assert refusal(lambda: write(out, "second", force)) == writing(out)
        assert refusal(lambda: require_writable(out, force)) == writing(out)
        write(tmp_path / "other")
    assert (out / "file").read_text() == "first"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["other", "out"]


@pytest.mark.parametrize("force", [False, True])
def test_the_second_of_two_processes_is_refused(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "out"
    with running(out):
        assert refusal(lambda: write(out, "second", force)) == writing(out)
    write(out, "third")
    assert listing(tmp_path) == ["out", "out/onnx", "out/onnx/model.onnx"]


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads take turns as often as they can, so that those that start together do meet."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("round", range(20))
def test_of_many_threads_one_writes(tmp_path: Path, round: int) -> None:
    out, barrier = tmp_path / "out", threading.Barrier(8)

    def attempt(number: int) -> str:
        barrier.wait()
        try:
            write(out, str(number))
        except OutputRefused as error:
            return str(error)
        return str(number)

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(attempt, range(8)))
    (winner,) = [one for one in told if one.isdigit()]
    exists = f"{out}: exists already; choose another OUT, or replace it with --force"
    assert {one for one in told if not one.isdigit()} <= {writing(out), exists}
    assert (out / "onnx" / "model.onnx").read_text() == winner
    assert listing(tmp_path) == ["out", "out/onnx", "out/onnx/model.onnx"]


@pytest.mark.usefixtures("hurried")
def test_of_many_threads_each_writes_the_file_whole(tmp_path: Path) -> None:
    path, barrier = tmp_path / "file", threading.Barrier(8)

    def attempt(number: int) -> None:
        barrier.wait()
        write_file(path, b"%d" % number * 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(attempt, range(8)))
    assert path.read_bytes() in {b"%d" % number * 100 for number in range(8)}
    assert listing(tmp_path) == ["file"]


def test_a_folder_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def late() -> None:
        with staged(out) as stage:
            (stage / "file").write_text("second")
            out.mkdir()
            (out / "file").write_text("first")

    assert refusal(late) == f"{out}: exists already; choose another OUT, or replace it with --force"
    assert listing(tmp_path) == ["out", "out/file"] and (out / "file").read_text() == "first"


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_appears_at_the_last_moment_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    """Right after the last look whether it is there."""
    out, real = tmp_path / "out", Path.rename

    def late(stage: Path, target: Path) -> Path:
        (out / "onnx").mkdir(parents=True)
        (out / "onnx" / "model.onnx").write_text("first")
        return real(stage, target)

    monkeypatch.setattr(Path, "rename", late)
    sentence = f"{out}: exists already; choose another OUT, or replace it with --force"
    assert refusal(lambda: write(out, "second", force)) == sentence
    assert (out / "onnx" / "model.onnx").read_text() == "first" and listing(tmp_path) == [
        "out",
        "out/onnx",
        "out/onnx/model.onnx",
    ]


def test_no_look_finds_a_folder_to_be_replaced_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is looked: one that was not there at the first look is another run's."""
    out, real = tmp_path / "out", Path.exists
    with pytest.raises(OutputRefused, match="exists already"), staged(out) as stage:
        (stage / "file").write_text("second")
        looks: list[bool] = []

        def late(path: Path, **options: bool) -> bool:
            found = real(path, **options)
            if path == out:
                looks.append(found)
                if not found:
                    out.mkdir()
                    (out / "file").write_text("first")
            return found

        monkeypatch.setattr(Path, "exists", late)
    assert looks[0] is False and (out / "file").read_text() == "first"
    assert listing(tmp_path) == ["out", "out/file"]


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_swept_as_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, locked: bool
) -> None:
    real, swept = stage_locks.hold, []

    def slow(path: Path) -> int:
        """Whoever sweeps comes before the lock, or between the asking for it and the getting."""
        lock = real(path) if locked else -1
        if not swept:
            swept.append(path)
            stage_locks.remove(path)
        return lock if locked else real(path)

    monkeypatch.setattr(stage_locks, "hold", slow)
    if kind == "folder":
        write(tmp_path / "out")
    else:
        write_file(tmp_path / "out", b"new")
    assert swept and listing(tmp_path) == (["out", "out/onnx", "out/onnx/model.onnx"] if kind == "folder" else ["out"])


def test_without_locks_the_number_of_the_process_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_locks, "fcntl", None)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = tmp_path / f".out.vlmguard-{ended.pid}-a"
    dead.mkdir()
    out = tmp_path / "out"
    with staged(out):
        assert not dead.exists()
        assert refusal(lambda: write(out)) == writing(out)
    assert listing(tmp_path) == ["out"]


# --------------------------------------------------------------------------------------------------- what is there already


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    sentence = f"{out}: exists already; choose another OUT, or replace it with --force"
    assert refusal(lambda: write(out)) == sentence
    assert refusal(lambda: require_writable(out, force=False)) == sentence
    assert (out / "onnx" / "model.onnx").read_text() == "old"
    assert listing(tmp_path) == ["out", "out/onnx", "out/onnx/model.onnx"]


def test_an_empty_folder_is_refused_too(tmp_path: Path) -> None:
    assert "exists already" in refusal(lambda: write(tmp_path))


def kept(out: Path, foreign: str) -> str:
    return (
        f"{out}: holds {foreign}, which is no part of a model that vlmguard wrote, and --force would delete it; "
        "choose another OUT"
    )


def fill(folder: Path, *names: str, content: str = "mine") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("names", "foreign"),
    [
        (["thesis.txt"], "thesis.txt"),
        (["year/thesis.txt"], "year/thesis.txt"),
        (["a/b/c/model.onnx"], "a/b/c/model.onnx"),
        (["models/a.onnx", "src/main.py", "thesis.tex"], "thesis.tex"),
        (["model.onnx", "src/main.py"], "src/main.py"),
        (["onnx/model.onnx", "onnx/notes.md"], "onnx/notes.md"),
        (["model.onnx", "config.json", ".env"], ".env"),
        (["model.onnx", "config.json", "model.safetensors"], "model.safetensors"),  # a checkpoint's own weights
        (["config.json", "tokenizer.json"], "config.json"),
        (["README.md"], "README.md"),
        (["guard.json"], "guard.json"),  # no manifest of ours
        (["guard.json", "model.onnx"], "guard.json"),
        ([".vlmguard.json", "model.onnx"], ".vlmguard.json"),
    ],
)
def test_force_keeps_a_folder_with_a_file_that_no_command_writes(
    tmp_path: Path, names: list[str], foreign: str
) -> None:
    """A mistyped OUT: a folder of the user's, which may hold a model among other things."""
    out = tmp_path / "out"
    fill(out, *names)
    sentence = kept(out, foreign)
    assert refusal(lambda: write(out, force=True)) == refusal(lambda: require_writable(out, force=True)) == sentence
    assert all((out / name).read_text() == "mine" for name in names)


def test_force_keeps_a_folder_with_a_linked_folder(tmp_path: Path) -> None:
    fill(tmp_path / "thesis", "chapter.tex")
    fill(tmp_path / "out", "model.onnx")
    (tmp_path / "out" / "notes").symlink_to(tmp_path / "thesis")
    assert refusal(lambda: write(tmp_path / "out", force=True)) == kept(tmp_path / "out", "notes")


@pytest.mark.parametrize("manifest", ["guard.json", ".vlmguard.json"])
def test_force_replaces_what_vlmguard_lists_and_no_file_besides(tmp_path: Path, manifest: str) -> None:
    out, names = tmp_path / "out", ["decoder/1/model.onnx", "decoder/config.pbtxt", "model.engine"]
    content = {
        "guard.json": {"schema": "vlmguard.guard/1", "files": dict.fromkeys(names)},
        ".vlmguard.json": {"schema": "vlmguard.written/1", "files": names},
    }
    fill(out, *names)
    fill(out, manifest, content=json.dumps(content[manifest]))
    require_writable(out, force=True)
    for foreign in ("decoder/1/notes.txt", "model.onnx", "tokenizer.json"):  # of a layout, but not this folder's
        fill(out, foreign)
        assert refusal(lambda: write(out, force=True)) == kept(out, foreign)
        (out / foreign).unlink()
    write(out, force=True)
    assert listing(out) == ["onnx", "onnx/model.onnx"]


def test_the_record_of_a_conversion_lists_its_files(tmp_path: Path) -> None:
    fill(tmp_path / "out", "onnx/model.onnx", "tokens/odd.bin")
    (tmp_path / "out" / WRITTEN_NAME).write_bytes(written_record(tmp_path / "out"))
    assert foreign_file(tmp_path / "out") is None
    fill(tmp_path / "out", "tokens/notes.txt")
    assert foreign_file(tmp_path / "out") == "tokens/notes.txt"


@pytest.mark.parametrize(
    "names",
    [
        ["model.onnx"],
        ["onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_q4.onnx", "config.json", "tokenizer.json", "README.md"],
        ["model.onnx", "model.onnx.data", "genai_config.json", "chat_template.jinja"],
        ["model.onnx", "model.onnx_data_1", "model.onnx.guard.data", "export.json"],
    ],
)
def test_force_replaces_a_model_layout_and_an_empty_folder(tmp_path: Path, names: list[str]) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", force=True)
    fill(out, *names, content="old")
    write(out, force=True)
    assert listing(out) == listing(tmp_path / "empty") == ["onnx", "onnx/model.onnx"]


def test_external_data_belongs_to_a_layout_whatever_it_is_called(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    weight = onnx.numpy_helper.from_array(np.ones(4, np.float32), "w")
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["w"], ["y"])], "g", [], [output], [weight])
    model = onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 18)])
    outside = {"save_as_external_data": True, "location": "numbers.bin", "size_threshold": 0}
    onnx.save_model(model, out / "model.onnx", **outside)
    assert foreign_file(out) is None
    fill(out, "other.bin")
    assert foreign_file(out) == "other.bin"


def test_a_file_that_comes_during_the_run_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")

    def late() -> None:
        with staged(out, force=True) as stage:
            (stage / "file").write_text("new")
            (out / "thesis.txt").write_text("mine")

    assert refusal(late) == kept(out, "thesis.txt")
    assert listing(tmp_path) == ["out", "out/onnx", "out/onnx/model.onnx", "out/thesis.txt"]


@pytest.mark.parametrize("name", ["~/out", "a/~/out"])
def test_a_literal_tilde_is_never_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for action in (lambda: write(Path(name)), lambda: write_file(Path(name), b"x")):
        with pytest.raises(GuardError, match="has a folder named ~, which a shell would not reach"):
            action()
    assert listing(tmp_path) == []


def test_force_replaces_the_folder_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    (out / "README.md").write_text("x")
    write(out, force=True)
    assert listing(tmp_path) == ["out", "out/onnx", "out/onnx/model.onnx"]
    assert (out / "onnx" / "model.onnx").read_text() == "new"


def test_the_old_folder_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    with staged(out, force=True) as stage:
        (stage / "file").write_text("new")
        assert (out / "onnx" / "model.onnx").read_text() == "old"


def test_the_old_folder_comes_back_when_the_swap_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = tmp_path / "out", Path.rename
    write(out, "old")

    def failing(path: Path, target: Path) -> Path:
        if target == out and not path.name.endswith("-old"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    assert refusal(lambda: write(out, force=True)) == (
        f"{out}: cannot be written (Input/output error); choose another OUT"
    )
    assert listing(tmp_path) == ["out", "out/onnx", "out/onnx/model.onnx"]
    assert (out / "onnx" / "model.onnx").read_text() == "old"


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_never_replaced_by_a_folder(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "out"
    out.write_text("precious")
    assert refusal(lambda: write(out, force=force)) == f"{out}: is a file; choose a folder for OUT"
    assert out.read_text() == "precious"


def test_a_link_is_replaced_and_what_it_led_to_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "precious").write_text("x")
    out = tmp_path / "out"
    out.symlink_to("real")
    write(out, force=True)
    assert listing(tmp_path) == ["out", "out/onnx", "out/onnx/model.onnx", "real", "real/precious"]
    assert not out.is_symlink()


@pytest.mark.parametrize("what", ["a repository", "where we are", "above where we are", "home"])
def test_force_does_not_replace_what_people_live_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    out = tmp_path / "out"
    (out / "work").mkdir(parents=True)
    if what == "a repository":
        (out / ".git").mkdir()
    elif what == "home":
        monkeypatch.setenv("HOME", str(out))
    else:
        monkeypatch.chdir(out if what == "where we are" else out / "work")
    before = listing(tmp_path)
    sentence = f"{out}: holds more than a model, --force will not replace it; choose another OUT"
    assert refusal(lambda: write(out, force=True)) == sentence
    assert listing(tmp_path) == before


def test_a_kill_between_the_two_renames_gives_the_old_folder_back(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    out = tmp_path / "out"
    write(out, "old")
    out.rename(tmp_path / f".out.vlmguard-{ended.pid}-a-old")
    sentence = f"{out}: exists already; choose another OUT, or replace it with --force"
    assert refusal(lambda: require_writable(out, force=False)) == sentence
    assert (out / "onnx" / "model.onnx").read_text() == "old"


@pytest.mark.parametrize("force", [False, True])
def test_a_link_to_nothing_is_refused_early(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "out"
    out.symlink_to("nothing")
    assert refusal(lambda: require_writable(out, force)) == f"{out}: is a file; choose a folder for OUT"


# ------------------------------------------------------------------------------------------------------------- permissions


def test_a_file_in_the_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "out"
    sentence = f"{out}: cannot be written (no permission in {tmp_path / 'file'}); choose another OUT"
    assert refusal(lambda: write(out)) == sentence
    assert refusal(lambda: require_writable(out, force=True)) == sentence
    assert listing(tmp_path) == ["file"]


def test_a_parent_without_permission_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def no_permission(path: Path, mode: int) -> bool:
        asked.append((path, mode))
        return False

    monkeypatch.setattr(staging.os, "access", no_permission)  # root may write anywhere
    out = tmp_path / "not" / "there" / "out"
    expected = f"{out}: cannot be written (no permission in {tmp_path}); choose another OUT"
    assert refusal(lambda: require_writable(out, force=False)) == expected
    assert asked == [(tmp_path, os.W_OK)]
    assert listing(tmp_path) == []


def test_a_stage_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    out = tmp_path / "out"
    monkeypatch.setattr(staging, "begin", read_only)
    assert refusal(lambda: write(out)) == f"{out}: cannot be written (Read-only file system); choose another OUT"
    assert listing(tmp_path) == []


# -------------------------------------------------------------------------------------------------------------------- kills

KILLED = """
import sys, time
from pathlib import Path
from vlmguard.graphs.staging import staged
with staged(Path(sys.argv[1]), force=True) as stage:
    (stage / "half").write_text("x")
    print("started", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def running(out: Path) -> Iterator[None]:
    """A process that is writing `out`, and is killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "started\n"
        try:
            yield
        finally:
            process.send_signal(signal.SIGKILL)
            assert process.wait(timeout=30) == -signal.SIGKILL


def kill_in_the_middle(out: Path) -> None:
    with running(out):
        pass


@pytest.mark.parametrize("name", ["out", "out [1]*"])
def test_after_a_kill_there_is_nothing_and_the_next_run_tidies_up(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    kill_in_the_middle(out)
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(f".{name}.vlmguard-") and listing(left) == ["half"]
    write(out)
    assert listing(tmp_path) == [name, f"{name}/onnx", f"{name}/onnx/model.onnx"]


def test_after_a_kill_the_old_folder_is_still_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    kill_in_the_middle(out)
    assert (out / "onnx" / "model.onnx").read_text() == "old"
    write(out, force=True)
    assert listing(tmp_path) == ["out", "out/onnx", "out/onnx/model.onnx"]


def test_only_what_is_ours_and_dead_is_swept(tmp_path: Path) -> None:
    """Another OUT's leftovers are not ours. Whether a run lives is told by its lock, since numbers of processes come again."""
    ours = f".out.vlmguard-{os.getpid()}-a"
    kept = [f".other.vlmguard-{os.getpid()}-a", ".out.vlmguard-notes", ".out"]
    for name in (*kept, ours):
        (tmp_path / name).mkdir()
    write(tmp_path / "out", "old")
    (tmp_path / f"{ours}-old").mkdir()
    (tmp_path / f".out.vlmguard-{os.getpid()}-file").write_text("half a file")
    write(tmp_path / "out", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "out"])


# -------------------------------------------------------------------------------------------------------------- single files


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert listing(tmp_path) == ["a", "a/b", "a/b/file"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")

    def full(self: Path, target: Path) -> Path:
        assert self.read_bytes() == b"new"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert refusal(lambda: write_file(path, b"new")) == (
        f"{path}: cannot be written (No space left on device); choose another file"
    )
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == ["file"]


def test_the_next_write_sweeps_up_after_a_killed_one(tmp_path: Path) -> None:
    (tmp_path / f".file.vlmguard-{os.getpid()}-a").write_text("half")
    write_file(tmp_path / "file", b"whole")
    assert listing(tmp_path) == ["file"]


def test_a_file_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    path = tmp_path / "file" / "onnx"
    assert refusal(lambda: write_file(path, b"x")).startswith(f"{path}: cannot be written (")
    assert listing(tmp_path) == ["file"]


# ------------------------------------------------------------------------------------------------------- bringing files along


def big_file(path: Path) -> Path:
    """Large enough to be linked; a hole, so that it costs nothing."""
    with path.open("wb") as file:
        file.truncate(BIG)
    return path


def test_small_files_are_copied_and_big_ones_linked(tmp_path: Path) -> None:
    small, big = tmp_path / "small", big_file(tmp_path / "big")
    small.write_text("x")
    for source in (small, big):
        bring(source, tmp_path / "out" / "onnx" / source.name)
    out = tmp_path / "out" / "onnx"
    assert (out / "small").read_text() == "x"
    # people edit configs in place: that must not reach the source
    assert not (out / "small").samefile(small)
    assert (out / "big").samefile(big) or staging._reflink(big, tmp_path / "probe")


def test_where_links_are_impossible_big_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def another_device(source: Path, destination: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(staging.os, "link", another_device)
    big = big_file(tmp_path / "big")
    bring(big, tmp_path / "copy")
    assert not (tmp_path / "copy").samefile(big)
    assert (tmp_path / "copy").stat().st_size == BIG


def test_a_copy_shares_no_bytes(tmp_path: Path) -> None:
    big = big_file(tmp_path / "big")
    bring(big, tmp_path / "out" / "big", "copy")
    copied = tmp_path / "out" / "big"
    assert copied.is_file() and not copied.is_symlink() and not copied.samefile(big)
    assert copied.stat().st_size == BIG and big.stat().st_nlink == 1


def test_a_reference_leads_to_the_file_itself(tmp_path: Path) -> None:
    """Not to a link of a cache, which may be swept; small files are copied all the same."""
    big, small = big_file(tmp_path / "big"), tmp_path / "small"
    small.write_text("x")
    (tmp_path / "link").symlink_to("big")
    for source in (tmp_path / "link", small):
        bring(source, tmp_path / "out" / source.name, "reference")
    made = tmp_path / "out" / "link"
    assert made.is_symlink() and made.readlink() == big
    assert not (tmp_path / "out" / "small").is_symlink()


def test_where_the_file_system_can_a_link_is_a_copy_on_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then not even a change in place reaches the other one."""

    def reflink(source: Path, destination: Path) -> bool:
        destination.write_bytes(b"as if cloned")
        return True

    monkeypatch.setattr(staging, "_reflink", reflink)
    big = big_file(tmp_path / "big")
    bring(big, tmp_path / "clone")
    assert (tmp_path / "clone").read_bytes() == b"as if cloned" and big.stat().st_nlink == 1


def test_a_reflink_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.write_text("x")
    monkeypatch.setattr(staging, "_FICLONE", 0)  # no such request
    assert not staging._reflink(small, tmp_path / "clone") and not (tmp_path / "clone").exists()
    monkeypatch.setattr(staging.sys, "platform", "darwin")
    assert not staging._reflink(small, tmp_path / "clone")


@pytest.mark.parametrize("size", ["small", "big"])
def test_a_link_out_of_the_folder_is_followed(tmp_path: Path, size: str) -> None:
    """As in Hugging Face's cache: the copy must stand when the cache is gone."""
    blob = tmp_path / "blobs" / "abc"
    blob.parent.mkdir()
    blob.write_text("x") if size == "small" else big_file(blob)
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / "model.onnx"
    link.symlink_to("../blobs/abc")
    bring(link, tmp_path / "out" / "model.onnx")
    copied = tmp_path / "out" / "model.onnx"
    assert copied.is_file() and not copied.is_symlink()
    blob.unlink()
    assert copied.stat().st_size == (1 if size == "small" else BIG)
