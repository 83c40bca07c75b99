"""A console that prints only visible characters, so that untrusted text cannot control the terminal.

Names, paths and answers come from untrusted files. Escape sequences in them could clear the screen, rewrite earlier output
or rename the window; a bidirectional override reverses a name. `rich.markup.escape` handles only markup.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from ..graphs.strict_json import to_strict_json

# Control characters of ASCII and Latin-1 (but for tab and line feed), line separators, and what changes the direction of text.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def seen(text: str) -> str:
    """The text with a sign in the place of each character that would do something instead of being seen."""
    return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text)


class SafeConsole(Console):
    """A rich console; its own control sequences (colours, progress bars) stay, with `NO_COLOR` those of progress bars alone."""

    def __init__(self, **options: Any) -> None:
        if os.environ.get("NO_COLOR"):  # rich would still write bold and dim
            options["color_system"] = None
        super().__init__(**options)

    def on_broken_pipe(self) -> None:
        """The reader has gone (`| head -1`): `usage.quiet_pipe` ends the program; rich would end it with exit code 1."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(seen(segment.text), segment.style)


def show_found(out: Console, found: Mapping[str, Path]) -> None:
    """A line for each file that was found beside the model and used, with its full path."""
    for what, path in found.items():
        out.print(f"  - {escape(what)} found beside the model: {escape(str(path))}", highlight=False, soft_wrap=True)


def to_json(content: Any) -> str:
    """JSON for a terminal or a pipe: what `json` itself leaves as it is and a terminal would obey is written as `\\uXXXX`."""
    text = to_strict_json(content, indent=2, ensure_ascii=False)
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
