"""Frames between a process and its confined helper: JSON and bytes. No pickle: what comes back is data, never code."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import IO, Any

_SIZES = struct.Struct("<QQ")  # bytes of the JSON header, bytes of the payload


def write_frame(stream: IO[bytes], header: Mapping[str, Any], payload: bytes = b"") -> None:
    encoded = json.dumps(header).encode("ascii")
    stream.write(_SIZES.pack(len(encoded), len(payload)))
    stream.write(encoded)
    stream.write(payload)
    stream.flush()


def read_frame(stream: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """Raises EOFError where the stream ends, in the middle of a frame as well."""
    header, payload = _SIZES.unpack(_exactly(stream, _SIZES.size))
    return json.loads(_exactly(stream, header)), _exactly(stream, payload)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) != size:
        raise EOFError
    return content
