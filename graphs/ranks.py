"""Number of axes of a value, derived from operators and never from the file's declaration.

A declared shape is a claim that a runtime may overrule. Only the ranks of inputs are taken as declared: a runtime refuses
feeds of another rank.
"""

from __future__ import annotations

import onnx_ir as ir

from .constants import constant


def words(text: str) -> frozenset[str]:
    """The names in a text."""
    return frozenset(text.split())


_AS_FIRST = words(
    """
    Abs Cast CastLike Ceil Clip Conv CumSum Cos DequantizeLinear Dropout Elu Erf Exp Expm1 Floor GatherElements Gelu
    HardSigmoid HardSwish Identity IsNaN LayerNormalization LeakyRelu Log LogSoftmax Neg Not Pad QuantizeLinear RMSNormalization
    Reciprocal Relu Round ScatterElements ScatterND Sigmoid Sign SimplifiedLayerNormalization Sin
    SkipLayerNormalization SkipSimplifiedLayerNormalization Slice Softmax Softplus Split Sqrt Tanh Tile TopK Transpose Trilu
    FastGelu QuickGelu BiasGelu ReverseSequence RotaryEmbedding
    """
)
BROADCAST = words(
    """
    Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or PRelu Pow
    Sub Sum Where Xor
    """
)
# Products with a matrix that is packed in blocks: they compute what a MatMul with `[columns, N]` computes.
PACKED_PRODUCTS = frozenset({"MatMulNBits", "MatMulBnb4"})
_MATMULS = frozenset({"MatMul", "MatMulInteger", "FusedMatMul"})
_STANDARD = frozenset({"", "ai.onnx", "com.microsoft"})


class Ranks:
    """The ranks of the values of a graph; nodes are added in their order."""

    def __init__(self) -> None:
        self._known: dict[ir.Value, int | None] = {}
        self._lengths: dict[ir.Value, int] = {}

    def of(self, value: ir.Value | None) -> int | None:
        """The rank of a value; `None` where it is not known."""
        if value is None:
            return None
        if value in self._known:
            return self._known[value]
        if value.const_value is not None:
            return len(value.const_value.shape)
        if value.is_graph_input() and value.producer() is None:
            return len(value.shape) if value.shape is not None else None
        return None

    def add(self, node: ir.Node) -> None:
        """Conclude the ranks of a node's outputs from those of its inputs."""
        standard = node.domain in _STANDARD
        rank = self._made(node) if standard else None
        self._known.update(dict.fromkeys(node.outputs, rank))
        length = self._made_length(node) if standard else None
        for value in node.outputs:
            if length is not None:
                self._lengths[value] = length

    def _made(self, node: ir.Node) -> int | None:
        inputs = [self.of(value) for value in node.inputs if value is not None]
        first = inputs[0] if inputs else None
        kind = node.op_type
        if kind in _AS_FIRST or kind in PACKED_PRODUCTS:
            return first
        if kind in BROADCAST or kind in _MATMULS:
            known = [rank for rank in inputs if rank is not None]
            if len(known) < len(inputs) or not known or (kind in _MATMULS and min(known[:2]) < 2):
                return None
            return max(known)
        if kind == "Concat":
            return next((rank for rank in inputs if rank is not None), None)
        if kind == "Constant":
            tensor = constant(node.outputs[0])
            return None if tensor is None else len(tensor.shape)
        if kind in ("Range", "Shape"):
            return 1
        if kind == "NonZero" or kind == "Gemm":
            return 2
        if kind == "Gather" and first is not None and len(inputs) > 1 and inputs[1] is not None:
            return first + inputs[1] - 1
        if kind in ("Unsqueeze", "Squeeze") and first is not None and len(node.inputs) > 1:
            axes = self._length(node.inputs[1])
            return None if axes is None else first + axes if kind == "Unsqueeze" else first - axes
        if kind in ("Reshape", "Expand") and len(node.inputs) > 1:
            length = self._length(node.inputs[1])
            return length if kind == "Reshape" or length is None or first is None else max(length, first)
        if kind == "GatherND":
            return self._picked(node)
        if kind == "Einsum":
            return _einsum(node)
        if kind == "ConstantOfShape":
            return self._length(node.inputs[0])
        if kind.startswith("Reduce") and first is not None:
            return self._reduced(node, first)
        return None

    def _picked(self, node: ir.Node) -> int | None:
        """Of a GatherND, where each index is one number: it was made by an Unsqueeze at the end."""
        data, indices = self.of(node.inputs[0]), self.of(node.inputs[1])
        maker = node.inputs[1].producer() if node.inputs[1] is not None else None
        if data is None or indices is None or maker is None or maker.op_type != "Unsqueeze" or len(maker.inputs) < 2:
            return None
        return data + indices - 2 if _number(maker.inputs[1]) in (-1, indices - 1) else None

    def _reduced(self, node: ir.Node, rank: int) -> int | None:
        keeps = node.attributes.get("keepdims")
        if keeps is None or keeps.is_ref() or keeps.as_int() != 0:
            return rank if keeps is None or not keeps.is_ref() else None
        axes = node.attributes.get("axes")
        if axes is not None:
            return None if axes.is_ref() else rank - len(axes.as_ints())
        length = self._length(node.inputs[1]) if len(node.inputs) > 1 else None
        return rank - length if length else None

    def _length(self, value: ir.Value | None) -> int | None:
        """Number of elements of a 1-D value: a shape, a constant, or a concatenation of them."""
        if value is None or value in self._lengths:
            return self._lengths.get(value) if value is not None else None
        tensor = value.const_value if value.const_value is not None else constant(value)
        shape = tensor.shape if tensor is not None else ()
        return int(shape[0]) if len(shape) == 1 else None  # type: ignore[arg-type]

    def _made_length(self, node: ir.Node) -> int | None:
        if node.op_type == "Shape":
            rank = self.of(node.inputs[0])
            bounds = [node.attributes.get(name) for name in ("start", "end")]
            if rank is None or any(bound is not None and bound.is_ref() for bound in bounds):
                return None
            return len(range(rank)[slice(*(None if bound is None else bound.as_int() for bound in bounds))])
        if node.op_type == "Concat":
            parts = [self._length(value) for value in node.inputs]
            known = [part for part in parts if part is not None]
            return sum(known) if len(known) == len(parts) else None
        if node.op_type == "Cast":
            return self._length(node.inputs[0])
        if node.op_type == "Slice":
            return self._sliced(node)
        if node.op_type in ("Unsqueeze", "Reshape") and self.of(node.inputs[0]) == 0 and self.of(node.outputs[0]) == 1:
            return 1
        return None

    def _sliced(self, node: ir.Node) -> int | None:
        length = self._length(node.inputs[0])
        bounds = [_number(node.inputs[place]) if place < len(node.inputs) else 1 for place in (1, 2, 4)]
        if length is None or self.of(node.inputs[0]) != 1 or None in bounds or not bounds[2]:
            return None
        return len(range(length)[slice(*bounds)])


def _number(value: ir.Value | None) -> int | None:
    """The one number of a constant; a step that is absent is 1."""
    if value is None:
        return 1
    tensor = value.const_value if value.const_value is not None else constant(value)
    return int(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def _einsum(node: ir.Node) -> int | None:
    """Where the equation names its output without an ellipsis."""
    attribute = node.attributes.get("equation")
    equation = "" if attribute is None or attribute.is_ref() else attribute.as_string()
    end = equation.partition("->")[2].replace(" ", "")
    return len(end) if "->" in equation and "." not in end else None
