"""`dense`: the literal precomputed orthogonal projection, one MatMul with `P = I - V^T V` (`project` only).

float16: there is no scalar between the read and the write to be kept in range, so the edit `h (P - I)` itself is clipped
(`LARGEST_HALF_EDIT`) and then added. That also spares the stream the rounding of `P`'s diagonal.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..node_builder import NodeBuilder
from ..reference import LayerGuard
from .gate import bounded
from .task import Task, Written, WrittenWhole


def whole(builder: NodeBuilder, h: ir.Value, task: Task) -> WrittenWhole | None:
    """`h' = h P`, or `None` where that is not possible: in float16, and where tokens are selected."""
    if task.dtype == "float16" or task.selected is not None:
        return None
    matrix = builder.constant("projection", np.eye(task.layer.ssd.shape[1]) - _outer(task.layer), task.dtype)
    return WrittenWhole(builder.op("guarded", "MatMul", [h, matrix], like=h), matrix)


def correction(builder: NodeBuilder, h: ir.Value, task: Task) -> Written:
    """`delta = h (P - I)`, for the branch of a fused skip-norm: `P` itself would have to be undone by the fused sum."""
    layer, dtype = task.layer, task.dtype
    matrix = builder.constant("projection_minus_identity", -_outer(layer), dtype)
    delta = builder.op("product", "MatMul", [h, matrix], like=h)
    if dtype == "float16":
        delta = bounded(builder, "product_bounded", delta, dtype)
    if task.selected is not None:
        delta = builder.op("product_selected", "Mul", [delta, task.selected])
    delta.type, delta.shape = h.type, h.shape
    return Written(delta, weights=(matrix,))


def selects(mode: str, dtype: str) -> str:
    """The dtype of the selection that the edit is multiplied with."""
    return dtype


def _outer(layer: LayerGuard) -> np.ndarray:
    rows = layer.ssd.astype(np.float64)
    return rows.T @ rows
