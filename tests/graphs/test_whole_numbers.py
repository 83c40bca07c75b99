"""Numbers in text: what `int` would refuse, or read otherwise than it looks, is none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vlmguard.graphs.whole_numbers import whole_number

PACKAGE = Path(__file__).parents[2]


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("007", 7), ("18446744073709551615", 2**64 - 1)])
def test_ascii_digits_are_a_number(text: str, number: int) -> None:
    assert whole_number(text) == number


@pytest.mark.parametrize(
    "text", ["", "²", "1²", "٣", "½", "-1", "+1", " 1", "1_000", "1.0", "one", "9" * 21, "9" * 5000]
)
def test_any_other_text_is_none(text: str) -> None:
    assert whole_number(text) is None


def test_no_other_code_asks_whether_text_is_digits() -> None:
    """`"²".isdigit()` holds and `int("²")` raises: the question is asked in one place."""
    asking = [
        path.relative_to(PACKAGE).as_posix()
        for part in ("graphs", "runtime", "exporter", "apps", "plugins")
        for path in (PACKAGE / part).rglob("*.py")
        if re.search(r"\.(isdigit|isdecimal|isnumeric)\(", path.read_text(encoding="utf-8"))
    ]
    assert asking == ["graphs/whole_numbers.py"]
