"""Nesting depth of a TOML text, before it is parsed: `a.b.c. ...` with 50,000 parts takes tomllib minutes and gigabytes."""

from __future__ import annotations

import re

DEEPEST = 8  # parts of a key, brackets within brackets; a guard.toml has two
# TOML strings and comments, which can contain text that looks like a key. An unterminated one extends to the end of the file,
# so that each character is scanned once.
_TEXT = re.compile(
    r'"""(?:\\.|[^\\])*?(?:"""|\Z)' r"|'''.*?(?:'''|\Z)" r'|"(?:\\.|[^"\\\n])*"?' r"|'[^'\n]*'?" r"|#[^\n]*", re.DOTALL
)


def require_shallow(text: str) -> None:
    """Raises ValueError for a key of more than `DEEPEST` parts, or lists and tables that lie deeper in one another."""
    bare = _TEXT.sub(lambda found: "" if found[0].startswith("#") else "_", text)
    words = re.split(r"[^\w.\-]+", ".".join(part.strip(" \t") for part in bare.split(".")))
    if max((word.count(".") for word in words), default=0) >= DEEPEST:
        raise ValueError(f"a key has more than {DEEPEST} parts")
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", bare):
        depth += 1 if bracket in "[{" else -1
        if depth > DEEPEST:
            raise ValueError(f"lists and tables lie more than {DEEPEST} deep in one another")
