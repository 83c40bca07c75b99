"""Prepares a graph for TensorRT's ONNX parser: unsupported nodes are named before a build, misread ones are rewritten.

Measured with `tensorrt_rtx` 1.7.1, whose parser is that of `tensorrt` 10 and 11. The parser's own `supports_operator` is
wrong for some operators, and its messages do not help the user.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .errors import GuardError
from .whole_numbers import whole_number

_STANDARD = frozenset({"", "ai.onnx"})
# onnxruntime's operators that the parser reads.
_CONTRIB_READ = frozenset(
    {
        "SkipSimplifiedLayerNormalization",
        "SimplifiedLayerNormalization",
        "RotaryEmbedding",
        "QuantizeLinear",
        "DequantizeLinear",
    }
)
_PLAIN = "export the model without onnxruntime's fusions (transformers' or torch's exporter writes plain ONNX)"
_QDQ = "quantize it as static QDQ instead, which TensorRT reads (int8, fp8, or int4 in blocks)"
# What to export instead, by operator.
_INSTEAD = {
    "GroupQueryAttention": _PLAIN,
    "MultiHeadAttention": _PLAIN,
    "Attention": _PLAIN,
    "FusedMatMul": _PLAIN,
    "SkipLayerNormalization": _PLAIN,
    "MatMulNBits": _QDQ,
    "MatMulBnb4": _QDQ,
    "GatherBlockQuantized": _QDQ,
    "QMoE": _QDQ,
    "MatMulInteger": _QDQ,
    "MatMulIntegerToFloat": _QDQ,
    "DynamicQuantizeMatMul": _QDQ,
    "DynamicQuantizeLinear": _QDQ,
    "QLinearMatMul": _QDQ,
    "QLinearAdd": _QDQ,
}
_SHOWN = 4


@dataclass(frozen=True)
class Unreadable:
    """One node that the parser refuses.

    Attributes:
        node: its name, or the name of its first output.
        operator: with its domain.
        instead: what to do about it.
    """

    node: str
    operator: str
    instead: str


def unreadable_nodes(model: ir.Model) -> list[Unreadable]:
    """Every node that TensorRT's parser cannot read, in the graph's order."""
    return [found for node in model.graph.all_nodes() if (found := _unreadable(node, model)) is not None]


def require_readable(model: ir.Model, where: str) -> None:
    """Refuse a graph that TensorRT cannot parse, before anything is built.

    Args:
        where: the file, for the sentence.

    Raises:
        GuardError: each operator is named with a node of it, and what to export instead.
    """
    found = unreadable_nodes(model)
    if not found:
        return
    first: dict[tuple[str, str], tuple[str, int]] = {}
    for one in found:
        name, count = first.get((one.operator, one.instead), (one.node, 0))
        first[one.operator, one.instead] = name, count + 1
    shown = [
        f"{operator} ({count} nodes, the first is {name!r}): {instead}"
        for (operator, instead), (name, count) in list(first.items())[:_SHOWN]
    ]
    more = f"; and {len(first) - _SHOWN} kinds more" if len(first) > _SHOWN else ""
    raise GuardError(f"{where}: TensorRT cannot read {'; '.join(shown)}{more}")


def _unreadable(node: ir.Node, model: ir.Model) -> Unreadable | None:
    why = _why_not(node, model)
    if why is None:
        return None
    operator = node.op_type if node.domain in _STANDARD else f"{node.domain}.{node.op_type}"
    name = node.name or (node.outputs[0].name if node.outputs else None)
    return Unreadable(name or "unnamed", operator, why)


def _why_not(node: ir.Node, model: ir.Model) -> str | None:
    if node.op_type in {"If", "Loop", "Scan"} and node.domain in _STANDARD:
        return "TensorRT needs one static graph; export the decoder without branches (not merged)"
    if node.domain not in _STANDARD:
        if node.op_identifier() in model.functions:
            return None  # the parser inlines functions, and their bodies are checked separately
        known = node.domain == "com.microsoft" and node.op_type in _CONTRIB_READ
        return None if known else _INSTEAD.get(node.op_type, _PLAIN)
    if node.op_type == "Attention":
        return _why_not_attention(node)
    if node.op_type == "DequantizeLinear" and len(node.inputs) > 2 and _dtype(node.inputs[0]) is ir.DataType.UINT4:
        return "int4 with a zero point; quantize it symmetrically (INT4 without zero points)"
    if node.op_type in {"QuantizeLinear", "DequantizeLinear"} and len(node.inputs) > 2 and _is_shifted(node.inputs[2]):
        return (
            "a zero point that is not 0; quantize it symmetrically (onnxruntime: ActivationSymmetric, WeightSymmetric)"
        )
    return _INSTEAD.get(node.op_type)


def _why_not_attention(node: ir.Node) -> str | None:
    """ONNX's own Attention (opset 23): its cache inputs and outputs are refused, its padding input is silently dropped."""
    inputs = [value.name if value is not None else None for value in node.inputs]
    if any(name for name in inputs[4:6]) or len(node.outputs) > 1:
        return "Attention that carries the KV cache itself; export with opset 18, which writes attention in small nodes"
    if len(inputs) > 6 and inputs[6]:
        return "Attention with nonpad_kv_seqlen, which TensorRT drops without an error; export with opset 18"
    return None


def _is_shifted(zero_point: ir.Value | None) -> bool:
    constant = None if zero_point is None else ir.convenience.get_const_tensor(zero_point)
    return constant is not None and bool(np.any(constant.numpy() != 0))


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    return None if value is None else value.dtype


def settle_sizes(model: ir.Model) -> int:
    """Make sizes that are written as digit strings in `dim_param` (transformers' exporter 5.x) the numbers that they are.

    TensorRT takes such a name for a dynamic size, and then its optimisation profiles do not fit.

    Returns:
        How many were changed.
    """
    changed = 0
    for value in _values(model):
        if value.shape is None:
            continue
        for axis, size in enumerate(value.shape):
            text = size.value if isinstance(size, ir.SymbolicDim) else None
            number = whole_number(text) if text is not None else None
            if number is not None:
                if value.shape.frozen:
                    value.shape = value.shape.copy()
                value.shape[axis] = number
                changed += 1
    return changed


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from (output for node in model.graph.all_nodes() for output in node.outputs)
