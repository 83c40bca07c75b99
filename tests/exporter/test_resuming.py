"""A killed extraction goes on where it was: no batch is read twice, and the result is the same to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_vlm_paths import ANCHORS, SOURCE

from vlmguard.exporter.extract_directions import extract_directions
from vlmguard.exporter.extraction import extract
from vlmguard.exporter.extraction.kept_states import KeptStates, kept_beside
from vlmguard.graphs.errors import GuardError
from vlmguard.runtime.generation import Request
from vlmguard.runtime.vlm import VisionLanguageModel

pytest_plugins = ("tiny_vlm_fixtures",)

KILLED = """
import os, signal, sys
from vlmguard.exporter.extraction.kept_states import KeptStates
from vlmguard.exporter.extract_directions import extract_directions

keep, left = KeptStates.keep, [3]
def dying(self, batch, states):
    keep(self, batch, states)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
KeptStates.keep = dying
extract_directions(sys.argv[1], sys.argv[2], anchors=sys.argv[3])
"""


def test_a_killed_extraction_goes_on_where_it_was(
    tmp_path: Path, raw_directions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "d.safetensors"
    command = [sys.executable, "-c", KILLED, str(SOURCE), str(output), str(ANCHORS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    work = tmp_path / ".d.safetensors.work"
    assert not output.exists() and len(list(work.iterdir())) == 3

    read: list[int] = []
    real = VisionLanguageModel.prefill
    monkeypatch.setattr(
        VisionLanguageModel, "prefill", lambda self, batch: read.append(len(batch)) or real(self, batch)
    )
    extract_directions(SOURCE, output, anchors=ANCHORS)
    assert output.read_bytes() == raw_directions.read_bytes()
    assert len(read) == 12 - 3  # 192 prompts, 16 a batch
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


INTERRUPTED = """
import os, signal, sys
from vlmguard.cli import _run
from vlmguard.exporter.extraction.kept_states import KeptStates

keep = KeptStates.keep
def interrupting(self, batch, states):
    keep(self, batch, states)
    os.kill(os.getpid(), signal.SIGINT)
KeptStates.keep = interrupting
_run(["directions", *sys.argv[1:]])
"""


def test_ctrl_c_in_an_extraction_is_one_line_and_code_130(tmp_path: Path) -> None:
    output = tmp_path / "d.safetensors"
    command = [sys.executable, "-c", INTERRUPTED, str(SOURCE), "--anchors", str(ANCHORS), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (
        130,
        "",
        f"interrupted: hidden states are kept in {tmp_path / '.d.safetensors.work'} (batches: 1); run the same command "
        "again to resume, or remove that folder\n",
    )
    assert os.listdir(tmp_path) == [".d.safetensors.work"]


def test_an_interrupt_carries_what_is_kept_and_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as stopped, kept_beside(tmp_path / "d", "model") as kept:
        kept.keep([Request("a")], np.zeros((1, 1, 1), np.float32))
        kept.keep([Request("b")], np.zeros((1, 1, 1), np.float32))
        raise KeyboardInterrupt
    assert stopped.value.__notes__ == [
        f"hidden states are kept in {tmp_path / '.d.work'} (batches: 2); run the same command again to resume, or "
        "remove that folder"
    ]
    with pytest.raises(KeyboardInterrupt) as stopped, kept_beside(tmp_path / "e", "model"):
        raise KeyboardInterrupt
    assert not hasattr(stopped.value, "__notes__")  # nothing is kept


def test_an_interrupted_one_keeps_its_states_and_a_refused_one_does_not(tmp_path: Path) -> None:
    batch, states = [Request("wash it")], np.ones((1, 2, 3), np.float32)
    for error, left in ((KeyboardInterrupt, [".d.work"]), (GuardError, [])):
        with pytest.raises(error), kept_beside(tmp_path / "d", "model") as kept:
            kept.keep(batch, states)
            raise error("stop")
        assert sorted(os.listdir(tmp_path)) == left
    with kept_beside(tmp_path / "d", "model"):
        pass
    assert os.listdir(tmp_path) == []


def test_only_the_same_batch_of_the_same_model_is_found(tmp_path: Path) -> None:
    states = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    batch = [Request("wash it"), Request("steal it")]
    kept = KeptStates(tmp_path / "work", "one")
    kept.keep(batch, states)
    found = kept.find(batch)
    assert found is not None and found.tobytes() == states.tobytes()
    assert kept.find(batch[::-1]) is None and kept.find(batch[:1]) is None
    assert kept.find([Request("wash"), Request(" itsteal it")]) is None
    assert KeptStates(tmp_path / "work", "other").find(batch) is None


def test_a_file_that_was_cut_short_is_read_again(tmp_path: Path) -> None:
    kept = KeptStates(tmp_path / "work", "one")
    batch = [Request("wash it")]
    kept.keep(batch, np.ones((1, 2, 3), np.float32))
    (path,) = (tmp_path / "work").iterdir()
    for content in (path.read_bytes()[:-4], b"", b"not an array"):
        path.write_bytes(content)
        assert kept.find(batch) is None


def test_states_that_overflowed_are_not_kept(tmp_path: Path) -> None:
    broken = np.full((1, 2, 3), np.nan, np.float32)
    with pytest.raises(GuardError), kept_beside(tmp_path / "d", "model") as kept:
        extract.read_batches(lambda batch: broken, [Request("wash it")], [[0]], kept=kept)
    assert os.listdir(tmp_path) == []
