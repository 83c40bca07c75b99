"""Checks where a graph's weights are: the declared place in another file is checked before the file is opened.

A location is a relative path below the graph's folder. `offset` and `length` are whole numbers inside the file, and partially
overlapping tensors are invalid. Only regular files are opened: a FIFO would block.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from .errors import ModelUnreadable
from .links import require_own
from .tensor_size import byte_count
from .whole_numbers import whole_number

if TYPE_CHECKING:
    import onnx

# Keys of ONNX's external_data. `checksum` is known, and not relied on: the manifest's SHA-256 covers the file.
_KEYS = frozenset({"location", "offset", "length", "checksum"})


def require_external_data(path: Path, tensors: Iterable[onnx.TensorProto], trust_links: bool = False) -> None:
    """Require valid places of external data, with all bytes present.

    Args:
        path: the graph's file, absolute.
        tensors: tensors with external data.
        trust_links: follow links out of the folder, which `--data reference` creates.

    Raises:
        ModelUnreadable: with the tensor and the broken rule.
    """
    places: dict[str, list[tuple[int, int, str]]] = {}
    for tensor in tensors:
        location, start, stop = _place(path, tensor)
        places.setdefault(location, []).append((start, stop, tensor.name))
    for location, taken in places.items():
        size = _size(path, location, trust_links)
        start, needed, name = max(taken, key=lambda place: place[1])
        if size < needed:
            raise ModelUnreadable(
                f"{path}: its external data {location} has {size} bytes, {name!r} ends at {needed}; it is truncated, "
                "copy it again"
            )
        _require_apart(path, location, taken)


def _place(path: Path, tensor: onnx.TensorProto) -> tuple[str, int, int]:
    """`(location, first byte, byte behind the last)`"""
    said: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key not in _KEYS or entry.key in said:
            wrong = "twice" if entry.key in said else "which is no key of external data"
            raise ModelUnreadable(f"{path}: the place of {tensor.name!r} has {entry.key!r}, {wrong}; do not use it")
        said[entry.key] = entry.value
    if any(getattr(tensor, field) for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data")):
        raise ModelUnreadable(
            f"{path}: {tensor.name!r} has its numbers inside and outside, and readers differ; do not use it"
        )
    location = said.get("location", "")
    _require_below(path, location)
    start, wanted = _whole(path, tensor.name, said, "offset"), byte_count(path, tensor)
    length = _whole(path, tensor.name, said, "length") if "length" in said else wanted
    if length != wanted:
        raise ModelUnreadable(
            f"{path}: {tensor.name!r} takes {length} bytes of {location}, its shape and dtype take {wanted}; do not use it"
        )
    return location, start, start + length


def _require_below(path: Path, location: str) -> None:
    windows = PureWindowsPath(location)  # handles both kinds of slashes, and drives
    absolute = windows.is_absolute() or bool(windows.drive or windows.root)
    if absolute or ".." in windows.parts or "\\" in location or "\0" in location:
        raise ModelUnreadable(
            f"{path}: keeps weights outside its folder ({location}); do not use it, or move them beside it"
        )
    if not windows.parts or windows.suffix.lower() in {".onnx", ".json", ".toml"}:
        raise ModelUnreadable(f"{path}: keeps weights in {location!r}, which is no file for weights; do not use it")


def _whole(path: Path, name: str, said: dict[str, str], key: str) -> int:
    value = said.get(key, "0")
    number = whole_number(value)
    if number is None:
        raise ModelUnreadable(f"{path}: the {key} of {name!r} is {value!r}, expected bytes from 0 on; do not use it")
    return number


def _size(path: Path, location: str, trust_links: bool) -> int:
    data = path.parent / location
    try:
        found = data.exists()
    except OSError as error:  # a name that no file can have
        raise ModelUnreadable(f"{path}: its external data cannot be found ({error.strerror}); do not use it") from None
    if not found:
        raise ModelUnreadable(f"{path}: its external data {location} is missing; put it beside the model")
    if not data.is_file():
        raise ModelUnreadable(f"{path}: its external data {location} is no regular file; do not use it")
    if not trust_links:
        require_own(data, path.parent)
    return data.stat().st_size


def _require_apart(path: Path, location: str, taken: list[tuple[int, int, str]]) -> None:
    """Tied weights share all bytes; partially overlapping tensors are invalid."""
    ranges = sorted({(start, stop) for start, stop, _ in taken if stop > start})
    for (start, stop), (after, _) in pairwise(ranges):
        if after < stop:
            names = {place[:2]: place[2] for place in taken}
            raise ModelUnreadable(
                f"{path}: in {location}, {names[start, stop]!r} overlaps another tensor at {after}; do not use it"
            )
