"""The trained tiny VLM of `examples/`, guarded once per mode for a whole test session.

A test module takes the fixtures with `pytest_plugins = ("tiny_vlm_fixtures",)`. Nobody may write into the folders that
they give; `shutil.copytree` first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_vlm_paths import CALIBRATION, CALIBRATION_SIGNS, EXAMPLE, PROMPTS, SOURCE, Guarded, digests

import vlmguard
from vlmguard.exporter.prompts.picture_paths import PICTURE_FOLDERS


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Guarded:
    """`guarded("restore")`: the folder that a plain `export` writes; `guarded("supervise")`: the same in that mode;
    `guarded("combined")`: calibrated on typographic prompts too; `guarded("runtime_controls")`: the directions of
    the first with every runtime control; `guarded("rows")`: the directions of `align`, and paired rows.

    Calibrating takes seconds, so that the workers of pytest-xdist share one folder.
    """
    from filelock import FileLock  # torch depends on it

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny-vlm"
    root.mkdir(exist_ok=True)
    wishes = {
        "restore": vlmguard.GuardSpec(mode="restore"),
        "auto": None,
        "supervise": vlmguard.GuardSpec(mode="supervise"),
        "combined": vlmguard.GuardSpec(mode="combined"),
        "align": vlmguard.GuardSpec(mode="align"),
        "rows": vlmguard.GuardSpec(mode="align", supervisor="rows"),
        "runtime_controls": vlmguard.GuardSpec(knobs=True, telemetry=True, gate="prompt"),
    }

    def get(mode: str) -> Path:
        out = root / mode
        with FileLock(root / f"{mode}.lock"):
            if not out.exists():
                # What the example was before: a test compares it with what it is afterwards.
                (root / f"{mode}-before.json").write_text(json.dumps(digests(EXAMPLE)))
                of = {"runtime_controls": "restore", "rows": "align"}.get(mode)
                directions = get(of) / "directions.safetensors" if of is not None else None
                both = [CALIBRATION, CALIBRATION_SIGNS] if mode == "combined" else None
                vlmguard.export(SOURCE, out, spec=wishes[mode], directions=directions, calibration=both)
        return out

    return get


@pytest.fixture(scope="module")
def bundled_pictures() -> Iterator[None]:
    """Prompts files elsewhere may name the bundled pictures by absolute path, which a user allows like this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PICTURE_FOLDERS, str(PROMPTS / "images"))
        yield


@pytest.fixture(scope="session")
def raw_directions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the SSD of every layer of the tiny VLM, and nothing calibrated."""
    path = tmp_path_factory.mktemp("directions") / "raw.safetensors"
    vlmguard.extract_directions(SOURCE, path)
    return path
