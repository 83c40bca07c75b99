"""Inputs of an operator that determine the sizes of its outputs: by their own sizes, or by their values.

`Reshape` takes its sizes from the NUMBERS of its second input; `Add` from the sizes of both. The difference decides whether
a later `Shape` shows data. An operator that no table names may take its sizes from every number that it reads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import onnx_ir as ir

from .constants import constant
from .ranks import BROADCAST, PACKED_PRODUCTS, Ranks, words

# Reads the sizes of its input alone, never the numbers.
READ_SIZES = frozenset({"Shape", "Size"})

_MICROSOFT = "com.microsoft"
_STANDARD = frozenset({"", "ai.onnx", _MICROSOFT})

_REDUCTIONS = tuple(
    f"Reduce{what}" for what in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
)
# Operator -> places of the inputs whose numbers decide sizes.
_BY_NUMBERS: Mapping[str, Collection[int]] = {
    "Reshape": (1,),
    "Expand": (1,),
    "Tile": (1,),
    "Slice": (1, 2, 3, 4),
    "Pad": (1, 3),
    "Resize": (1, 2, 3),
    "TopK": (1,),
    "Split": (1,),
    "OneHot": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "Compress": (1,),
    "CenterCropPad": (1,),
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "NonZero": (0,),
    "Unique": (0,),
    "GroupQueryAttention": (5, 6),  # seqlens_k, total_sequence_length: how long the caches come out
    "SparseAttention": (7, 8, 9),
    **dict.fromkeys(_REDUCTIONS, (1,)),
}
# Operators whose outputs are as large as their first input: what is written into it may be of any length.
_AS_FIRST = frozenset({"ScatterND", "ScatterElements", "Scatter", "TensorScatter", "CumSum", "CastLike", "Trilu"})
# Operators whose outputs' sizes follow from their inputs' sizes and their attributes.
_BY_SIZES = words(
    """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh AveragePool BatchNormalization BitShift BitwiseAnd BitwiseNot BitwiseOr
    BitwiseXor Cast CastLike Ceil Celu Clip Col2Im Concat Conv ConvInteger ConvTranspose Cos Cosh CumSum DepthToSpace
    DequantizeLinear Det Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp EyeLike Flatten Floor GRU Gather
    GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample
    GroupNormalization HardSigmoid HardSwish Hardmax Identity InstanceNormalization IsInf IsNaN LRN LSTM
    LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization LpPool MatMul MatMulInteger Max MaxPool
    Mean MeanVarianceNormalization Min Mish Mod Mul Neg Not Or PRelu Pow QLinearConv QLinearMatMul QuantizeLinear RNN
    RMSNormalization Reciprocal Relu ReverseSequence RotaryEmbedding Round ScatterElements ScatterND Selu Sigmoid Sign Sin
    Sinh Softmax Softplus Softsign SpaceToDepth Sqrt Sub Sum Swish Tan Tanh TensorScatter ThresholdedRelu Transpose Trilu
    Where Xor ArgMax ArgMin Attention Bernoulli BitCast CumProd RandomNormalLike RandomUniformLike SwiGLU
    BiasAdd BiasGelu BiasSoftmax BiasSplitGelu CausalConvWithState DecoderMaskedMultiHeadAttention DequantizeWithOrder
    DynamicQuantizeMatMul EmbedLayerNormalization FastGelu FusedConv FusedGemm FusedMatMul FusedMatMulActivation
    GatherBlockQuantized GatedDeltaNet GemmFastGelu GroupNorm LinearAttention MatMulBnb4 MatMulFpQ4 MatMulIntegerToFloat
    MatMulNBits MoE MultiHeadAttention NhwcConv PackedMultiHeadAttention PagedAttention QAttention QGemm QLinearAdd
    QLinearAveragePool QLinearConcat QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearReduceMean
    QLinearSigmoid QLinearSoftmax QLinearWhere QMoE QuickGelu RelativePositionBias
    SimplifiedLayerNormalization SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization
    BranchwiseRMSNorm ConvStateReplay DecoderMaskedSelfAttention EngramGate GatedDeltaNetStateReplay GemmFloat8
    HyperConnectionLowRankMix HyperConnectionPostMix HyperConnectionPreMix LinearAttentionGate MatMulInteger16
    MatMulNBitsQLoRA MoEGroupRouter MulInteger QEmbedLayerNormalization RouterGateUpProj ScaledSiLU
    GatedAdd GatedRMSNorm GemmaRotaryEmbedding MRotaryEmbedding MatMulNBitsMlp MatMulNBitsQkv PackedAttention RMSNormRotary
    TransposeMatMul
    """
)


# Operators that keep the first axis of their first input where it is.
_KEEP_ROWS = words(
    """
    Abs Cast CastLike Ceil Clip Concat Cos CumSum DequantizeLinear Dropout Erf Exp FastGelu Floor Gelu HardSigmoid HardSwish
    Identity IsNaN LayerNormalization LeakyRelu Log LogSoftmax Neg Not QuantizeLinear QuickGelu RMSNormalization Reciprocal
    Relu Round Sigmoid Sign SimplifiedLayerNormalization Sin Softmax Softplus Sqrt Tanh
    """
)
# Sizes of the first axis alone ("rows"), or of any.
Extent = Literal["rows", "sizes"]


def made_extent(node: ir.Node) -> Extent:
    """Sizes of a node's outputs that come from values."""
    return "rows" if node.domain in _STANDARD and node.op_type == "Range" else "sizes"


def rows_become(node: ir.Node, place: int, ranks: Ranks) -> Extent | None:
    """How the outputs' sizes depend on the length of an input's first axis; `None`: they do not.

    The experts of a mixture take as many rows each as tokens chose them, and the same number in all. Picking rows by index
    (`Gather`, `GatherND`) discards the number of rows.
    """
    if node.domain not in _STANDARD:
        return "sizes"
    kind = node.op_type
    if kind in ("Gather", "GatherND"):
        attribute = node.attributes.get("axis" if kind == "Gather" else "batch_dims")
        if attribute is not None and (attribute.is_ref() or attribute.as_int() != 0):
            return "sizes"
        return None if place == 0 else "rows"
    if kind == "Concat" or (kind in _KEEP_ROWS and place == 0):
        return "rows"
    if kind in ("MatMul", "FusedMatMul", *PACKED_PRODUCTS) and place == 0:
        right = 2 if kind in PACKED_PRODUCTS else ranks.of(node.inputs[1])  # more axes of it would come first
        plain = not any(node.attributes.get(name) for name in ("transA", "transBatchA", "transBatchB"))
        return "rows" if plain and right is not None and right <= 2 else "sizes"
    if kind == "Split" and place == 0:
        axis, rank = node.attributes.get("axis"), ranks.of(node.inputs[0])
        at = 0 if axis is None else None if axis.is_ref() else axis.as_int()
        return "rows" if at is not None and rank and at % rank != 0 else "sizes"
    if kind in _REDUCTIONS and place == 0:
        axes, rank = _reduced_axes(node), ranks.of(node.inputs[0])
        return "rows" if axes and rank and all(axis % rank for axis in axes) else "sizes"
    if kind in BROADCAST:
        known = [ranks.of(value) for value in node.inputs if value is not None]
        mine = ranks.of(node.inputs[place])
        return "rows" if mine is not None and all(rank is not None and rank <= mine for rank in known) else "sizes"
    return "sizes"


def _reduced_axes(node: ir.Node) -> list[int] | None:
    """The axes that a reduction is over; `None` where no constant says them."""
    attribute = node.attributes.get("axes")
    if attribute is not None:
        return None if attribute.is_ref() else list(attribute.as_ints())
    tensor = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return [int(axis) for axis in tensor.numpy().reshape(-1)] if tensor is not None else None


def sized_by_numbers(node: ir.Node) -> tuple[ir.Value, ...]:
    """The inputs whose numbers decide how large the node's outputs are; all of them for an unknown operator."""
    inputs = tuple(value for value in node.inputs if value is not None)
    if node.domain not in _STANDARD:
        return inputs
    places = _BY_NUMBERS.get(node.op_type)
    if places is not None:
        chosen = (node.inputs[place] for place in places if place < len(node.inputs))
        return tuple(value for value in chosen if value is not None)
    return () if node.op_type in _BY_SIZES or node.op_type in READ_SIZES else inputs


def sized_by_sizes(node: ir.Node) -> tuple[ir.Value, ...]:
    """The inputs whose sizes decide how large the node's outputs are."""
    inputs = tuple(value for value in node.inputs if value is not None)
    if node.domain in _STANDARD and (node.op_type in _AS_FIRST or node.op_type in READ_SIZES):
        return () if node.op_type in READ_SIZES else inputs[:1]
    return inputs
