"""`rank1`: per row a Mul and a ReduceSum to read, a Mul and an Add to write. Every mode; made for TensorRT.

TensorRT fuses this chain into the kernel of the norm that follows, at no layer of its own (ranks 1 to 8, TensorRT-RTX 1.7,
float16 and float32); a MatMul with one column breaks the fusions around it. The chain is the same edit as `w V`: all rows
are read before any is written, so it does not even need them to be orthonormal to the last bit.

Between two Casts it is float32 in every graph: products and sums of float16 numbers cannot overflow there, and the edit is
clipped before it is float16 again. Only the stream itself, the last Add, keeps the stream's dtype, so that a closed gate adds
zeros to the very bits that were there.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..modes import guard_mode
from ..node_builder import NodeBuilder
from ..reference import LayerGuard
from .gate import bounded, columns, combined_score, gate, text_gate
from .task import Gate, Task, Written


def correction(builder: NodeBuilder, h: ir.Value, task: Task) -> Written:
    """`delta = w_1 v_1 + ... + w_m v_m`; a closed gate makes each `w`, and so `delta`, exactly zero."""
    layer, dtype = task.layer, task.dtype
    wide = h if dtype == "float32" else builder.cast("stream_float32", h, "float32")
    rows = [builder.constant(f"ssd_{number}", row, "float32") for number, row in enumerate(layer.ssd)]
    c = [_read(builder, f"c_{number}", wide, row) for number, row in enumerate(rows)]
    made = _gate(builder, wide, c, task)
    opened = None if made is None else made.opened
    if task.selected is not None:
        opened = task.selected if opened is None else builder.op("gate_selected", "Mul", [opened, task.selected])
    w = _weights(builder, task, c, opened)
    edits = [builder.op(f"edit_{number}", "Mul", [w[number], row]) for number, row in enumerate(rows)]
    delta = edits[0]
    for number, edit in enumerate(edits[1:], start=1):
        delta = builder.op(f"edits_to_{number}", "Add", [delta, edit])
    if dtype == "float16":
        delta = bounded(builder, "edits_bounded", delta, "float32")
    if dtype != "float32":
        delta = builder.cast("delta", delta, dtype)
    delta.type, delta.shape = h.type, h.shape
    return Written(delta, _coordinates(builder, task, c), made, tuple(rows))


def _read(builder: NodeBuilder, name: str, h: ir.Value, row: ir.Value) -> ir.Value:
    """`h . row`, `[..., 1]`"""
    products = builder.op(f"{name}_products", "Mul", [h, row])
    return builder.op(name, "ReduceSum", [products, builder.integers(-1)], keepdims=1)


def _gate(builder: NodeBuilder, h: ir.Value, c: list[ir.Value], task: Task) -> Gate | None:
    """`None` for `project` and for paired rows, which have none."""
    if task.mode == "project" or task.text_ends is not None:
        return None
    if guard_mode(task.mode).toward_text:
        return text_gate(builder, task)
    if task.mode == "steer":
        return gate(builder, c[0], task)
    readout = builder.constant("readout", task.layer.readout, "float32")
    if task.mode == "restore":
        return gate(builder, _read(builder, "score", h, readout), task)
    return gate(builder, combined_score(builder, _read(builder, "score_read", h, readout), task), task)


def _weights(builder: NodeBuilder, task: Task, c: list[ir.Value], opened: ir.Value | None) -> list[ir.Value]:
    """The numbers of `w`, each `[..., 1]` float32."""
    mode, layer = task.mode, task.layer
    if mode == "project":
        wanted = [builder.op(f"minus_c_{number}", "Neg", [value]) for number, value in enumerate(c)]
    elif guard_mode(mode).has_readout:
        wanted = _to_the_target(builder, layer, c)
    elif task.aims or mode == "align":
        wanted = _to_the_text(builder, task, c)
    else:
        alpha = builder.constant("alpha", np.array(layer.alpha), "float32")
        if mode == "steer":
            wanted = [builder.op(f"wanted_{number}", "Mul", [value, alpha]) for number, value in enumerate(c)]
        else:
            wanted = _to_the_supervisor(builder, task, c, alpha)
    if opened is None:
        return wanted
    return [builder.op(f"w_{number}", "Mul", [opened, value]) for number, value in enumerate(wanted)]


def selects(mode: str, dtype: str) -> str:
    """The dtype of the selection that the gate is multiplied with."""
    return "float32"


def _to_the_target(builder: NodeBuilder, layer: LayerGuard, c: list[ir.Value]) -> list[ir.Value]:
    """`t - c`"""
    targets = [builder.constant(f"target_{number}", level, "float32") for number, level in enumerate(layer.target)]
    return [
        builder.op(f"wanted_{number}", "Sub", [level, value])
        for number, (level, value) in enumerate(zip(targets, c, strict=True))
    ]


def _to_the_supervisor(builder: NodeBuilder, task: Task, c: list[ir.Value], alpha: ir.Value) -> list[ir.Value]:
    """`alpha (a - o) - (c - o)`"""
    wanted = []
    for number, value in enumerate(c):
        a = _text_coordinate(builder, task, number)
        origin = builder.constant(f"origin_{number}", task.layer.origin[number], "float32")
        aim = builder.op(f"a_{number}_centred", "Sub", [a, origin])
        aim = builder.op(f"a_{number}_strength", "Mul", [aim, alpha])
        present = builder.op(f"present_{number}", "Sub", [value, origin])
        wanted.append(builder.op(f"wanted_{number}", "Sub", [aim, present]))
    return wanted


def _to_the_text(builder: NodeBuilder, task: Task, c: list[ir.Value]) -> list[ir.Value]:
    """`a - c`, or the difference to the aims that were computed for all layers at once."""
    if task.aims:
        text = list(task.aims)
    elif task.text_ends is not None:
        text = [builder.op(f"text_{number}", "GatherND", [value, task.text_ends]) for number, value in enumerate(c)]
    else:
        text = [_text_coordinate(builder, task, number) for number in range(len(c))]
    return [builder.op(f"wanted_{number}", "Sub", both) for number, both in enumerate(zip(text, c, strict=True))]


def _text_coordinate(builder: NodeBuilder, task: Task, number: int) -> ir.Value:
    """The text-only coordinate along one row, `[batch, 1, 1]`."""
    if task.numbers:
        return task.numbers[number]
    assert task.supervisor is not None
    if task.layer.rank == 1:
        return task.supervisor
    return columns(builder, f"a_{number}", task.supervisor, number, number + 1)


def _coordinates(builder: NodeBuilder, task: Task, c: list[ir.Value]) -> ir.Value | None:
    """`c` side by side, where the text-only pass must output it."""
    if not task.outputs_coordinates:
        return None
    return c[0] if len(c) == 1 else builder.op("coordinates", "Concat", c, axis=-1)
