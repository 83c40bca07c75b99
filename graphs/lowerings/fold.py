"""`fold`: the projection moved into the weights that write the residual stream; no node, no cost.

If every writer of the stream (embedding, attention output, MLP output) is followed by `P = I - V^T V`, so is every sum of
them: weight orthogonalisation, as in "Refusal in Language Models Is Mediated by a Single Direction" (Arditi et al.,
arXiv 2406.11717). It is exact only where each writer's last step is linear with float weights, and one subspace serves the
whole stream. The writers are found backwards from the last sum, through sums and what is linear; anything else is a
refusal that names the node.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..dataflow import CONTRIB_DOMAIN, Flow, is_skip_norm, skip_norm_bias
from ..dtypes import STREAM_DTYPES
from ..errors import GuardError
from ..node_builder import PREFIX
from ..sites import ResidualSite, find_node
from ..subgraphs import find_bodies

FOLD = "fold"
SCOPE = f"{PREFIX}{FOLD}/"
_BLOCK = 1 << 22  # numbers that are float64 at a time

_SAME_NUMBERS = frozenset({"Identity", "Dropout"})
_SAME_ROWS = frozenset({"Reshape", "Squeeze", "Unsqueeze"})
_NORMS = frozenset(
    {"RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization", "InstanceNormalization"}
    | {"GroupNormalization", "LpNormalization"}
)
_QUANTIZED = frozenset(
    {"MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul"}
    | {"DequantizeLinear", "GatherBlockQuantized", "MatMulBnb4", "QMoE"}
)
_INJECTIONS = frozenset({"Where", "ScatterND", "ScatterElements", "MaskedScatter", "Concat", "Scatter"})
_INSTEAD = "choose --lowering lowrank"


@dataclass(frozen=True, eq=False)
class Writer:
    """One weight whose rows (along `axis`) are added to the stream.

    Attributes:
        weight: the initializer.
        axis: which of its axes is the stream's width.
        node: the node whose output goes into the stream.
        index: at which input it takes the weight.
        between: the Casts and Transposes from the weight to it, if any.
    """

    weight: ir.Value
    axis: int
    node: ir.Node
    index: int
    between: tuple[ir.Node, ...] = ()

    def replace(self, weight: ir.Value) -> None:
        """Let the node take this weight."""
        reader, index = (self.between[0], 0) if self.between else (self.node, self.index)
        reader.replace_input_with(index, weight)


def find_writers(model: ir.Model, ends: Sequence[ResidualSite], width: int) -> list[Writer]:
    """Everything that writes to the stream, up to these sums (the last layer's, one per body of the graph).

    Raises:
        GuardError: something writes to it that no weight can be folded for, with the reason and the node.
    """
    graphs = {body.name: body for body in find_bodies(model, [site.body for site in ends])}
    found: list[Writer] = []
    for site in ends:
        node = find_node(graphs[site.body].graph, site.anchor)
        assert node is not None, f"layer {site.layer_index}: no node makes {site.anchor!r}"
        found += _Walk(graphs[site.body].flow(), width).writers(node)
    _require_own_weights(found)
    return found


def fold(model: ir.Model, ends: Sequence[ResidualSite], ssd: np.ndarray) -> tuple[str, ...]:
    """Fold the projection into the writers, in place; names of the new initializers `vlmguard/fold/<original>`.

    Each takes its original's place in the stream. An original that nothing else reads leaves the graph; one that is the
    output head too (tied embeddings) stays for it. Weights are read when they are written out, one at a time.

    Args:
        ssd: `[m, d]`, the subspace.

    Raises:
        GuardError: see `find_writers`.
    """
    made: dict[tuple[str, int], ir.Value] = {}
    for writer in find_writers(model, ends, ssd.shape[1]):
        key = (writer.weight.name or "", writer.axis)
        if key not in made:
            made[key] = _register(model.graph, writer, ssd, taken=any(key[0] == name for name, _ in made))
        writer.replace(made[key])
        home = writer.weight.graph
        if home is not None and not writer.weight.uses() and not writer.weight.is_graph_output():
            home.initializers.pop(writer.weight.name or "", None)  # type: ignore[union-attr]
    return tuple(value.name or "" for value in made.values())


def folded_weights(graph: ir.Graph) -> tuple[str, ...]:
    """Names of the folded weights that some node reads."""
    return tuple(name for name, value in graph.initializers.items() if name.startswith(SCOPE) and value.uses())


def original_name(name: str) -> str:
    """Of the initializer that a folded one stands for; any other name is its own."""
    return re.sub(r"/axis_\d+$", "", name.removeprefix(SCOPE)) if name.startswith(SCOPE) else name


def subspace(ssd: np.ndarray) -> np.ndarray:
    """`[m, d]` float64: the same subspace, orthonormal to the last bit of float64 where the rows are so in float32."""
    return np.linalg.qr(ssd.astype(np.float64).T)[0].T


def projected(weight: np.ndarray, axis: int, basis: np.ndarray) -> np.ndarray:
    """`W (I - V^T V)` along `axis`, computed in float64, in the weight's own dtype."""
    result = np.empty_like(weight)
    rows, out = np.moveaxis(weight, axis, -1), np.moveaxis(result, axis, -1)
    for block in _blocks(rows):
        some = rows[block].astype(np.float64)
        out[block] = (some - (some @ basis.T) @ basis).astype(weight.dtype)
    return result


def left_over(weight: np.ndarray, axis: int, basis: np.ndarray) -> tuple[float, float]:
    """`(max |W V^T|, how much of it rounding W to its dtype explains)`: each number is off by half a step at most."""
    rows = np.moveaxis(weight, axis, -1)
    seen, largest = np.zeros(()), np.zeros(())
    for block in _blocks(rows):
        some = rows[block].astype(np.float64)
        # np.maximum, because a NaN must come through, and Python's max drops it
        seen = np.maximum(seen, np.abs(some @ basis.T).max(initial=0.0))
        largest = np.maximum(largest, np.abs(some).max(initial=0.0))
    kind = ir.DataType.from_numpy(weight.dtype)
    steps = {ir.DataType.FLOAT: (2.0**-23, 2.0**-149), ir.DataType.FLOAT16: (2.0**-10, 2.0**-24)}
    step, smallest = steps.get(kind, (2.0**-7, 2.0**-133))
    return float(seen), float(largest * step + smallest) / 2 * float(np.abs(basis).sum(axis=1).max()) * (1 + 2**-10)


def _blocks(rows: np.ndarray) -> Iterable[slice | tuple[()]]:
    if rows.ndim < 2:
        return [()]
    step = max(1, _BLOCK // max(1, math.prod(rows.shape[1:])))
    return [slice(start, start + step) for start in range(0, rows.shape[0], step)]


def _register(graph: ir.Graph, writer: Writer, ssd: np.ndarray, taken: bool) -> ir.Value:
    tensor = writer.weight.const_value
    assert tensor is not None
    name = f"{SCOPE}{writer.weight.name}" + (f"/axis_{writer.axis}" if taken else "")
    basis, axis, shape = subspace(ssd), writer.axis, ir.Shape(tensor.shape.numpy())

    def compute() -> ir.Tensor:
        return ir.Tensor(projected(tensor.numpy(), axis, basis), name=name)

    lazy = ir.LazyTensor(compute, tensor.dtype, shape, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=lazy)
    graph.register_initializer(value)
    return value


def _require_own_weights(writers: Sequence[Writer]) -> None:
    """A weight behind a Transpose or a Cast that others read too would be folded for them as well."""
    own = {writer.node for writer in writers} | {node for writer in writers for node in writer.between}
    for writer in writers:
        for node in writer.between:
            if node.outputs[0].is_graph_output() or any(reader not in own for reader in node.outputs[0].consumers()):
                raise _refusal(
                    writer.node, f"its weight {writer.weight.name!r} is shared with others behind a {node.op_type}"
                )


class _Walk:
    """Backwards through one body's stream, from a sum to its writers."""

    def __init__(self, flow: Flow, width: int) -> None:
        self.flow = flow
        self.width = width
        self.found: list[Writer] = []
        self.seen: set[ir.Value] = set()
        self.pending: list[ir.Value] = []

    def writers(self, last: ir.Node) -> list[Writer]:
        self._sum(last)
        while self.pending:
            self._value(self.pending.pop())
        return self.found

    def _sum(self, node: ir.Node) -> None:
        """Every summand: of the flow, or a constant."""
        if is_skip_norm(node):
            bias = skip_norm_bias(node)
            summands = [(0, node.inputs[0]), (1, node.inputs[1])]
            summands += [] if bias is None else [(list(node.inputs).index(bias), bias)]
        else:
            summands = list(enumerate(node.inputs))
        for index, value in summands:
            if value is None:
                continue
            if self.flow.is_dynamic(value):
                self.pending.append(value)
            else:
                self._weight(node, index, axis_of=-1, vector=True)

    def _value(self, value: ir.Value) -> None:
        if value in self.seen:
            return
        self.seen.add(value)
        node = value.producer()
        if node is None:
            raise GuardError(
                f"fold: the stream begins at the input {value.name!r}, whose numbers come from outside the graph; {_INSTEAD}"
            )
        if node.op_type in {"Add", "Sum"} and not node.domain:
            self._sum(node)
        elif is_skip_norm(node):
            if value is node.outputs[0]:
                raise _refusal(node, "a norm writes to the stream")
            self._sum(node)
        elif node.op_type in _SAME_NUMBERS:
            self._through(node, 0)
        elif node.op_type == "Cast":
            if node.inputs[0] is None or node.inputs[0].dtype not in STREAM_DTYPES:
                raise _refusal(node, "what it casts is not a float")
            self._through(node, 0)
        elif node.op_type in _SAME_ROWS and self._keeps_rows(node):
            self._through(node, 0)
        elif node.op_type in {"Mul", "Div"} and not node.domain:
            self._scaled(node)
        else:
            self._writer(node)

    def _through(self, node: ir.Node, index: int) -> None:
        value = node.inputs[index]
        assert value is not None
        self.pending.append(value)

    def _keeps_rows(self, node: ir.Node) -> bool:
        """Whether the last axis is the stream's before and after a Reshape or its kin; not knowing it is a refusal."""
        before, after = (
            value.shape[-1] if value is not None and value.shape else None
            for value in (node.inputs[0], node.outputs[0])
        )
        if not isinstance(after, int) and node.op_type == "Reshape":
            after = _last_number(node.inputs[1])
        if (before, after) != (self.width, self.width):
            raise _refusal(
                node, f"the last axis is {before} before and {after} after it, not known to stay {self.width}"
            )
        return True

    def _scaled(self, node: ir.Node) -> None:
        """A number times a row is linear; a row times a row is the gain of a norm or a scale per channel."""
        dynamic = [index for index, value in enumerate(node.inputs[:2]) if self.flow.is_dynamic(value)]
        if len(dynamic) != 1 or (node.op_type == "Div" and dynamic != [0]):
            raise _refusal(node, "it multiplies two parts of the flow (a gate, or a norm), which is not linear")
        scale = node.inputs[1 - dynamic[0]]
        shape = None if scale is None else scale.shape if scale.const_value is None else scale.const_value.shape
        if shape is None or any(size != 1 for size in shape):
            raise _refusal(node, "it scales each channel by its own number, as a norm between projection and sum does")
        self._through(node, dynamic[0])

    def _writer(self, node: ir.Node) -> None:
        """A node whose weight can be folded."""
        if node.op_type == "Gather" and not node.domain and not self.flow.is_dynamic(node.inputs[0]):
            if _number(node, "axis", 0) != 0:
                raise _refusal(node, "it looks up another axis than the first")
            self._weight(node, 0, axis_of=-1)
        elif node.op_type == "MatMul" and not node.domain:
            self._weight(node, 1, axis_of=-1)
        elif node.op_type == "FusedMatMul" and node.domain == CONTRIB_DOMAIN:
            self._weight(node, 1, axis_of=-2 if _number(node, "transB", 0) else -1)
        elif node.op_type == "Gemm" and not node.domain:
            self._weight(node, 1, axis_of=-2 if _number(node, "transB", 0) else -1)
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                self._weight(node, 2, axis_of=-1, vector=True)
        else:
            raise _refusal(node, _why_not(node))

    def _weight(self, node: ir.Node, index: int, axis_of: int, vector: bool = False) -> None:
        """The initializer behind an input, through Casts and Transposes; `axis_of` is the stream's axis of that input."""
        value, between = node.inputs[index], list[ir.Node]()
        if value is None or self.flow.is_dynamic(value):
            raise _refusal(node, "it multiplies two parts of the flow, so there is no weight to fold")
        rank = len(value.shape) if value.shape is not None else 1 if vector else 2
        axis = axis_of % rank if rank else 0
        while value.const_value is None or not value.is_initializer():
            maker = value.producer()
            if maker is None or maker.op_type not in {"Cast", "Identity", "Transpose"}:
                operator = "nothing" if maker is None else maker.op_type
                why = (
                    _why_not(maker)
                    if maker is not None and maker.op_type in _QUANTIZED
                    else f"its weight is made by {operator}"
                )
                raise _refusal(node, why)
            if maker.op_type == "Transpose":
                order = maker.attributes.get("perm")
                axis = order.as_ints()[axis] if order is not None else rank - 1 - axis
            value = maker.inputs[0]
            between.insert(0, maker)
            if value is None:
                raise _refusal(node, "its weight is missing")
        tensor = value.const_value
        if tensor.dtype not in STREAM_DTYPES:
            raise _refusal(node, f"its weight {value.name!r} is {tensor.dtype.name}, not float")
        if axis >= len(tensor.shape) or tensor.shape[axis] != self.width:
            raise _refusal(node, f"its weight {value.name!r} is {list(tensor.shape)}, not {self.width} wide")
        self.found.append(Writer(value, axis, node, index, tuple(between)))


def _last_number(shape: ir.Value | None) -> int | None:
    """The last number of a shape that is a constant, or put together with one at its end."""
    maker = shape.producer() if shape is not None else None
    if maker is not None and maker.op_type == "Concat":
        shape = maker.inputs[-1]
    array = shape.const_value.numpy().ravel() if shape is not None and shape.const_value is not None else np.array([])
    return int(array[-1]) if array.size else None


def _number(node: ir.Node, name: str, otherwise: int) -> int:
    attribute = node.attributes.get(name)
    return otherwise if attribute is None else attribute.as_int()


def _why_not(node: ir.Node) -> str:
    if node.op_type in _NORMS or is_skip_norm(node):
        return "a norm stands between the projection and the sum"
    if node.op_type in _QUANTIZED:
        return "its weights are quantized"
    if node.op_type in _INJECTIONS:
        return "it puts numbers into the stream that no weight made (image features, an injection between layers)"
    if node.op_type == "If":
        return "it is computed in branches"
    return "it is no lookup and no product with a float weight"


def _refusal(node: ir.Node, why: str) -> GuardError:
    name = node.name or (node.outputs[0].name if node.outputs else "")
    return GuardError(f"fold: {node.op_type} {name!r} writes to the stream, and {why}; {_INSTEAD}")
