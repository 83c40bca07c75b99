"""Links of the README and of docs/: files exist, and so do sections."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md")))

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
_NAMED = re.compile(r'<a id="([^"]+)"></a>')


def prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(text: str) -> set[str]:
    """Anchors of a page as GitHub forms them: headings in lower case, spaces as hyphens, no punctuation; and `<a id>`."""
    headings = (re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", heading) for heading in _HEADING.findall(text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings} | set(
        _NAMED.findall(text)
    )


def broken(page: Path) -> Iterator[str]:
    """Links of a page to files or sections that do not exist."""
    for target in _LINK.findall(prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists() or (anchor and anchor not in anchors(prose(path))):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_exist(page: Path) -> None:
    assert list(broken(page)) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text('# One: `two`, [three](x)\n\n<a id="old"></a>\n\n## Four\n\n```\n# five\n```\n')
    page.write_text(
        "[a](other.md#one-two-three) [b](other.md#old) [c](#here) [d](other.md#five) [e](no.md)\n\n# Here\n"
    )
    assert list(broken(page)) == ["other.md#five", "no.md"]
