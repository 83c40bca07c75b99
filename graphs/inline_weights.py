"""Weights inside a large `.onnx` file, read and written in place.

Protobuf parses only whole files: a gigabyte of weights takes several gigabytes of memory to parse, and again to write. But
the bytes of each weight are contiguous in the file. So a large file is read as its `Outline`: the same protobuf with each
large `raw_data` replaced by its place, a few hundred kB in all. Sessions map the weights from the file, and a changed graph
is written by copying them from file to file.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import onnx_ir as ir

from .digests import BIG

if TYPE_CHECKING:
    import onnx

LARGE_FILE = BIG  # bytes; smaller files are parsed completely
_LARGE_TENSOR = 1024  # bytes; runtimes require values that shapes depend on inside the graph
# Field numbers of onnx.proto: ModelProto.graph, GraphProto.initializer, and those of TensorProto
_GRAPH, _INITIALIZER = 7, 5
_NAME, _RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 8, 9, 13, 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_COPIED = 4 << 20


class InFile(ir.LazyTensor):
    """A weight inside a graph file: serialized inline, and read only when its values are used.

    Attributes:
        file: the graph file, absolute.
        offset, length: its place in the file, bytes.
    """

    def __init__(
        self, file: Path, offset: int, length: int, dtype: ir.DataType, shape: Sequence[int], name: str
    ) -> None:
        self.file, self.offset, self.length, self._sizes = file, offset, length, tuple(shape)
        super().__init__(self._mapped, dtype=dtype, shape=ir.Shape(shape), name=name)

    def _mapped(self) -> ir.ExternalTensor:
        # No base folder: onnx_ir would refuse a file with two names, and exports hard-link large files (`staging.bring`).
        return self._at(str(self.file), "")

    def reference(self, location: str) -> ir.ExternalTensor:
        """The same numbers as external data."""
        return self._at(location, self.file.parent)

    def _at(self, location: str, folder: Path | str) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            location,
            self.offset,
            self.length,
            self.dtype,
            name=self.name or "",
            shape=ir.Shape(self._sizes),
            base_dir=folder,
        )

    def same_bytes(self, other: InFile) -> bool:
        """Whether both hold the same bytes; neither is read into memory as a whole."""
        if (self.file, self.offset, self.length) == (other.file, other.offset, other.length):
            return True
        if self.length != other.length:
            return False
        with self.file.open("rb") as left, other.file.open("rb") as right:
            left.seek(self.offset)
            right.seek(other.offset)
            for start in range(0, self.length, _COPIED):
                size = min(_COPIED, self.length - start)
                if left.read(size) != right.read(size):
                    return False
        return True

    def copy_to(self, file: IO[bytes]) -> None:
        """Write the bytes to another file."""
        with self.file.open("rb") as source:
            source.seek(self.offset)
            for start in range(0, self.length, _COPIED):
                file.write(source.read(min(_COPIED, self.length - start)))


@dataclass(frozen=True)
class Outline:
    """A model file without its large weights.

    Attributes:
        content: the serialized `ModelProto`; each weight that was taken out refers to external data in the file itself.
        places: index among the top graph's initializers -> `(offset, length)` of the bytes that were taken out.
    """

    content: bytes
    places: Mapping[int, tuple[int, int]]


def read_outline(path: Path) -> Outline | None:
    """The outline of a large file; `None` for a small one, and for one that is not as writers write it."""
    size = path.stat().st_size
    if size < LARGE_FILE or path.suffix.lower() != ".onnx":
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return _outline(memoryview(content), path.name)
        except _Unusual:
            return None


class _Unusual(Exception):
    """Bytes that are better left to protobuf itself."""


@dataclass(frozen=True)
class _Field:
    """One field of a message: its number and wire type, where it starts, where its value does, and where both end."""

    number: int
    wire: int
    start: int
    value: int
    end: int


def _fields(content: memoryview, start: int, end: int) -> Iterator[_Field]:
    at = start
    while at < end:
        first = at
        tag, at = _varint(content, at, end)
        number, wire = tag >> 3, tag & 7
        value = at
        if wire == _VARINT:
            _, at = _varint(content, at, end)
        elif wire == _BYTES:
            length, value = _varint(content, at, end)
            at = value + length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise _Unusual
        if at > end or number == 0:
            raise _Unusual
        yield _Field(number, wire, first, value, at)


def _varint(content: memoryview, at: int, end: int) -> tuple[int, int]:
    number = shift = 0
    while at < end and shift < 64:
        byte = content[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
    raise _Unusual


def _outline(content: memoryview, name: str) -> Outline:
    try:
        top = list(_fields(content, 0, len(content)))
        graphs = [field for field in top if field.number == _GRAPH]
        if len(graphs) != 1 or graphs[0].wire != _BYTES:  # protobuf would merge several
            raise _Unusual
        parts: list[bytes] = []
        places: dict[int, tuple[int, int]] = {}
        index = 0
        for field in _fields(content, graphs[0].value, graphs[0].end):
            if field.number != _INITIALIZER:
                parts.append(bytes(content[field.start : field.end]))
                continue
            if field.wire != _BYTES:
                raise _Unusual
            found = _raw_data(content, field)
            if found is None:
                parts.append(bytes(content[field.start : field.end]))
            else:
                places[index] = found.value, found.end - found.value
                rest = _around(content, field, found)
                parts.append(_message(_INITIALIZER, rest + _reference(name, *places[index])))
            index += 1
        whole = b"".join(
            _message(_GRAPH, b"".join(parts)) if field is graphs[0] else bytes(content[field.start : field.end])
            for field in top
        )
        return Outline(whole, places)
    finally:
        content.release()


def _raw_data(content: memoryview, tensor: _Field) -> _Field | None:
    """The field with the bytes of a large tensor that has them in the usual form."""
    if tensor.end - tensor.value < _LARGE_TENSOR:
        return None
    fields = list(_fields(content, tensor.value, tensor.end))
    raw = [field for field in fields if field.number == _RAW_DATA]
    elsewhere = any(
        field.number == _EXTERNAL_DATA or (field.number == _DATA_LOCATION and content[field.value] != 0)
        for field in fields
    )
    usual = len(raw) == 1 and raw[0].wire == _BYTES and not elsewhere
    return raw[0] if usual and raw[0].end - raw[0].value >= _LARGE_TENSOR else None


def _around(content: memoryview, tensor: _Field, raw: _Field) -> bytes:
    return bytes(content[tensor.value : raw.start]) + bytes(content[raw.end : tensor.end])


def _reference(location: str, offset: int, length: int) -> bytes:
    entries = {"location": location, "offset": str(offset), "length": str(length)}
    texts = [_message(1, key.encode()) + _message(2, value.encode()) for key, value in entries.items()]
    return b"".join(_message(_EXTERNAL_DATA, text) for text in texts) + _spelled(_DATA_LOCATION << 3) + b"\x01"


def _message(number: int, content: bytes) -> bytes:
    return _spelled(number << 3 | _BYTES) + _spelled(len(content)) + content


def _spelled(number: int) -> bytes:
    """A varint."""
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


# Back into a file


def weights_in_files(model: ir.Model) -> dict[str, InFile]:
    """The initializers of the top graph that lie in a graph file, by name."""
    values = model.graph.initializers.items()
    return {name: value.const_value for name, value in values if isinstance(value.const_value, InFile)}


def referring_proto(model: ir.Model, weights: Mapping[str, InFile]) -> onnx.ModelProto:
    """The model as protobuf, in which these weights are references to the files that they lie in, by file name."""
    for name, tensor in weights.items():
        model.graph.initializers[name].const_value = tensor.reference(tensor.file.name)
    try:
        return ir.to_proto(model)
    finally:
        for name, tensor in weights.items():
            model.graph.initializers[name].const_value = tensor


def whole_pieces(referring: onnx.ModelProto, weights: Mapping[str, InFile]) -> list[bytes | InFile]:
    """Pieces to write so that the weights are inline again, with the bytes that protobuf itself would write.

    Args:
        referring: as `referring_proto` made it.
    """
    content = memoryview(referring.SerializeToString(deterministic=True))
    pieces: list[bytes | InFile] = []
    for field in _fields(content, 0, len(content)):
        if field.number != _GRAPH:
            pieces.append(bytes(content[field.start : field.end]))
            continue
        inner: list[bytes | InFile] = []
        for part in _fields(content, field.value, field.end):
            name = _name(content, part) if part.number == _INITIALIZER else None
            if name is None or name not in weights:
                inner.append(bytes(content[part.start : part.end]))
            else:
                inner += _filled(content, part, weights[name])
        pieces += [_spelled(_GRAPH << 3 | _BYTES) + _spelled(total(inner)), *inner]
    return pieces


def total(pieces: Sequence[bytes | InFile]) -> int:
    """Their number of bytes."""
    return sum(piece.length if isinstance(piece, InFile) else len(piece) for piece in pieces)


def _name(content: memoryview, tensor: _Field) -> str | None:
    names = [f for f in _fields(content, tensor.value, tensor.end) if f.number == _NAME]
    return bytes(content[names[-1].value : names[-1].end]).decode() if names else None


def _filled(content: memoryview, tensor: _Field, weight: InFile) -> list[bytes | InFile]:
    """The tensor with its bytes, fields in the order of their numbers."""
    fields = [f for f in _fields(content, tensor.value, tensor.end) if f.number not in (_EXTERNAL_DATA, _DATA_LOCATION)]
    before = b"".join(bytes(content[f.start : f.end]) for f in fields if f.number < _RAW_DATA)
    behind = b"".join(bytes(content[f.start : f.end]) for f in fields if f.number > _RAW_DATA)
    head = before + _spelled(_RAW_DATA << 3 | _BYTES) + _spelled(weight.length)
    size = len(head) + weight.length + len(behind)
    return [_spelled(_INITIALIZER << 3 | _BYTES) + _spelled(size) + head, weight, behind]
