"""Every shell command that README.md and docs/ show: program, command and options exist, and so do files and targets.

Nothing is run: `test_readme.py` and the integrations run what they can.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from shell_lines import PROGRAMS, wrong_usage

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
_SHELL = ("", "bash", "sh", "shell", "console")


def shown_commands(page: Path) -> Iterator[tuple[str, bool]]:
    """`(command line, whether it is whole)`: lines of shell blocks are, code in a sentence may be a command's name alone."""
    text = page.read_text(encoding="utf-8")
    for language, block in re.findall(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        if language in _SHELL:
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                for command in re.split(r" && | \| |; ", line.strip().removeprefix("$ ")):
                    yield command.strip(), True
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", prose):
        for command in code.split(" && "):
            yield command.strip(), False


def fault(command: str, whole: bool) -> str | None:
    """What is wrong with a command line; `None` for those that are right, and for what is no command of this project."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError:
        return None  # prose with an apostrophe
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables of the environment
        words = words[1:]
    if not words:
        return None
    program = words[0].rpartition("/")[2]
    if program in PROGRAMS:
        if not whole and (len(words) == 1 or "..." in words or "…" in words):
            return None
        wrong = wrong_usage(shlex.join([program, *(word.strip("[]") for word in words[1:] if word != "...")]))
        only_begun = wrong is not None and (wrong.startswith("Missing") or wrong.endswith("requires an argument."))
        return None if only_begun and not whole else wrong
    if program == "make":
        unknown = [word for word in words[1:] if "=" not in word and word not in TARGETS and not word.isupper()]
        return f"no such target: {', '.join(unknown)}" if unknown else None
    if program in ("python", "python3") and len(words) > 1:
        if words[1] == "-m" and words[2].startswith(("vlmguard", "integrations")):
            return None if importlib.util.find_spec(words[2]) is not None else f"no such module: {words[2]}"
        if words[1].endswith(".py") and "/" in words[1] and not (ROOT / words[1]).is_file():
            return f"no such file: {words[1]}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_of_a_page_exists(page: Path) -> None:
    faults = {command: wrong for command, whole in shown_commands(page) if (wrong := fault(command, whole)) is not None}
    assert faults == {}


def test_commands_are_found_and_wrong_ones_are_seen() -> None:
    assert sum(1 for page in PAGES for command, _ in shown_commands(page) if command.startswith(PROGRAMS)) > 60
    assert fault("vlmguard directions CHECKPOINT OUT --calibrate-for restore", False) is not None
    assert fault("vlmguard inspect", False) is None and fault("vlmguard inspect", True) is not None
    assert fault("make nothing", True) == "no such target: nothing" and fault("make demo", True) is None
    assert fault("python benchmarks/gone.py", True) == "no such file: benchmarks/gone.py"
    assert fault("python -m vlmguard.gone", True) == "no such module: vlmguard.gone"
