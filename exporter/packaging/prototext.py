"""Protocol buffers as text, as Triton reads its configs; only to write, and only what those configs need.

The package with the schema (`tritonclient[grpc]`) would add a gRPC stack for four small files. The tests read every config back
with that schema.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Union


class Word(str):
    """A name that is written without quotes: of an enumeration."""


Value = Union[str, Word, bool, int, Sequence[int], Sequence[str], "Message", Sequence["Message"]]
Message = Mapping[str, Value]


def to_prototext(message: Message) -> str:
    """The message, a field a line; a field that is a list of messages is repeated."""
    return "".join(f"{line}\n" for line in _lines(message))


def _lines(message: Message) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, Mapping):
            yield from _block(name, value)
        elif isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[0], Mapping):
            for one in value:
                assert isinstance(one, Mapping)
                yield from _block(name, one)
        else:
            yield f"{name}: {_scalar(value)}"


def _block(name: str, message: Message) -> Iterator[str]:
    yield f"{name} {{"
    for line in _lines(message):
        yield f"  {line}"
    yield "}"


def _scalar(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Word | int):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value)  # its escapes are among those of the text format
    return "[" + ", ".join(map(_scalar, value)) + "]"
