"""The table: every name once, and a subset for `make test` that shows each pattern."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from zoo.model import ZooModel
from zoo.table import ALL_MAKERS, FAST, MODULES, module_of

# Letters of the catalogue in docs/graphs.md.
LETTERS = {"A", "A''", "A3", "A4", "B", "B'", "B''", "C", "D", "E", "F", "G", "H", "I", "J", "K"}


def test_what_make_test_runs_is_in_the_table() -> None:
    assert ALL_MAKERS.keys() >= FAST
    assert {module_of(name) for name in ALL_MAKERS} <= MODULES.keys()


def test_make_test_sees_every_pattern(zoo: Callable[[str], ZooModel]) -> None:
    seen: set[str] = set()
    for name in FAST:
        with contextlib.suppress(pytest.skip.Exception):  # its exporter is not installed
            seen.update(zoo(name).patterns)
    assert seen >= LETTERS
