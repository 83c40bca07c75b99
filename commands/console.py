"""The consoles of the commands: results on stdout, notes and errors on stderr."""

from __future__ import annotations

import sys
from typing import Any

from ..exporter.terminal import SafeConsole, to_json

# No emoji: ":cat:" in a path is not a cat.
out, err = SafeConsole(emoji=False), SafeConsole(stderr=True, emoji=False)


def print_json(content: dict[str, Any]) -> None:
    """Print a result as JSON on stdout."""
    sys.stdout.write(to_json(content) + "\n")
