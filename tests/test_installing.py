"""What the README says about installing: its lines run, and the lock files are what pyproject.toml asks for."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LOCKS = {"light": ("cpu",), "full": ("cpu", "torch", "test"), "optimum": ("optimum",)}


def install_commands() -> list[str]:
    """Each `pip install` of the README's section about installing."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Install\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    lines = [line.partition("#")[0].strip() for line in block.splitlines()]
    return [command.strip() for line in lines for command in line.split("&&")]


@pytest.mark.parametrize("command", install_commands())
def test_pip_takes_the_lines_of_the_readme(command: str) -> None:
    """As written, in the clone, but for `--dry-run`; packages that the lines depend on are not looked up."""
    pip, *arguments = shlex.split(command)
    assert pip == "pip"
    options = ["--dry-run", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments, *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "does not provide the extra" not in done.stderr


def locked(name: str) -> dict[str, list[Requirement]]:
    """The pins of a lock file by package; several where platforms or versions of Python differ."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    pins: dict[str, list[Requirement]] = {}
    for line in re.findall(r"^([a-zA-Z0-9][^\\\n]*?) *\\$", text, re.MULTILINE):
        pin = Requirement(line)
        pins.setdefault(_normal(pin.name), []).append(pin)
    assert text.count("--hash=sha256:") >= sum(map(len, pins.values())) > 20
    return pins


def declared(extras: tuple[str, ...]) -> Iterator[Requirement]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    for text in [*project["dependencies"], *(t for extra in extras for t in project["optional-dependencies"][extra])]:
        yield Requirement(text)


@pytest.mark.parametrize("name", LOCKS)
def test_lock_files_pin_all_that_is_declared(name: str) -> None:
    pins = locked(name)
    for wanted in declared(LOCKS[name]):
        if wanted.name == "torch":  # installed before the lock, so that its CPU build stays
            continue
        for pin in pins[_normal(wanted.name)]:
            (version,) = pin.specifier
            assert version.operator == "==" and wanted.specifier.contains(version.version), f"{pin} is not {wanted}"


@pytest.mark.parametrize("name", LOCKS)
def test_lock_files_leave_torch_and_its_cuda_packages_out(name: str) -> None:
    assert [
        pin for pin in locked(name) if pin in {"torch", "triton", "cuda-toolkit"} or pin.startswith("nvidia-")
    ] == []


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
