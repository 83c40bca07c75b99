"""The gate and the weights `w` of `h' = h + w V`: a few float32 scalars per token, shared by the lowerings.

The gate is Greater + Cast + Mul, never `If` (TensorRT rejects it without static shapes) and never `Where` (one engine
layer more). It is float32 even in a float16 graph, because it compares sums of thousands of products with a threshold.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .lowering_task import Gate, Task
from .scribe import Scribe

# In a float16 graph no channel is moved by more than this (half of float16's range, 65504, less room for rounding): the edit
# is finite whatever the gate says and the guard's numbers are, and so is the sum of it and any state up to 2^15.
LARGEST_HALF_EDIT = 32000.0


def gate(scribe: Scribe, score: ir.Value, task: Task, unit: float = 1.0) -> Gate:
    """Open where the score is above the layer's threshold, or where the prompt decided so.

    Args:
        score: `[..., 1]` float32, times `unit`.
    """
    tau = scribe.constant("tau", np.array(task.layer.threshold * unit), "float32")
    if task.offset is not None:
        tau = scribe.op("threshold", "Add", [tau, _in_unit(scribe, task.offset, unit)])
    opened = scribe.cast("gate", scribe.op("opens", "Greater", [score, tau]), "float32")
    if task.held is not None:
        opened = scribe.op("gate_now", "Mul", [opened, task.held.deciding])
        opened = scribe.op("gate_held", "Add", [opened, task.held.is_open])
    return Gate(score, opened, unit)


def _in_unit(scribe: Scribe, offset: ir.Value, unit: float) -> ir.Value:
    if unit == 1.0:
        return offset
    return scribe.op("threshold_offset", "Mul", [offset, scribe.constant("score_unit", np.array(unit), "float32")])


def columns(scribe: Scribe, name: str, value: ir.Value, start: int, stop: int) -> ir.Value:
    """`value[..., start:stop]`"""
    return scribe.op(name, "Slice", [value, scribe.integers(start), scribe.integers(stop), scribe.integers(-1)])


def bounded(scribe: Scribe, name: str, value: ir.Value, dtype: str, largest: float = LARGEST_HALF_EDIT) -> ir.Value:
    """`value` between `-largest` and `largest`; a zero stays a zero."""
    bounds = [
        scribe.constant(f"{name}_{end}", np.array(bound), dtype)
        for end, bound in (("lowest", -largest), ("highest", largest))
    ]
    return scribe.op(name, "Clip", [value, *bounds])
