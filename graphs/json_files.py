"""Small files of a model folder, which are read whole: configs and manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import ModelUnreadable, first_line
from .read_once import ReadOnce
from .regular_files import read_regular

LARGEST_JSON = 64 << 20  # bytes; a config with a vocabulary in it has a few million

_READ: ReadOnce[bytes] = ReadOnce(most=64, largest=1 << 20, size=len)


def require_small(path: Path, most: int) -> None:
    """Before a file is read whole: that it is one, and of a size that such a file has. A file that is not there passes.

    Raises:
        ModelUnreadable: it is a FIFO, a device or a folder, or larger.
    """
    if path.exists() and not path.is_file():
        raise ModelUnreadable(f"{path}: is no regular file; copy it from the model again")  # a FIFO waits for ever
    if path.exists() and path.stat().st_size > most:
        raise ModelUnreadable(
            f"{path}: has {path.stat().st_size} bytes, expected at most {most}; copy it from the model again"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, `{}` if there is no such file.

    Raises:
        ModelUnreadable: it is not JSON, or not an object.
    """
    try:
        # Parsed each time: callers may change what they get.
        content = json.loads(_READ.get(path, _read).decode())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelUnreadable(f"{path}: cannot be read ({first_line(error)}); copy it from the model again") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ModelUnreadable(f"{path}: holds a {kind}, expected an object; copy it from the model again")
    return content


def _read(path: Path) -> bytes:
    require_small(path, LARGEST_JSON)
    return read_regular(path, LARGEST_JSON)
