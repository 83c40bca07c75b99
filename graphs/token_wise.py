"""Values that hold one row of numbers per token, each computed from that token's row alone.

Where such a value enters a layer beside the residual stream, it cannot carry what attention collected from other tokens. So the
claim is concluded from the operators, never from declared shapes: every axis is a product of factors (the batch, the tokens,
whole numbers), and an operator may combine numbers along axes of whole numbers alone. A reshape must keep the batch and the
tokens whole. An operator without a rule ends the analysis: what it makes is not known to be token-wise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from .axis_sizes import BATCH, TOKENS, Axis, AxisSizes, constant_dims, joined, reshaped, whole_size
from .ranks import PACKED_PRODUCTS, Ranks, words

_STANDARD = frozenset({"", "ai.onnx", "com.microsoft"})
_ELEMENTWISE = words(
    """
    Abs Add And Cast CastLike Ceil Clip Cos Div Dropout Elu Equal Erf Exp Expm1 Floor Gelu Greater GreaterOrEqual HardSigmoid
    HardSwish Identity IsNaN LeakyRelu Less LessOrEqual Log Max Min Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Sigmoid
    Sign Sin Softplus Sqrt Sub Sum Swish Tanh Where Xor FastGelu QuickGelu BiasGelu QuantizeLinear DequantizeLinear
    """
)
_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "Softmax", "LogSoftmax"})
_OF_TWO = frozenset({"MatMul", "FusedMatMul", "Gemm", "Gather", "Reshape", "Expand"})
_PRODUCTS = frozenset({"MatMul", "FusedMatMul"})


@dataclass(frozen=True)
class TokenRows:
    """Facts about a token-wise value.

    Attributes:
        axes: its axes, outermost first.
        roots: the states that its rows are computed from: `k` for the residual stream before layer `k`, 0 for the embeddings.
    """

    axes: tuple[Axis, ...]
    roots: frozenset[int]


class TokenWise:
    """The token-wise values of a graph.

    Args:
        graph: one body, its nodes sorted.
        roots: values `[batch, tokens]` or `[batch, tokens, width]`, and for each the state that it is (`TokenRows.roots`).
        depends_on_text: whether a value that is not known here can depend on the text.
    """

    def __init__(
        self, graph: ir.Graph, roots: Mapping[ir.Value, int], depends_on_text: Callable[[ir.Value], bool]
    ) -> None:
        self._known: dict[ir.Value, TokenRows] = {}
        self._depends = depends_on_text
        self._ranks = Ranks()
        self._sizes = AxisSizes(self._axes, _batch_names(roots))
        widths = (value.shape for value in roots)
        for (value, state), shape in zip(roots.items(), widths, strict=True):
            width = shape[2] if shape is not None and len(shape) == 3 else None
            feature: tuple[Axis, ...] = () if shape is not None and len(shape) == 2 else (whole_size(width),)
            self._known[value] = TokenRows(((BATCH,), (TOKENS,), *feature), frozenset({state}))
        for node in graph:
            self._add(node, roots)

    def of(self, value: ir.Value | None) -> TokenRows | None:
        """Facts about a value; `None` if it is not token-wise, or not known to be."""
        return self._known.get(value) if value is not None else None

    def broken_at(self, value: ir.Value) -> ir.Value:
        """The first value on the way to one that is not token-wise, whose own inputs still are."""
        while (node := value.producer()) is not None:
            lost = [source for source in node.inputs if source is not None and source not in self._known]
            deeper = next((source for source in lost if self._depends(source)), None)
            if deeper is None:
                break
            value = deeper
        return value

    def _add(self, node: ir.Node, roots: Mapping[ir.Value, int]) -> None:
        self._ranks.add(node)
        read = [value for value in node.inputs if value is not None]
        rows = [self._known[value] for value in read if value in self._known]
        if not rows or node.domain not in _STANDARD:
            return
        if any(value not in self._known and self._depends(value) for value in read):
            return
        made = self._made(node)
        states = frozenset().union(*(one.roots for one in rows))
        for value, axes in zip(node.outputs, made, strict=False):
            if axes is not None and value not in roots:
                self._known[value] = TokenRows(axes, states)

    def _axes(self, value: ir.Value | None) -> tuple[Axis, ...] | None:
        rows = self.of(value)
        return None if rows is None else rows.axes

    def _made(self, node: ir.Node) -> Sequence[tuple[Axis, ...] | None]:
        """The axes of the node's outputs."""
        kind = node.op_type
        if kind in _ELEMENTWISE:
            return [self._elementwise(node.inputs)]
        if kind in ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization"):
            axes = self._elementwise(node.inputs[:2])
            axes = axes if axes is not None and _is_feature(axes[-1]) else None
            return [axes, None, None, axes]
        if kind == "Split":
            return self._split(node)
        if kind in _OF_TWO and len(node.inputs) < 2:
            return []  # a damaged file
        rule = _RULES.get(kind) or (_reduce if kind.startswith("Reduce") else None)
        return [] if rule is None else [rule(self, node)]

    def _elementwise(self, values: Iterable[ir.Value | None]) -> tuple[Axis, ...] | None:
        """Of a node that combines numbers at the same place, with broadcasting."""
        shapes: list[tuple[Axis | None, ...]] = []  # `None` as an axis: a size that is not known, and no token's
        for value in values:
            if value is None:
                continue
            axes = self._axes(value)
            if axes is not None:
                shapes.append(axes)
            elif (dims := constant_dims(value)) is not None:
                shapes.append(tuple(whole_size(dim) for dim in dims))
            elif (rank := self._ranks.of(value)) is not None:
                shapes.append((None,) * rank)
            else:
                return None
        longest = max(map(len, shapes))
        made: list[Axis] = []
        for place in range(-longest, 0):
            here = [shape[place] for shape in shapes if len(shape) >= -place]
            sized = [axis for axis in here if axis is not None and axis != ()]
            if any(axis != sized[0] for axis in sized if not (_is_feature(axis) and _is_feature(sized[0]))):
                return None  # tokens meet batches, or two different orders of them
            made.append(sized[0] if sized else (None,) if None in here else ())
        return tuple(made)

    def _split(self, node: ir.Node) -> Sequence[tuple[Axis, ...] | None]:
        axes, axis = self._axes(node.inputs[0]), _attribute(node, "axis", 0)
        if axes is None or axis is None or not _is_feature(axes[axis]):
            return []
        sizes = self._sizes.numbers(node.inputs[1]) if len(node.inputs) > 1 else None
        count = len(node.outputs)
        size = _whole(axes[axis])
        even = [(None,)] * count if size is None or size % count else [whole_size(size // count)] * count
        parts = even if sizes is None else [whole_size(n if isinstance(n, int) else None) for n in sizes]
        return [_with(axes, axis, part) for part in parts]


def _batch_names(roots: Iterable[ir.Value]) -> set[str]:
    """What the signature calls the batch of the text inputs."""
    firsts = (value.shape[0] for value in roots if value.is_graph_input() and value.shape is not None)
    return {size.value for size in firsts if isinstance(size, ir.SymbolicDim) and size.value is not None}


# One rule per operator: the axes of its first output, or `None`

_Rule = Callable[[TokenWise, ir.Node], "tuple[Axis, ...] | None"]


def _reduce(self: TokenWise, node: ir.Node) -> tuple[Axis, ...] | None:
    axes, keeps = self._axes(node.inputs[0]), _attribute(node, "keepdims", 1)
    if axes is None or keeps is None:
        return None
    places = _axis_list(self, node, 1)
    if not places or any(not -len(axes) <= place < len(axes) for place in places):
        return None
    gone = {place % len(axes) for place in places}
    if not all(_is_feature(axes[place]) for place in gone):
        return None
    return tuple(() if at in gone else axis for at, axis in enumerate(axes) if keeps or at not in gone)


def _norm(self: TokenWise, node: ir.Node) -> tuple[Axis, ...] | None:
    axes, axis = self._axes(node.inputs[0]), _attribute(node, "axis", -1)
    if axes is None or axis is None or not all(map(_is_feature, axes[axis:])):
        return None
    return axes


def _matmul(self: TokenWise, node: ir.Node) -> tuple[Axis, ...] | None:
    axes, dims = self._axes(node.inputs[0]), constant_dims(node.inputs[1])
    if any(node.attributes.get(name) for name in ("transA", "transB", "transBatchA", "transBatchB")):
        return None
    if axes is None or dims is None or len(dims) != 2 or not _is_feature(axes[-1]):
        return None
    return (*axes[:-1], whole_size(dims[1]))


def _gemm(self: TokenWise, node: ir.Node) -> tuple[Axis, ...] | None:
    axes, dims = self._axes(node.inputs[0]), constant_dims(node.inputs[1])
    turned = _attribute(node, "transB", 0)
    if axes is None or dims is None or len(dims) != 2 or turned is None or _attribute(node, "transA", 0) != 0:
        return None
    return (axes[0], whole_size(dims[0 if turned else 1])) if _is_feature(axes[1]) else None


def _quantized_matmul(self: TokenWise, node: ir.Node) -> tuple[Axis, ...] | None:
    axes, columns = self._axes(node.inputs[0]), _attribute(node, "N", None)
    if axes is None or columns is None or not _is_feature(axes[-1]) or len(node.inputs) > 4:
        return None
    return (*axes[:-1], whole_size(columns))


def _gather(self: TokenWise, node: ir.Node) -> tuple[Axis, ...] | None:
    axis = _attribute(node, "axis", 0)
    index, table = self._axes(node.inputs[1]), self._axes(node.inputs[0])
    if axis is None or (index is not None and table is not None):
        return None
    if index is not None:  # a table of embeddings
        dims = constant_dims(node.inputs[0])
        return None if axis != 0 or dims is None else (*index, *map(whole_size, dims[1:]))
    picked = constant_dims(node.inputs[1])
    if table is None or picked is None or not _is_feature(table[axis]):
        return None
    axis %= len(table)
    return (*table[:axis], *map(whole_size, picked), *table[axis + 1 :])


def _slice(self: TokenWise, node: ir.Node) -> tuple[Axis, ...] | None:
    axes = self._axes(node.inputs[0])
    bounds = [self._sizes.numbers(node.inputs[place]) if place < len(node.inputs) else None for place in range(5)]
    places = bounds[3]
    if axes is None or places is None or len(node.inputs) < 4:
        return None
    for number, place in enumerate(places):
        if not isinstance(place, int) or not -len(axes) <= place < len(axes) or not _is_feature(axes[place]):
            return None
        cut = [one[number] if one is not None else None for one in (bounds[1], bounds[2])]
        step = bounds[4][number] if bounds[4] is not None else 1
        size = _whole(axes[place])
        known = size is not None and all(isinstance(n, int) for n in (*cut, step)) and step
        axes = _with(axes, place, whole_size(len(range(size)[slice(*cut, step)])) if known else (None,))  # type: ignore
    return axes


def _concat(self: TokenWise, node: ir.Node) -> tuple[Axis, ...] | None:
    axis, parts = _attribute(node, "axis", None), [self._axes(value) for value in node.inputs]
    known = [part for part in parts if part is not None]
    if axis is None:
        return None
    if len(known) == len(parts):
        rest = {_with(part, axis, ()) for part in known}
        if len(rest) > 1 or not all(_is_feature(part[axis]) for part in known):
            return None
        sizes = [_whole(part[axis]) for part in known]
        return _with(known[0], axis, whole_size(None if None in sizes else sum(n for n in sizes if n is not None)))
    # a KV cache: the past tokens' rows, as earlier calls computed them, and behind these the rows of this call
    past, new = self._sizes.of_input(node.inputs[0]), parts[-1]
    if len(parts) != 2 or new is None or past is None or len(past) != len(new) or new[axis] != (TOKENS,):
        return None
    total = joined(past[axis], new[axis])
    return None if _is_feature(total) else _with(new, axis, total)


def _transpose(self: TokenWise, node: ir.Node) -> tuple[Axis, ...] | None:
    axes, order = self._axes(node.inputs[0]), node.attributes.get("perm")
    if axes is None or (order is not None and order.is_ref()):
        return None
    return axes[::-1] if order is None else tuple(axes[place] for place in order.as_ints())


def _unsqueeze(self: TokenWise, node: ir.Node) -> tuple[Axis, ...] | None:
    axes, places = self._axes(node.inputs[0]), _axis_list(self, node, 1)
    if axes is None or not places:
        return None
    total = len(axes) + len(places)
    added, rest = {place % total for place in places}, iter(axes)
    return tuple(() if at in added else next(rest) for at in range(total))


def _squeeze(self: TokenWise, node: ir.Node) -> tuple[Axis, ...] | None:
    axes, places = self._axes(node.inputs[0]), _axis_list(self, node, 1)
    if axes is None or not places:
        return None
    gone = {place % len(axes) for place in places}
    return tuple(axis for at, axis in enumerate(axes) if at not in gone) if not any(axes[at] for at in gone) else None


def _reshape(self: TokenWise, node: ir.Node) -> tuple[Axis, ...] | None:
    axes, target = self._axes(node.inputs[0]), self._sizes.numbers(node.inputs[1])
    return None if axes is None or target is None else reshaped(axes, target)


def _expand(self: TokenWise, node: ir.Node) -> tuple[Axis, ...] | None:
    axes, target = self._axes(node.inputs[0]), self._sizes.numbers(node.inputs[1])
    if axes is None or target is None or len(target) < len(axes):
        return None
    axes = ((),) * (len(target) - len(axes)) + axes
    sizes = ((None,) if n is None else whole_size(n) if isinstance(n, int) else n for n in target)
    return tuple(axis or (size if _is_feature(size) else (None,)) for axis, size in zip(axes, sizes, strict=True))


def _rotary(self: TokenWise, node: ir.Node) -> tuple[Axis, ...] | None:
    axes = self._axes(node.inputs[0])
    return axes if axes is not None and _is_feature(axes[-1]) else None


_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(_NORMS, _norm),
    **dict.fromkeys(_PRODUCTS, _matmul),
    "Gemm": _gemm,
    **dict.fromkeys(PACKED_PRODUCTS, _quantized_matmul),
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Expand": _expand,
    "RotaryEmbedding": _rotary,
}


def _is_feature(axis: Axis) -> bool:
    """Whether an axis runs over numbers of one token."""
    return not any(isinstance(factor, str) for factor in axis)


def _whole(axis: Axis) -> int | None:
    """The size of an axis of numbers, where it is known."""
    product = 1
    for factor in axis:
        if not isinstance(factor, int):
            return None
        product *= factor
    return product


def _with(axes: tuple[Axis, ...], place: int, axis: Axis) -> tuple[Axis, ...]:
    place %= len(axes)
    return (*axes[:place], axis, *axes[place + 1 :])


def _axis_list(self: TokenWise, node: ir.Node, place: int) -> list[int]:
    """The axes that a node names by its input or its attribute; empty where they are not known."""
    attribute = node.attributes.get("axes")
    if attribute is not None:
        return [] if attribute.is_ref() else list(attribute.as_ints())
    numbers = self._sizes.numbers(node.inputs[place]) if len(node.inputs) > place else None
    return [n for n in numbers if isinstance(n, int)] if numbers and all(isinstance(n, int) for n in numbers) else []


def _attribute(node: ir.Node, name: str, default: int | None) -> int | None:
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    return None if attribute.is_ref() else attribute.as_int()
