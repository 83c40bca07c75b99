"""Where the results of the long runs go: the terminal, and their place in a page of docs/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def tell(what: str, lines: Sequence[str], page: Path | None) -> None:
    """Print a result; with a page, also put it between that page's marks for it."""
    for line in lines:
        print(line)
    if page is None:
        return
    begin, end = f"<!-- begin: {what} -->", f"<!-- end: {what} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"{page} has no place for the result of {what}"
    page.write_text("\n".join([before + begin, *(f"- {line}" for line in lines), end + after]), encoding="utf-8")
