"""Sizes of tensors from their shape and dtype in the protobuf."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ModelUnreadable

if TYPE_CHECKING:
    import onnx


def number_count(path: Path, tensor: onnx.TensorProto) -> int:
    """Number of elements of a tensor's shape.

    Args:
        path: of the graph's file, for messages.
        tensor: its shape is read.

    Raises:
        ModelUnreadable: a dimension is negative.
    """
    if min(tensor.dims, default=0) < 0:
        raise ModelUnreadable(
            f"{path}: tensor {tensor.name!r} has a negative dimension {list(tensor.dims)}; do not use it"
        )
    return math.prod(tensor.dims)


def byte_count(path: Path, tensor: onnx.TensorProto) -> int:
    """Number of bytes of a tensor's elements, rounded up.

    Raises:
        ModelUnreadable: a dimension is negative, or the dtype is not known.
    """
    from onnx_ir import DataType

    count = number_count(path, tensor)
    try:
        bits = DataType(tensor.data_type).bitwidth
    except (ValueError, TypeError):
        raise ModelUnreadable(
            f"{path}: tensor {tensor.name!r} has no known dtype ({tensor.data_type}); do not use it"
        ) from None
    return -(-count * bits // 8)
