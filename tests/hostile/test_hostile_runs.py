"""A small share of the long runs: `make fuzz` and `make soak` do the rest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="cases are forked")


def run(script: str, *arguments: str) -> str:
    """A process without a runtime's threads, to fork from."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout


def test_damaged_files_are_refused_in_one_line_or_guarded() -> None:
    told = run("fuzz.py", "--cases", "25", "--seed", "2")
    assert told.startswith("25 cases") and "0 findings" in told
    assert "'guarded'" in told and "'refused'" in told  # both happen


@pytest.mark.slow
def test_small_files_that_explode_are_refused_in_one_line(tmp_path: Path) -> None:
    """One of each target and kind; those of chat templates are in runtime/test_confined.py."""
    told = run("explode.py")
    assert "0 findings" in told and "refused" in told


def test_a_finding_is_one() -> None:
    """What is no printable line, no exit code or no answer in time is not taken for a refusal."""
    from hostile.fuzz import Outcome, _judged
    from hostile.process import Ended

    assert _judged(Ended(1, "error: no\n", 0.1), "guarded") == Outcome("refused", "error: no")
    assert _judged(Ended(0, "", 0.1), "guarded").passed
    for ended, kind in (
        (Ended(1, "a warning\nerror: no\n", 0.1), "sentence"),
        (Ended(1, "error: \x1b[31mno\n", 0.1), "sentence"),
        (Ended(2, "error: no\n", 0.1), "sentence"),
        (Ended(1, "Traceback (most recent call last):\n", 0.1), "traceback"),
        (Ended(1, "MemoryError\n", 0.1), "memory"),
        (Ended(-9, "", 11.0), "hang"),
        (Ended(-11, "", 0.1), "crash"),
    ):
        found = _judged(ended, "guarded")
        assert found.kind == kind and not found.passed


@pytest.mark.long
def test_killed_commands_leave_what_is_absent_or_complete() -> None:
    assert "0 findings" in run("kills.py", "--kills", "6")


disks = pytest.mark.skipif(shutil.which("unshare") is None, reason="a disk of its own needs a mount namespace")


@disks
def test_a_full_disk_and_a_read_only_one_are_told_in_one_line() -> None:
    assert "0 findings" in run("disks.py", "--steps", "2", "--only", "export", "sign")


@disks
@pytest.mark.long
def test_disks_and_the_other_commands() -> None:
    assert "0 findings" in run("disks.py", "--steps", "4", "--only", "directions", "evaluate", "report", "verify --run")
