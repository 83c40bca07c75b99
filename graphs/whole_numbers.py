"""Whole numbers in text that comes from files, headers and command lines.

`str.isdigit`, `isdecimal` and `isnumeric` accept characters that `int` rejects ("²") or reads as another script's digits, and
`int` raises on more than 4300 digits. So every such text is read here.
"""

from __future__ import annotations

_MOST_DIGITS = 20  # of 2**64 - 1


def whole_number(text: str) -> int | None:
    """The number that ASCII digits spell, at most 20 of them; `None` for any other text."""
    if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS:
        return int(text)
    return None
