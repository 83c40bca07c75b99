"""Each integration as `make integration NAME=...` runs it, with what it installs; and it leaves nothing outside `build/`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.parent.name for path in (ROOT / "integrations").glob("*/run.sh"))
CACHES = {".pytest_cache", ".ruff_cache", ".hypothesis", "__pycache__"}
ELSEWHERE = {".git", ".venv", "build", "vlmguard.egg-info"} | CACHES

# Largest differences of logits. Shaders compute exponentials and roots with fewer digits than a CPU.
ROUNDING, SHADERS = 1e-3, 5e-3

pytestmark = [pytest.mark.long, pytest.mark.parametrize("name", NAMES)]


def files() -> dict[str, int]:
    """Every file of the checkout outside `build/`, with its time of change."""
    found = {}
    for folder, below, names in os.walk(ROOT):
        below[:] = [one for one in below if one not in ELSEWHERE]
        found |= {str(Path(folder) / one): (Path(folder) / one).lstat().st_mtime_ns for one in names}
    return found


def test_an_integration_agrees_with_onnxruntime(name: str) -> None:
    before = files()
    result = ROOT / "build" / "integrations" / f"{name}.json"
    result.unlink(missing_ok=True)
    # VENV: this environment, whatever its name; it is there already, so it is not made again
    make = ["make", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.full", "integration", f"NAME={name}"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    content = json.loads(result.read_text(encoding="utf-8"))
    for one in content if isinstance(content, list) else [content]:
        assert one["version"] and one["command"] == f"make integration NAME={name}"
        assert one["modes"], one
        limit = SHADERS if "WebGPU" in one["runtime"] else ROUNDING
        for agreement in one["modes"].values():
            assert agreement["same_tokens"] and agreement["tokens"] > 0 and agreement["largest_difference"] < limit
    assert files() == before
