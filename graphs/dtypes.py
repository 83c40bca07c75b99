"""Element types of tensors, and what ONNX, numpy and ONNX Runtime call each: the one table that converts between them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

# Floating-point types that a residual stream may have, by the name that plans and manifests contain.
IR_DTYPES: Mapping[str, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
STREAM_DTYPES: Mapping[ir.DataType, str] = {kind: name for name, kind in IR_DTYPES.items()}
NUMPY_DTYPES: Mapping[str, np.dtype] = {name: kind.numpy() for name, kind in IR_DTYPES.items()}

_PORTS = (
    *STREAM_DTYPES,
    ir.DataType.DOUBLE,
    ir.DataType.INT64,
    ir.DataType.INT32,
    ir.DataType.INT8,
    ir.DataType.UINT8,
    ir.DataType.BOOL,
)
# Types that inputs and outputs of a decoder may have, as `ir.DataType` and as `NodeArg.type` of ONNX Runtime, which puts the
# name of the protobuf's enumeration in lower case into `tensor()`.
PORT_DTYPES: Mapping[ir.DataType, np.dtype] = {kind: kind.numpy() for kind in _PORTS}
ORT_DTYPES: Mapping[str, np.dtype] = {f"tensor({kind.name.lower()})": kind.numpy() for kind in _PORTS}
