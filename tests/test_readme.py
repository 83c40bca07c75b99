"""README: "I deploy with X: do this". Each row's command is run as it stands, on the tiny VLM."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from random_directions import random_directions, write_directions
from tiny_vlm_paths import PROMPTS, Guarded

ROOT = Path(__file__).parents[1]
HEADING = "## I deploy with ..."
PICTURE = sorted((PROMPTS / "images").glob("*.png"))[0]

pytest_plugins = ("tiny_vlm_fixtures", "zoo_fixtures")


def rows() -> dict[str, str]:
    """What is deployed with -> the command of that row."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(HEADING)[1].split("\n## ")[0]
    found = re.findall(r"^\| (.+?) \| `(.+?)` \| .+ \|$", section, re.MULTILINE)
    assert len(found) == section.count("\n|") - 2, "a row has no command in its second column"
    return dict(found)


# How a row is run, in a folder that has what its command names


def once(command: str, folder: Path) -> None:
    """It ends by itself, and did what it says."""
    done = subprocess.run(
        shlex.split(command), cwd=folder, env=_environment(), capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    written = [word for word in shlex.split(command)[2:] if word.startswith(("guarded-", "models"))]
    assert done.stdout.strip() and all(any((folder / word).iterdir()) for word in written)


def serving(command: str, folder: Path) -> None:
    """It says where it listens, answers there, and ends when it is told to."""
    running = subprocess.Popen(
        [*shlex.split(command), "--port", "0"],
        cwd=folder,
        env=_environment() | {"BROWSER": "true"},  # which opens nothing
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=_hear_interrupts,
    )
    try:
        assert running.stdout is not None
        said = next(line for line in running.stdout if "http://" in line)
        url = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert url is not None, said
        page = "/healthz" if " serve " in command else "/"
        with urllib.request.urlopen(url[0] + page, timeout=60) as answer:
            assert answer.status == 200
    finally:
        running.send_signal(signal.SIGINT)
        running.wait(timeout=60)


def _hear_interrupts() -> None:
    """As on a terminal: a shell has what it runs in the background ignore them, and these tests with all they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def made(command: str, folder: Path) -> None:
    """A target of the Makefile, in the checkout and with this environment."""
    # VENV: this environment, whatever its name; it is there already, so it is not made again
    here = [f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.full"]
    done = subprocess.run([*shlex.split(command), *here], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


# What a row needs besides a guarded folder and a picture


def nothing(folder: Path, get: Callable[[str], Any]) -> None:
    pass


def tensorrt(folder: Path, get: Callable[[str], Any]) -> None:
    pytest.importorskip("tensorrt_rtx")  # which the `test` extra has where NVIDIA ships it


def genai_folder(folder: Path, get: Callable[[str], Any]) -> None:
    pytest.importorskip("onnxruntime_genai")
    from integrations.genai.check import build

    build(folder / "genai-folder")


def exported_folder(folder: Path, get: Callable[[str], Any]) -> None:
    source = get("generation_folders")("llava-generation")
    shutil.copytree(source.folder, folder / "exported")
    write_directions(folder / "directions.safetensors", random_directions(source.width, [0, 1], calibrated=False))


# row -> how it is run, what it needs, and whether it is quick enough for every run
ROWS: dict[str, tuple[Callable[[str, Path], None], Callable[[Path, Callable[[str], Any]], None], bool]] = {
    "onnxruntime, Python": (once, nothing, True),
    "onnxruntime-gpu, CUDA": (once, nothing, True),
    "TensorRT, TensorRT-RTX": (once, tensorrt, False),
    "onnxruntime-genai": (once, genai_folder, False),
    "Node.js, transformers.js": (made, nothing, False),
    "a browser": (serving, nothing, False),
    "OpenVINO": (made, nothing, False),
    "C++": (made, nothing, False),
    "Triton Inference Server": (once, nothing, False),
    "an OpenAI-compatible server": (serving, nothing, False),
    "Olive": (made, nothing, False),
    "transformers.exporters": (once, exported_folder, False),
}


@pytest.fixture
def folder(tmp_path: Path, guarded: Guarded) -> Iterator[Path]:
    """Where a reader of the README is: in a checkout, with a guarded folder and a picture."""
    shutil.copytree(guarded("restore"), tmp_path / "guarded")
    shutil.copyfile(PICTURE, tmp_path / "photo.png")
    (tmp_path / "integrations").symlink_to(ROOT / "integrations")
    yield tmp_path


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if ROWS[name][2] else pytest.mark.long) for name in ROWS])
def test_what_to_do_runs(name: str, folder: Path, request: pytest.FixtureRequest) -> None:
    run, prepare, _ = ROWS[name]
    prepare(folder, request.getfixturevalue)
    run(rows()[name], folder)


def test_every_row_is_run() -> None:
    assert list(rows()) == list(ROWS)


def _environment() -> dict[str, str]:
    """This interpreter's `python` and `vlmguard` first."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
