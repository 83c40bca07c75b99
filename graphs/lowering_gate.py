"""The gate and the weights `w` of `h' = h + w V`: a few float32 scalars per token, shared by the lowerings.

The gate is Greater + Cast + Mul, never `If` (TensorRT rejects it without static shapes) and never `Where` (one engine
layer more). It is float32 even in a float16 graph, because it compares sums of thousands of products with a threshold.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .scribe import Scribe

# In a float16 graph no channel is moved by more than this (half of float16's range, 65504, less room for rounding): the edit
# is finite whatever the gate says and the guard's numbers are, and so is the sum of it and any state up to 2^15.
LARGEST_HALF_EDIT = 32000.0


def gate(scribe: Scribe, score: ir.Value, threshold: float) -> ir.Value:
    """1 where the score is above the threshold, else 0; float32, `[..., 1]`."""
    tau = scribe.constant("tau", np.array(threshold), "float32")
    return scribe.cast("gate", scribe.op("opens", "Greater", [score, tau]), "float32")


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
