"""Rows of a prompts file, whatever its container: csv, JSON lines, a JSON list or table, or a line of text per prompt."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from ...graphs.errors import PromptsUnusable
from ...graphs.regular_files import read_regular

LARGEST_FILE = 256 << 20  # bytes

# Column name for the lines of a text file.
LINE = "line"

Row = dict[str, Any]


def read_rows(path: Path, what: str) -> list[tuple[int, Row]]:
    """Read `(line or record number from 1, row)` of every row that is not blank.

    A JSON object of objects (`{"0": {...}, "1": {...}}`) gives its inner objects, in order.

    Args:
        path: a csv, JSON, JSON Lines or text file.
        what: kind of the contents, for error messages.

    Raises:
        PromptsUnusable: the file is missing, too large, not UTF-8, or not of the format of its suffix.
    """
    text = _text(path, what)
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return [(number, {LINE: line.strip()}) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    try:
        if suffix == ".csv":
            reader = csv.DictReader(io.StringIO(text))
            return [(number, _named(row)) for number, row in enumerate(reader, 1)]
        rows = _json_rows(text) if suffix == ".json" else _lines(text)
    except csv.Error as error:
        raise PromptsUnusable(f"{path}: is not a csv that can be read ({error}); save it again as UTF-8") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise PromptsUnusable(f"{path}: is not lines of JSON ({error}); one object a line") from None
    for number, row in rows:
        if not isinstance(row, dict):
            raise PromptsUnusable(f"{path}: line {number} is {type(row).__name__}, expected an object")
    return rows


def _text(path: Path, what: str) -> str:
    if not path.is_file():
        raise PromptsUnusable(f"{path}: no such {what} file; give one with lines of JSON, or a csv")
    if path.stat().st_size > LARGEST_FILE:
        raise PromptsUnusable(f"{path}: {path.stat().st_size} bytes is too large for {what}; give a smaller file")
    try:
        return read_regular(path, LARGEST_FILE).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptsUnusable(f"{path}: is not readable text ({error}); save it as UTF-8") from None


def _named(row: dict[str | None, Any]) -> Row:
    """Without the cells beyond the header, which `csv` puts under `None`."""
    return {name: cell for name, cell in row.items() if name is not None}


def _lines(text: str) -> list[tuple[int, Any]]:
    return [(number, json.loads(line)) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _json_rows(text: str) -> list[tuple[int, Any]]:
    content = json.loads(text)
    if isinstance(content, dict) and content and all(isinstance(inner, dict) for inner in content.values()):
        content = [{"id": key} | inner for key, inner in content.items()]
    return list(enumerate(content, 1))
