"""`dense`: the literal precomputed orthogonal projection, one MatMul with `P = I - V^T V` (`project` only)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .reference import LayerGuard
from .scribe import Scribe


def guarded(
    scribe: Scribe, h: ir.Value, mode: str, layer: LayerGuard, dtype: str, supervisor: ir.Value | None
) -> tuple[ir.Value, None]:
    """`h' = h P`."""
    matrix = scribe.constant("projection", np.eye(layer.ssd.shape[1]) - _outer(layer), dtype)
    return scribe.op("guarded", "MatMul", [h, matrix], like=h), None


def correction(
    scribe: Scribe, h: ir.Value, mode: str, layer: LayerGuard, dtype: str, supervisor: ir.Value | None
) -> tuple[ir.Value, None]:
    """`delta = h (P - I)`, for the branch of a fused skip-norm: `P` itself would have to be undone by the fused sum."""
    matrix = scribe.constant("projection_minus_identity", -_outer(layer), dtype)
    return scribe.op("delta", "MatMul", [h, matrix], like=h), None


def _outer(layer: LayerGuard) -> np.ndarray:
    rows = layer.ssd.astype(np.float64)
    return rows.T @ rows
