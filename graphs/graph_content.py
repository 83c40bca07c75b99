"""Detects graphs and compiled models: by suffix in any case, or by their first bytes under any other name."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

SUFFIXES = frozenset({".onnx", ".ort", ".engine", ".plan", ".trt"})
_ENGINES = frozenset({".engine", ".plan", ".trt"})
_ENGINE_MAGIC = (b"ftrt", b"ptrt")
_ORT_MAGIC = b"ORTM"  # FlatBuffers keep it behind the first offset
# Of onnx.ModelProto: field -> wire type. 7 is the graph, 8 the operator sets.
_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
_VARINT, _BYTES = 0, 2
_MOST_FIELDS = 100_000  # a real model has some hundred at its top


def is_engine(path: Path) -> bool:
    """Whether a file is a TensorRT engine."""
    return path.suffix.lower() in _ENGINES or _head(path, 4) in _ENGINE_MAGIC


def is_graph(path: Path) -> bool:
    """Whether some runtime would open a file as a model. Reads a few bytes; a large file is skipped through, not read."""
    if path.suffix.lower() in SUFFIXES:
        return True
    head = _head(path, 8)
    return head[:4] in _ENGINE_MAGIC or head[4:8] == _ORT_MAGIC or _is_onnx(path)


def _head(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _is_onnx(path: Path) -> bool:
    """Whether the file is made of the fields of an ONNX model, from its first byte to its last, a graph among them.

    More fields than a model has are taken for one: padding must not hide it.
    """
    size, seen = path.stat().st_size, set[int]()
    with path.open("rb") as file:
        for _ in range(_MOST_FIELDS):
            if file.tell() == size:
                return 7 in seen
            key = _varint(file)
            if key is None or _FIELDS.get(key >> 3) != key & 7:
                return False
            seen.add(key >> 3)
            length = _varint(file)
            if length is None:
                return False
            if key & 7 == _BYTES:
                if length > size - file.tell():
                    return False
                file.seek(length, 1)
    return True


def _varint(file: BinaryIO) -> int | None:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None
