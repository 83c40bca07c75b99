"""`lowrank`: read MatMul, a few scalars of gate arithmetic, write MatMul. Every mode; the cheapest on ONNX Runtime.

The read has the stream's dtype; the gate and everything behind it are float32 (`lowerings.gate`).

float16 ends at 65504, and real models have channels beyond 3e4. So a float16 read gives `s c`, with a power of two
`s < d^(-1/2)`: `|s c| <= s |h|_2` is finite for every finite `h`, its partial sums included, and a power of two rounds
nothing. What follows computes in that unit, and the write takes `V / s`, so this costs no node. The edit is clipped
(`LARGEST_HALF_EDIT`) before it meets the stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..modes import guard_mode
from ..node_builder import NodeBuilder
from ..reference import LayerGuard
from .gate import bounded, columns, combined_score, gate, text_gate
from .task import Gate, Task, Written


@dataclass(frozen=True)
class _Units:
    """The powers of two in which a layer's coordinates `c` and the readout's score are read; 1 but in float16."""

    c: float = 1.0
    score: float = 1.0


def correction(builder: NodeBuilder, h: ir.Value, task: Task) -> Written:
    """`delta = w V`; a closed gate makes `w`, and so `delta`, exactly zero."""
    mode, layer, dtype = task.mode, task.layer, task.dtype
    units = _half_units(layer) if dtype == "float16" else _Units()
    # Three axes: ONNX Runtime packs a constant matrix of two, padded to 16 columns, which costs more than these few need
    # (benchmarks/spellings.py).
    read = builder.op("read", "MatMul", [h, builder.constant("rows", _rows(mode, layer, units).T[None], dtype)])
    if mode == "project":
        delta, rows = _write(builder, h, _at(builder, read, task.selected), layer, units, dtype, dtype)
        return Written(delta, weights=(rows,))
    if dtype != "float32":
        read = builder.cast("read_float32", read, "float32")
    c, score = read, None
    if guard_mode(mode).has_readout:
        parts = ("coordinates", "score" if mode == "restore" else "score_read")
        c, score = builder.split("read_parts", read, parts, axis=-1, sizes=(layer.rank, 1))
    weights, opened = _WEIGHTS[mode](builder, score, c, task, units)
    delta, rows = _write(builder, h, _at(builder, weights, task.selected), layer, units, "float32", dtype)
    return Written(delta, c if task.outputs_coordinates else None, opened, (rows,), units.c)


def selects(mode: str, dtype: str) -> str:
    """The dtype of the selection that `w` is multiplied with."""
    return dtype if mode == "project" else "float32"


def score_unit(mode: str, layer: LayerGuard, dtype: str) -> float:
    """The power of two that the gate's score is read in.

    Args:
        mode: of the guard.
        layer: its numbers.
        dtype: of the stream.
    """
    row = guard_mode(mode)
    if dtype != "float16" or row.toward_text:  # text-only coordinates come unscaled
        return 1.0
    units = _half_units(layer)
    return units.score if row.has_readout else units.c


def _at(builder: NodeBuilder, w: ir.Value, selected: ir.Value | None) -> ir.Value:
    """`w` at the tokens to edit, exact zeros elsewhere."""
    return w if selected is None else builder.op("weights_selected", "Mul", [w, selected])


def _write(
    builder: NodeBuilder, h: ir.Value, w: ir.Value, layer: LayerGuard, units: _Units, dtype: str, stream: str
) -> tuple[ir.Value, ir.Value]:
    """`w V` in the dtype of `w`, then in the stream's; and the initializer that holds `V`."""
    rows = builder.constant("ssd", layer.ssd[None].astype(np.float64) / units.c, dtype)
    bounded_after, cast_after = stream == "float16", dtype != stream
    delta = builder.op("product" if bounded_after or cast_after else "delta", "MatMul", [w, rows])
    if bounded_after:
        delta = bounded(builder, "product_bounded" if cast_after else "delta", delta, dtype)
    if cast_after:
        delta = builder.cast("delta", delta, stream)
    delta.type, delta.shape = h.type, h.shape
    return delta, rows


def _half_units(layer: LayerGuard) -> _Units:
    """The largest powers of two with which no partial sum of a read can pass float16's range, and one bit to spare."""
    bits = 1 + math.ceil(math.log2(layer.ssd.shape[1]) / 2)
    length = float(np.linalg.norm(layer.readout.astype(np.float64))) or 1.0
    return _Units(2.0**-bits, 2.0 ** -(bits + math.ceil(math.log2(length))))


def _rows(mode: str, layer: LayerGuard, units: _Units) -> np.ndarray:
    """Rows that read `h`, `[m or m + 1, d]`; negative in `project`, where the read itself is `w = -c`."""
    rows = layer.ssd.astype(np.float64) * units.c
    if mode == "project":
        return -rows
    if guard_mode(mode).has_readout:
        return np.vstack([rows, layer.readout[None, :].astype(np.float64) * units.score])
    return rows


def _steer(
    builder: NodeBuilder, score: ir.Value | None, c: ir.Value, task: Task, units: _Units
) -> tuple[ir.Value, Gate]:
    """`alpha g c`"""
    layer = task.layer
    first = columns(builder, "first", c, 0, 1) if layer.rank > 1 else c
    made = gate(builder, first, task, units.c)
    strength = builder.op("strength", "Mul", [made.opened, builder.constant("alpha", np.array(layer.alpha), "float32")])
    return builder.op("weights", "Mul", [strength, c]), made


def _supervise(
    builder: NodeBuilder, score: ir.Value | None, c: ir.Value, task: Task, units: _Units
) -> tuple[ir.Value, Gate]:
    """`g(a) (alpha (a - o) - (c - o))`; `a` comes unscaled."""
    layer, supervisor = task.layer, task.supervisor
    assert supervisor is not None
    made = text_gate(builder, task)
    origin = builder.constant("origin", layer.origin, "float32")
    wanted = builder.op("supervisor_centred", "Sub", [supervisor, origin])
    wanted = builder.op(
        "wanted", "Mul", [wanted, builder.constant("alpha", np.array(layer.alpha * units.c), "float32")]
    )
    if units.c != 1.0:
        origin = builder.constant("origin_scaled", layer.origin * units.c, "float32")
    present = builder.op("present", "Sub", [c, origin])
    return builder.op("weights", "Mul", [made.opened, builder.op("difference", "Sub", [wanted, present])]), made


def _align(
    builder: NodeBuilder, score: ir.Value | None, c: ir.Value, task: Task, units: _Units
) -> tuple[ir.Value, Gate | None]:
    """`g(a) (a - c)`; `a` comes unscaled, or is read from another row of `c`."""
    if task.text_ends is not None:
        text = builder.op("text", "GatherND", [c, task.text_ends])
        return builder.op("difference", "Sub", [text, c]), None
    wanted = task.supervisor
    assert wanted is not None
    made = text_gate(builder, task)
    if units.c != 1.0:
        wanted = builder.op("wanted", "Mul", [wanted, builder.constant("wanted_unit", np.array(units.c), "float32")])
    return builder.op("weights", "Mul", [made.opened, builder.op("difference", "Sub", [wanted, c])]), made


def _restore(
    builder: NodeBuilder, score: ir.Value | None, c: ir.Value, task: Task, units: _Units
) -> tuple[ir.Value, Gate]:
    """`g (t - c)`; in `combined` the gate also reads the supervisor"""
    layer = task.layer
    assert score is not None, "the mode has a readout"
    if task.mode == "combined":
        score = combined_score(builder, score, task, units.score)
    difference = builder.op("difference", "Sub", [builder.constant("target", layer.target * units.c, "float32"), c])
    made = gate(builder, score, task, units.score)
    return builder.op("weights", "Mul", [made.opened, difference]), made


_WEIGHTS = {"steer": _steer, "supervise": _supervise, "restore": _restore, "combined": _restore, "align": _align}
