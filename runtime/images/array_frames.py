"""Arrays by name in one frame of a confined process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def packed(arrays: Mapping[str, np.ndarray]) -> tuple[list[dict[str, Any]], bytes]:
    """Arrays as one run of bytes, and what they are: a frame of the confined process."""
    described = [{"name": name, "dtype": array.dtype.str, "shape": array.shape} for name, array in arrays.items()]
    return described, b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())


def unpacked(described: list[dict[str, Any]], content: bytes) -> dict[str, np.ndarray]:
    """The arrays that `packed` wrote."""
    arrays, start = {}, 0
    for entry in described:
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        arrays[entry["name"]] = np.frombuffer(content[start : start + size], dtype).reshape(shape)
        start += size
    return arrays
