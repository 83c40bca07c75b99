"""The gate and the weights `w` of `h' = h + w V`: a few float32 scalars per token, shared by the lowerings.

The gate is Greater + Cast + Mul, never `If` (TensorRT rejects it without static shapes) and never `Where` (one engine
layer more). It is float32 even in a float16 graph, because it compares sums of thousands of products with a threshold.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..node_builder import NodeBuilder
from ..reference import SCORE_CAP, LayerGuard
from .task import Gate, Task

# In a float16 graph no channel is moved by more than this (half of float16's range, 65504, minus room for rounding). The
# edit is then finite whatever the gate and the guard's numbers are, and so is its sum with any state up to 2^15.
LARGEST_HALF_EDIT = 32000.0


def gate(builder: NodeBuilder, score: ir.Value, task: Task, unit: float = 1.0) -> Gate:
    """Open the gate where the score is above the layer's threshold, or where the prompt decided so.

    Args:
        builder: adds the nodes.
        score: `[..., 1]` float32, times `unit`.
        task: the guard of the layer.
        unit: a power of two.
    """
    if task.shared is not None and task.shared.level is not None:
        opened = builder.cast("gate", builder.op("opens", "Greater", [score, task.shared.level]), "float32")
        return Gate(score, opened, task.shared.threshold, unit)
    threshold = tau = threshold_of(builder, task.layer, unit)
    if task.offset is not None:
        tau = builder.op("threshold", "Add", [tau, _in_unit(builder, task.offset, unit)])
    opened = builder.cast("gate", builder.op("opens", "Greater", [score, tau]), "float32")
    if task.held is not None:
        opened = builder.op("gate_now", "Mul", [opened, task.held.deciding])
        opened = builder.op("gate_held", "Add", [opened, task.held.is_open])
    return Gate(score, opened, threshold, unit)


def text_gate(builder: NodeBuilder, task: Task) -> Gate:
    """The gate of a mode that reads the text-only query alone."""
    if task.shared is not None and task.shared.decided is not None:
        return task.shared.decided
    return gate(builder, first_coordinate(builder, task), task)


def threshold_of(builder: NodeBuilder, layer: LayerGuard, unit: float = 1.0) -> ir.Value:
    """The layer's threshold as an initializer, `[1]` float32, times `unit`."""
    return builder.constant("tau", np.array([layer.threshold * unit]), "float32")


def first_coordinate(builder: NodeBuilder, task: Task) -> ir.Value:
    """`a_1`, the text-only query's coordinate along row 1, `[batch, 1, 1]`."""
    if task.numbers:
        return task.numbers[0]
    assert task.supervisor is not None
    return columns(builder, "first", task.supervisor, 0, 1) if task.layer.rank > 1 else task.supervisor


def combined_score(builder: NodeBuilder, read: ir.Value, task: Task, unit: float = 1.0) -> ir.Value:
    """`max(s, a_1 + shift)`, and no score without a supervisor (`reference.SCORE_CAP`).

    Args:
        builder: adds the nodes.
        read: the readout's score `s`, `[batch, sequence, 1]` float32, times `unit`.
        task: the guard of the layer.
        unit: a power of two.
    """
    supervised = first_coordinate(builder, task)
    if unit != 1.0:
        supervised = builder.op(
            "first_scaled", "Mul", [supervised, builder.constant("first_unit", np.array(unit), "float32")]
        )
    shift = builder.constant("text_shift", np.array(task.layer.text_shift * unit), "float32")
    either = builder.op("either", "Max", [read, builder.op("first_shifted", "Add", [supervised, shift])])
    cap = builder.constant("score_cap", np.array(SCORE_CAP * unit), "float32")
    return builder.op("score", "Min", [either, builder.op("first_capped", "Add", [supervised, cap])])


def _in_unit(builder: NodeBuilder, offset: ir.Value, unit: float) -> ir.Value:
    if unit == 1.0:
        return offset
    return builder.op("threshold_offset", "Mul", [offset, builder.constant("score_unit", np.array(unit), "float32")])


def columns(builder: NodeBuilder, name: str, value: ir.Value, start: int, stop: int) -> ir.Value:
    """`value[..., start:stop]`

    Args:
        builder: adds the node.
        name: of the node.
        value: any tensor.
        start, stop: range of the last axis.
    """
    return builder.op(name, "Slice", [value, builder.integers(start), builder.integers(stop), builder.integers(-1)])


def bounded(
    builder: NodeBuilder, name: str, value: ir.Value, dtype: str, largest: float = LARGEST_HALF_EDIT
) -> ir.Value:
    """`value` clipped to `-largest` and `largest`; zeros stay zero.

    Args:
        builder: adds the nodes.
        name: of the node.
        value: a float tensor.
        dtype: of `value`.
        largest: above 0.
    """
    bounds = [
        builder.constant(f"{name}_{end}", np.array(bound), dtype)
        for end, bound in (("lowest", -largest), ("highest", largest))
    ]
    return builder.op(name, "Clip", [value, *bounds])
