"""Weights in float16 under arithmetic in float32 (W16A32): `narrow_weights` stores what float16 holds exactly as float16.

    float32 weight ──► MatMul          becomes   float16 weight ─► Cast ─► MatMul
    float32 table  ──► Gather          becomes   float16 table  ─► Gather ─► Cast

Every activation stays in float32, the residual stream first of all: models whose states pass 65,504 (Gemma) run, and the file
is half as large. onnxruntime folds the Casts of weights when it opens the graph, so it computes what a float32 graph computes,
in a float32 graph's time and memory. A table is cast behind its Gather: rows are cast, never the table.

The weights were rounded before tracing (`round_weights`), so nothing is lost here, and the comparison with torch is as
narrow as that of float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

FEWEST = 1024  # numbers; smaller tensors gain nothing


def round_weights(model: Any) -> None:
    """Round the matrices of a torch model to float16, in place, in float32; those that float16 cannot hold stay."""
    import torch

    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim < 2:  # norms and biases are small, and some pass float16's range
                continue
            rounded = weight.half()
            if torch.isfinite(rounded).all():
                weight.copy_(rounded)


def narrow_weights(graph: ir.Graph) -> int:
    """Store float32 initializers that float16 holds exactly as float16; returns how many."""
    narrowed = 0
    for weight in list(graph.initializers.values()):
        half = _as_float16(weight)
        if half is None:
            continue
        readers = [use.node for use in weight.uses()]
        tables = [node for node in readers if node.op_type == "Gather" and node.inputs[0] is weight]
        weight.const_value, weight.type = half, ir.TensorType(ir.DataType.FLOAT16)
        for gather in tables:
            _cast_behind(graph, gather)
        if others := [node for node in readers if node not in tables]:
            _cast_before(graph, weight, others)
        narrowed += 1
    return narrowed


def _as_float16(weight: ir.Value) -> ir.TensorProtocol | None:
    """The tensor in float16, where it is large, float32 and loses nothing."""
    tensor = weight.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < FEWEST or len(tensor.shape) < 2:
        return None
    if weight.is_graph_output():
        return None
    array = tensor.numpy()
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return ir.Tensor(half, name=weight.name) if np.array_equal(half.astype(np.float32), array) else None


def _cast_before(graph: ir.Graph, weight: ir.Value, readers: list[ir.Node]) -> None:
    """The weight in float32, for its readers."""
    wide = ir.node("Cast", [weight], {"to": ir.DataType.FLOAT}, name=f"{weight.name}.Cast")
    wide.outputs[0].name = f"{weight.name}.wide"
    wide.outputs[0].type, wide.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), weight.shape
    graph.insert_before(graph[0], wide)
    for node in readers:
        for index, value in enumerate(node.inputs):
            if value is weight:
                node.replace_input_with(index, wide.outputs[0])


def _cast_behind(graph: ir.Graph, gather: ir.Node) -> None:
    """A Gather's result in float32, for all its readers."""
    rows = gather.outputs[0]
    wide = ir.node("Cast", [rows], {"to": ir.DataType.FLOAT}, name=f"{gather.name}.Cast")
    wide.outputs[0].name = f"{rows.name}.wide"
    wide.outputs[0].type, wide.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), rows.shape
    for node, index in [(use.node, use.idx) for use in rows.uses() if use.node is not wide]:
        node.replace_input_with(index, wide.outputs[0])
    for index, output in enumerate(graph.outputs):
        if output is rows:  # embed_tokens: the graph's output keeps its name
            name = rows.name
            rows.name, wide.outputs[0].name = f"{name}.float16", name
            graph.outputs[index] = wide.outputs[0]
    rows.type = ir.TensorType(ir.DataType.FLOAT16)
    graph.insert_after(gather, wide)
