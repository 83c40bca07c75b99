"""`make demo`'s script with a stand-in for the program: first and last lines, and no colours in a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from shell_lines import wrong_usage

DEMO = Path(__file__).parents[1] / "examples" / "demo.sh"
PROGRAM = """#!/bin/sh
case "$1" in
evaluate) echo "With an image, harmful requests answered: 100% -> 4%. Harmless requests refused: 0% -> 1%." ;;
verify) echo "PROVED 15/15: guarded" ;;
*) echo "did $*" ;;
esac
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_demo_ends_with_a_verdict_and_the_next_command(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("vlmguard", "vlmguard-export"):
        (tmp_path / "bin" / name).write_text(PROGRAM)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "examples").mkdir()
    script = tmp_path / "examples" / "demo.sh"
    script.write_bytes(DEMO.read_bytes())
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, env=os.environ | {"PATH": path})
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert (
        lines[0].startswith("This demo runs on a toy: a synthetic vision-language model") and "\x1b" not in done.stdout
    )
    assert lines[-5:] == [
        "Verdict, for the toy",
        "two passes (align):  With an image, harmful requests answered: 100% -> 4%. Harmless requests refused: 0% -> 1%.",
        "one pass (restore):  With an image, harmful requests answered: 100% -> 4%. Harmless requests refused: 0% -> 1%.",
        "PROVED 15/15: guarded",
        "next: bin/vlmguard playground build/demo/guarded",
    ]
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    assert len(commands) >= 8 and [wrong_usage(command) for command in commands] == [None] * len(commands)
