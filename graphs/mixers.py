"""Classifies a vertex of the flow: a sequence mixer (attention in any spelling, convolution, recurrence), or a residual sum."""

from __future__ import annotations

from collections.abc import Collection
from weakref import WeakKeyDictionary

import onnx_ir as ir

from .dataflow import Flow, Vertex

# Ops that mix positions of the sequence in one node. Softmax attention that is spelled out is found by `_weighing`.
_ATTENTION_OPS = frozenset(
    {
        "Attention",  # opset 23, and com.microsoft
        "GroupQueryAttention",  # onnxruntime-genai, ORT fusions
        "MultiHeadAttention",  # ORT fusions
        "PackedMultiHeadAttention",
        "DecoderMaskedMultiHeadAttention",
        "SparseAttention",
        "PagedAttention",
        "QAttention",  # onnxruntime's dynamic int8
    }
)
OTHER_MIXERS = frozenset(
    {"LinearAttention", "GatedDeltaNet", "CausalConvWithState", "Conv", "Scan", "Loop", "LSTM", "GRU"}
)
_VALUES_INPUT = 2  # of every attention operator that takes keys and values apart from the queries
_MATMULS = frozenset({"MatMul", "FusedMatMul", "TransposeMatMul", "Einsum", "Gemm", "MatMulInteger", "QLinearMatMul"})
_SOFTMAXES = frozenset({"Softmax", "QLinearSoftmax"})
# onnxruntime's quantized form of an operator reads (value, scale, zero point) where the plain one reads a value.
QUANTIZED_SUM = "QLinearAdd"
_QUANTIZED = frozenset({"QLinearMatMul", QUANTIZED_SUM})
# What may stand between the product of queries and keys and its Softmax: masks, scales, caps.
_SCORING = frozenset(
    {"Add", "Sub", "Mul", "Div", "Where", "Cast", "Tanh", "Clip", "Max", "Min", "Reshape", "Transpose"}
)
# What may stand between a Softmax and the MatMul with the values; a router's softmax meets TopK or a Mul instead.
_TRANSPARENT = frozenset(
    {"Cast", "CastLike", "Dropout", "Identity", "Where", "IsNaN", "Slice", "Reshape", "Transpose", "Squeeze"}
    | {"Unsqueeze", "Expand", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
)


def is_mixer(flow: Flow, vertex: Vertex) -> bool:
    """Whether a vertex mixes positions of the sequence: attention of any spelling, convolution, recurrence."""
    node = vertex.node
    if node is None or vertex.value is None or node.outputs[0] is not vertex.value:
        return False  # count a node once, by its first output
    if node.op_type in _ATTENTION_OPS or node.op_type in OTHER_MIXERS:
        return True
    return node.op_type in _SOFTMAXES and _is_weighing(flow, node)


def is_attention(flow: Flow, vertex: Vertex) -> bool:
    """Whether a vertex is a mixer that is attention."""
    return is_mixer(flow, vertex) and vertex.op_type not in OTHER_MIXERS


def is_cross_attention(flow: Flow, mixer: Vertex, stream: Collection[int]) -> bool:
    """Whether a mixer takes its values from elsewhere than the stream: from an encoder, or a cache of what an encoder made.

    Args:
        stream: indices of the vertices that are computed from the stream's source.
    """
    node = mixer.node
    assert node is not None
    if node.op_type in _SOFTMAXES:
        values = _weighted_values(flow, node)
    elif node.op_type in _ATTENTION_OPS and len(node.inputs) > _VALUES_INPUT:
        values = node.inputs[_VALUES_INPUT]
    else:
        return False
    vertex = flow.vertex(values)  # `None`: packed with the queries, or a bias
    return vertex is not None and vertex.index not in stream


def reads_as_memory(flow: Flow, value: ir.Value, node: ir.Node) -> bool:
    """Whether a node is attention, or one of the two products of a spelled-out one, and reads the value as keys or values."""
    if node.op_type in _ATTENTION_OPS:
        return value in node.inputs[1:] and value is not node.inputs[0]
    both = operands(node) if node.op_type in _MATMULS and len(node.inputs) > 1 else (None, None)
    if value not in both or not all(flow.is_dynamic(operand) for operand in both):
        return False
    other = both[0] if both[1] is value else both[1]
    return _is_softmaxed(other) or _leads_to_softmax(flow, node)


def _is_softmaxed(value: ir.Value | None) -> bool:
    """Whether a value is what a Softmax makes, or made of it by nodes that may stand between."""
    waiting, seen = [value], {value}
    while waiting:
        value = waiting.pop()
        node = value.producer() if value is not None else None
        if node is not None and node.op_type in _SOFTMAXES:
            return True
        if node is not None and node.op_type in _TRANSPARENT:
            new = [source for source in node.inputs if source not in seen]
            seen.update(new)
            waiting += new
    return False


def _leads_to_softmax(flow: Flow, product: ir.Node) -> bool:
    """Whether a product's numbers are scores: every way on leads to the Softmax of an attention, past masks and scales."""
    waiting, seen = [product], {product}
    found = False
    while waiting:
        for node in (reader for output in waiting.pop().outputs for reader in output.consumers()):
            if node in seen or node.op_type in ("Shape", "Size"):
                continue
            seen.add(node)
            if node.op_type in _SOFTMAXES and _is_weighing(flow, node):
                found = True
            elif node.op_type in _SCORING:
                waiting.append(node)
            else:
                return False
    return found


def _is_weighing(flow: Flow, softmax: ir.Node) -> bool:
    """Whether a Softmax's result meets a MatMul with two dynamic operands: probabilities times values."""
    if flow not in _WEIGHING:
        _WEIGHING[flow] = _weighing(flow)
    return softmax.outputs[0] in _WEIGHING[flow]


def _weighing(flow: Flow) -> set[ir.Value]:
    """Every value that such a MatMul reads, itself or through nodes that may stand between: found backwards, each once."""
    nodes = list(flow.graph.all_nodes())
    products = (node for node in nodes if node.op_type in _MATMULS and all(map(flow.is_dynamic, operands(node))))
    waiting = [value for node in products for value in node.inputs if value is not None]
    found = set(waiting)
    while waiting:
        node = waiting.pop().producer()
        if node is None or node.op_type not in _TRANSPARENT:
            continue
        new = [value for value in node.inputs if value is not None and value not in found]
        found.update(new)
        waiting += new
    return found


# Per flow, which never changes: computed once and used at every Softmax.
_WEIGHING: WeakKeyDictionary[Flow, set[ir.Value]] = WeakKeyDictionary()


def _weighted_values(flow: Flow, softmax: ir.Node) -> ir.Value | None:
    """The values that a Softmax's result is multiplied with, if both are dynamic: probabilities times values."""
    stack, seen, shares = [softmax.outputs[0]], set(), {softmax.outputs[0]}
    while stack:
        for node in stack.pop().consumers():
            if node in seen:
                continue
            seen.add(node)
            if node.op_type in _MATMULS:
                both = operands(node)
                if all(flow.is_dynamic(operand) for operand in both):
                    return next((operand for operand in both if operand not in shares), both[1])
            elif node.op_type in _TRANSPARENT:
                stack.extend(node.outputs)
                shares.update(node.outputs)
    return None


def operands(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """The two values that a binary operator combines."""
    second = 3 if node.op_type in _QUANTIZED else 1
    return node.inputs[0], node.inputs[second]


def is_sum(flow: Flow, vertex: Vertex) -> bool:
    """Whether a vertex adds two parts of the flow, wherever they come from."""
    return is_sum_of(flow, vertex, set(flow.predecessors[vertex.index]))


def is_sum_of(flow: Flow, vertex: Vertex, members: Collection[int]) -> bool:
    """Whether a vertex adds two members of the flow; adding a bias or a constant joins nothing."""
    if vertex.is_sum:
        return True
    node = vertex.node
    if node is None or ((node.op_type not in {"Add", "Sum"} or node.domain) and node.op_type != QUANTIZED_SUM):
        return False
    parts = [flow.vertex(value) for value in node.inputs]
    return sum(part is not None and part.index in members for part in parts) >= 2
