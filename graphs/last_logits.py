"""Logits at the last position alone: a decoder's head reads one token of each row, in place of the whole prompt.

    before   h [batch, sequence, d] ─► head ─► logits [batch, sequence, vocabulary]
    after    h ─► Slice [batch, 1, d] ─► head ─► logits [batch, 1, vocabulary]

Generation reads the last row. With a vocabulary of 262,144 the others are 1 MiB a token, which is most of the memory of an
extraction or a calibration. A head that is the embedding table transposed becomes a Gemm that reads the table as it lies:
onnxruntime makes a transposed copy of it when it opens the graph otherwise.

For graphs in memory alone: what ships gives all its logits. Sessions of such graphs read weights where they are mapped
(`reads_in_place`), and keep no packed copies of them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .ranks import PACKED_PRODUCTS
from .roles import input_roles

_SCOPE = "vlmguard.last_logits"
_MARK = f"{_SCOPE}.in_place"  # in the metadata of a graph
# Operators between the head's product and the logits that treat each position by itself: caps, scales, biases.
_BY_POSITION = frozenset({"Add", "Cast", "Div", "Identity", "Mul", "Sub", "Tanh"})
_PRODUCTS = frozenset({"MatMul", "FusedMatMul"}) | PACKED_PRODUCTS
_OF_WEIGHTS = frozenset({"Cast", "DequantizeLinear", "Identity", "Transpose"})
_DEEPEST = 8


def keep_last_logits(model: ir.Model) -> bool:
    """Restrict the head to the last position, in place. Returns `False`, without a change, if no head is found.

    The logits are then `[batch, 1, vocabulary]`. Rows must be padded on the left, as everywhere here.
    """
    graph = model.graph
    logits = next((value for value in graph.outputs if value.name == input_roles(graph).logits), None)
    if logits is None or logits.shape is None or len(logits.shape) != 3:
        return False
    between: list[ir.Value] = []
    value = logits
    for _ in range(_DEEPEST):
        node = value.producer()
        if node is None or node.graph is not graph or any(use.node not in _makers(between) for use in value.uses()):
            return False
        between.append(value)
        if node.op_type in _PRODUCTS:
            if not _slice(graph, node, between):
                return False
            model.metadata_props[_MARK] = "1"
            return True
        if node.op_type not in _BY_POSITION:
            return False
        moving = [given for given in node.inputs if given is not None and not _is_number(given)]
        if len(moving) != 1:
            return False
        value = moving[0]
    return False


def reads_in_place(model: ir.Model) -> bool:
    """Whether a session of this graph should not copy its weights: it is opened for a few calls on a few tokens."""
    return _MARK in model.metadata_props


def _makers(values: list[ir.Value]) -> set[ir.Node | None]:
    return {value.producer() for value in values}


def _is_number(value: ir.Value) -> bool:
    """A constant that is the same at every position: a scalar, or one number for each word."""
    tensor = value.const_value
    producer = value.producer()
    if tensor is None and producer is not None and producer.op_type == "Constant":
        return True
    return tensor is not None and len(tensor.shape) <= 1


def _slice(graph: ir.Graph, head: ir.Node, between: list[ir.Value]) -> bool:
    """Put the Slice in front of the head, and correct the shapes behind it."""
    states, weights = head.inputs[0], head.inputs[1]
    # The logits have rank 3 and the weights rank 2, so the states have rank 3: many exporters write no shapes in between.
    if states is None or weights is None or states.is_graph_input() or not _is_matrix(head, weights):
        return False
    bounds = [_integer(graph, name, number) for name, number in (("start", -1), ("end", 2**62), ("axis", 1))]
    last = ir.Value(name=f"{_SCOPE}/last", type=states.type)
    if states.shape is not None:
        last.shape = ir.Shape([states.shape[0], 1, states.shape[2]])
    node = ir.node("Slice", [states, *bounds], outputs=[last], name=f"{_SCOPE}/Slice")
    graph.insert_before(head, node)
    head.replace_input_with(0, last)
    table = _transposed(head, weights)
    if table is not None:
        _multiply_by_table(graph, head, last, table)
    for value in between:
        if value.shape is not None and len(value.shape) == 3:
            value.shape = ir.Shape([value.shape[0], 1, value.shape[2]])
    return True


def _transposed(head: ir.Node, weights: ir.Value) -> ir.Value | None:
    """The float32 table `[vocabulary, d]` whose transposition the head multiplies by; `None` where it is something else."""
    node = weights.producer()
    if head.op_type != "MatMul" or node is None or node.op_type != "Transpose":
        return None
    table = node.inputs[0]
    tensor = table.const_value if table is not None else None
    # onnxruntime has no float16 product on CPUs
    whole = tensor is not None and len(tensor.shape) == 2 and tensor.dtype == ir.DataType.FLOAT
    return table if whole else None


def _multiply_by_table(graph: ir.Graph, head: ir.Node, last: ir.Value, table: ir.Value) -> None:
    """A Gemm in the head's place, which takes no more than two axes."""
    axis = _integer(graph, "axis", 1)
    rows, product = ir.Value(name=f"{_SCOPE}/rows", type=last.type), ir.Value(name=f"{_SCOPE}/product", type=last.type)
    logits, transpose = head.outputs[0], head.inputs[1]
    squeeze = ir.node("Squeeze", [last, axis], outputs=[rows], name=f"{_SCOPE}/Squeeze")
    gemm = ir.node("Gemm", [rows, table], {"transB": 1}, outputs=[product], name=f"{_SCOPE}/Gemm")
    # the head's node becomes the last of the three, so that its output keeps its name and its readers
    graph.insert_before(head, [squeeze, gemm])
    made = ir.Value(name=logits.name, type=logits.type, shape=logits.shape)
    unsqueeze = ir.node("Unsqueeze", [product, axis], outputs=[made], name=f"{_SCOPE}/Unsqueeze")
    graph.insert_before(head, unsqueeze)
    ir.convenience.replace_all_uses_with(logits, made, replace_graph_outputs=True)
    graph.remove(head, safe=True)
    node = transpose.producer() if transpose is not None else None
    if node is not None and not node.outputs[0].uses():
        graph.remove(node, safe=True)


def _is_matrix(head: ir.Node, weights: ir.Value) -> bool:
    """Whether this is a matrix of the file, perhaps cast, transposed or unpacked; what depends on the inputs is no head."""
    for _ in range(_DEEPEST):
        if weights.const_value is not None:
            return len(weights.const_value.shape) in (2, 3) or head.op_type in PACKED_PRODUCTS
        node = weights.producer()
        if node is None or node.op_type not in _OF_WEIGHTS or node.inputs[0] is None:
            return False
        weights = node.inputs[0]
    return False


def _integer(graph: ir.Graph, name: str, number: int) -> ir.Value:
    if (known := graph.initializers.get(f"{_SCOPE}/{name}")) is not None:
        return known
    tensor = ir.Tensor(np.array([number], np.int64), name=f"{_SCOPE}/{name}")
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([1]), const_value=tensor)
    graph.register_initializer(value)
    return value
