"""Node.js: the two examples on the guarded tiny VLM, installed from npm by their own run.sh."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from integrations.cases import write_mode
from integrations.replay import Agreement
from vlmguard.graphs.modes import MODES

pytestmark = [pytest.mark.long, pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")]
ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "integrations"


@pytest.fixture(scope="module")
def results() -> list[dict]:
    for mode in MODES:
        write_mode(mode, BUILD / "cases")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # run.sh calls python
    done = subprocess.run(
        ["bash", ROOT / "integrations/node/run.sh"],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"PATH": path},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((BUILD / "node.json").read_text())


@pytest.mark.parametrize("number", [0, 1], ids=["onnxruntime-node", "transformers.js"])
def test_every_mode_gives_the_same_tokens(results: list[dict], number: int) -> None:
    agreements = {mode: Agreement(**found) for mode, found in results[number]["modes"].items()}
    assert sorted(agreements) == sorted(MODES)
    for mode, agreement in agreements.items():
        assert agreement.ok and agreement.largest_difference < 1e-4 and agreement.tokens > 40, mode


def test_tiles_give_the_same_tokens(results: list[dict]) -> None:
    """transformers.js with SmolVLM's layout: prompts with pictures of every shape, logits where the pixels are the same."""
    (mode, agreement), *others = results[2]["modes"].items()
    agreement = Agreement(**agreement)
    assert mode == "restore" and not others
    assert agreement.ok and agreement.largest_difference < 1e-4 and agreement.tokens > 20


def test_another_guard_is_told_apart(results: list[dict], tmp_path: Path) -> None:
    """The cases of restore, and the model of project under their name."""
    fake = tmp_path / "build" / "integrations" / "cases" / "restore"
    shutil.copytree(BUILD / "cases" / "restore", fake, ignore=shutil.ignore_patterns("model"))
    shutil.copytree(BUILD / "cases" / "project" / "model", fake / "model")
    done = subprocess.run(
        ["node", "check.mjs", tmp_path], cwd=BUILD / "node", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.count("restore: DIFFERS") == 2, done.stdout + done.stderr
