"""Limits how much longer a tokenizer may make a text: thirty normalizers that each double one letter are a file of 2 kB.

Regular expressions need no bound here: Oniguruma gives up after a number of tries, and the tokenizer fails (`tokenizer_calls`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

MOST_PARTS = 256  # normalizers and the like in one another; known tokenizers have about 10
MOST_GROWTH = 64.0  # times the text's length; those of sentencepiece make three bytes of a space
LONGEST_ADDED = 4096  # characters that are put before every text, or tokens around it


def require_bounded(tokenizer: Tokenizer) -> None:
    """Raises ValueError: the tokenizer has too many parts, or makes texts too long."""
    parts = [part for component in _components(tokenizer) for part in _parts(component)]
    if len(parts) > MOST_PARTS:
        raise ValueError(f"it has {len(parts)} parts, expected at most {MOST_PARTS}")
    growth, added = 1.0, 0
    for part in parts:
        kind = part.get("type")
        if kind == "Replace":
            growth *= _replaced(part)
        elif kind == "Prepend":
            added += len(str(part.get("prepend", "")))
        elif kind == "TemplateProcessing":
            pieces = part.get("single")
            pieces = pieces if isinstance(pieces, list) else []
            growth *= max(sum("Sequence" in piece for piece in pieces), 1)
            added += len(pieces)
        if growth > MOST_GROWTH or added > LONGEST_ADDED:
            raise ValueError(
                f"it makes texts more than {MOST_GROWTH:g} times as long, or {LONGEST_ADDED} characters longer"
            )


def _replaced(part: Mapping[str, Any]) -> float:
    """Largest growth factor of a text, reached by repetitions of the pattern."""
    pattern, content = part.get("pattern"), len(str(part.get("content", "")))
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if text:
        return max(content / len(text), 1.0)
    return 1.0 + content  # an expression, or an empty text: it may be found between any two characters


def _components(tokenizer: Tokenizer) -> Iterator[Any]:
    for component in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.post_processor, tokenizer.decoder):
        if component is not None:
            yield json.loads(component.__getstate__())


def _parts(component: Any) -> Iterator[Mapping[str, Any]]:
    """Every table with a type, in the order in which they are used."""
    waiting = [component]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if "type" in part:
                yield part
            waiting += reversed(part.values())
        elif isinstance(part, list):
            waiting += reversed(part)
