"""JSON as RFC 8259 defines it.

Python's `json` writes NaN and infinity, which other readers reject, and keeps the last of two equal keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn


def to_strict_json(content: Any, **options: Any) -> str:
    """The text; a number that is not finite becomes `null`. `options` are those of `json.dumps`."""
    return json.dumps(_finite(content), allow_nan=False, **options)


def from_strict_json(text: str | bytes) -> Any:
    """The content.

    Raises:
        ValueError: not JSON, a number that is not finite, or an object with the same key twice.
    """
    return json.loads(text, parse_constant=_refuse, parse_float=_number, object_pairs_hook=_object)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large for a number")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:60]!r} is given twice")
    return content
