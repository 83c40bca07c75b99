"""What all tests share: golden files, which `pytest --update-golden` writes and a person then reviews like code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).with_name("golden")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what golden tests compare with, and pass them")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process per file, as `--dist loadfile` has it, but for tests that name a group of their own (the zoo's graphs)."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
    """`golden("name.json", content)`: plain data equals what the file holds."""

    def compare(name: str, content: Any) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        assert path.is_file(), f"{path} is missing; write it with pytest --update-golden, and look at it"
        assert json.loads(path.read_text(encoding="utf-8")) == content

    return compare
