"""Olive with the pass VLMGuard, in an environment of its own that its run.sh installs (torch, transformers 4)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from integrations.cases import write_mode
from integrations.replay import Agreement
from vlmguard.graphs.modes import MODES

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "integrations"


def test_olive_guards_and_refuses() -> None:
    """The script asserts more: the folder verifies, wrong directions are refused, passes behind the guard are told."""
    for mode in MODES:
        write_mode(mode, BUILD / "cases")
    (BUILD / "olive.json").unlink(missing_ok=True)
    done = subprocess.run(["bash", ROOT / "integrations/olive/run.sh"], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    agreements = {
        mode: Agreement(**found) for mode, found in json.loads((BUILD / "olive.json").read_text())["modes"].items()
    }
    assert sorted(agreements) == sorted(MODES)
    assert all(agreement.ok and agreement.largest_difference < 1e-4 for agreement in agreements.values())
