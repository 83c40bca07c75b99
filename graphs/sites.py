"""Residual sites: where in the graph a layer's output is, its dtype and its width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from .dataflow import Flow, Vertex, is_skip_norm
from .dtypes import STREAM_DTYPES
from .errors import AnatomyNotFound
from .layer_count import LayerCount
from .layering import Layer
from .mixers import QUANTIZED_SUM

SiteKind = Literal["add", "skip_norm", "behind"]
STREAM_AXES = 3  # [batch, sequence, width]
_QUANTIZED_STREAM = "models whose stream is quantized between layers cannot be guarded"
# Operators at the end of a norm, or a norm itself: its weight is as long as the stream is wide.
_SCALES = frozenset({"Mul", "RMSNormalization", "SimplifiedLayerNormalization", "LayerNormalization"})
RESHAPES = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})


@dataclass(frozen=True)
class ResidualSite:
    """Place of one layer's output.

    Attributes:
        layer_index: 0-based; the value is Hugging Face's `hidden_states[layer_index + 1]` (before the final norm).
        kind: `add`: the sum is the value `value`, made by an Add. `skip_norm`: it is inside a fused
            `Skip*LayerNormalization` node, and `value` is empty where that node does not give it out (output 3).
            `behind`: it is what a norm or a Reshape makes of the sum, which nothing else reads.
        anchor: name of the first output of the node that makes the sum: what a plan finds it by.
        value: name of the sum, or "".
        residual: name of the input that carries the stream so far.
        branch: name of the input that this layer adds; of a site `behind` the node's other input, or "".
        dtype: of the sum: `float32`, `float16` or `bfloat16`.
        body: the body of the graph that it lies in: "" for the top, else the branch of an `If` (`then_branch`).
    """

    layer_index: int
    kind: SiteKind
    anchor: str
    value: str
    residual: str
    branch: str
    dtype: str
    body: str = ""

    @property
    def is_fused(self) -> bool:
        """Whether the sum lies inside a fused `Skip*LayerNormalization` (`site_streams`)."""
        return self.kind == "skip_norm"


def find_node(graph: ir.Graph, anchor: str) -> ir.Node | None:
    """The node whose first output is called `anchor`."""
    return next((node for node in graph if node.outputs and node.outputs[0].name == anchor), None)


def residual_site(flow: Flow, layer_index: int, layer: Layer, source: Vertex, body: str) -> ResidualSite:
    """The place of the residual stream after one layer.

    Args:
        flow: of the body.
        layer_index: 0-based.
        layer: the layer's vertices.
        source: where the stream starts.
        body: name of the body.

    Raises:
        AnatomyNotFound: there is no float sum that can be guarded.
    """
    total = layer.total
    node = total.node
    assert node is not None
    if node.op_type == QUANTIZED_SUM:
        raise AnatomyNotFound(
            f"layer {layer_index}: the residual sum {total.name!r} is computed and kept in int8 ({QUANTIZED_SUM}), so there "
            "is no float sum to guard; quantize with QuantFormat.QDQ, or leave Add out of the operators to quantize"
        )
    if layer.output is not total:
        return _site_behind(flow, layer_index, layer.output, source, body)
    residual, branch = _residual_first(flow, node, layer_index)
    _require_sequences(layer_index, total, source)
    kind: SiteKind = "skip_norm" if total.is_sum else "add"
    return ResidualSite(
        layer_index=layer_index,
        kind=kind,
        anchor=node.outputs[0].name or "",
        value=total.value.name or "" if total.value is not None else "",
        residual=residual.name or "",
        branch=branch.name or "",
        dtype=_dtype(node, total, layer_index),
        body=body,
    )


def _site_behind(flow: Flow, layer_index: int, output: Vertex, source: Vertex, body: str) -> ResidualSite:
    """The layer's output is made of its last sum: by a norm, or a Reshape."""
    node = output.node
    assert node is not None and output.value is not None
    _require_sequences(layer_index, output, source)
    made_of = next((value for value in node.inputs[:2] if flow.is_dynamic(value)), None)
    others = [value for value in node.inputs[:2] if value is not None and value is not made_of]
    if made_of is None or node.outputs[0] is not output.value or sequence_stream(made_of) is None:
        raise AnatomyNotFound(
            f"layer {layer_index}: its output {output.name!r} ({node.op_type}) stands behind its last sum in a way that cannot "
            "be guarded"
        )
    return ResidualSite(
        layer_index=layer_index,
        kind="behind",
        anchor=output.name,
        value=output.name,
        residual=made_of.name or "",
        branch=others[0].name or "" if others else "",
        dtype=_dtype(node, output, layer_index),
        body=body,
    )


def sequence_stream(value: ir.Value) -> ir.Value | None:
    """A value `[batch, sequence, width]` from before: this one, or what a summand of a flattened sum was reshaped from."""
    if value.shape is None or len(value.shape) != STREAM_AXES - 1:
        return value
    node = value.producer()
    for summand in node.inputs if node is not None else ():
        maker = summand.producer() if summand is not None else None
        if maker is not None and maker.op_type == "Reshape":
            shaped = maker.inputs[0]
            if shaped is not None and shaped.shape is not None and len(shaped.shape) == STREAM_AXES:
                return shaped
    return None


def _require_sequences(layer_index: int, total: Vertex, source: Vertex) -> None:
    """Check that the stream is `[batch, sequence, width]`, as far as the file declares shapes."""
    axes = stream_axes(total, source)
    if axes is None or axes == STREAM_AXES:
        return
    if axes == STREAM_AXES - 1:
        raise AnatomyNotFound(
            f"layer {layer_index}: the residual sum {total.name!r} is [tokens, width], with the tokens of all sequences on one "
            "axis (a paged or flattened graph), so which of them ends a sequence is not known; export the decoder without "
            "paged attention"
        )
    raise AnatomyNotFound(
        f"layer {layer_index}: the residual sum {total.name!r} has {axes} axes and not [batch, sequence, width] (several "
        "streams side by side), so a layer has no single hidden state; such decoders cannot be guarded"
    )


def stream_axes(total: Vertex, source: Vertex) -> int | None:
    """Number of axes of a sum; if the file declares no shape, that of the value that enters the stream."""
    node = total.node
    known = [total.value, *(node.outputs[:1] if node is not None else ())]
    if node is not None and total.value is not None and node.op_type in {"Add", "Sum"}:
        known += node.inputs[:2]
    for value in (*known, source.value):
        if value is not None and value.shape is not None:
            return len(value.shape)
    index = source.node.inputs[1] if source.node is not None and len(source.node.inputs) > 1 else None
    return len(index.shape) + 1 if index is not None and index.shape is not None else None


def _residual_first(flow: Flow, node: ir.Node, layer_index: int) -> tuple[ir.Value, ir.Value]:
    """The two summands: the stream is the one that the other was computed from, or at least the earlier one."""
    summands = [value for value in node.inputs[:2] if value is not None]
    if len(summands) < 2:  # an input that is required has no name
        raise AnatomyNotFound(
            f"layer {layer_index}: node {node.name!r} ({node.op_type}) lacks one of its two summands; is the file damaged?"
        )
    first, second = summands
    a, b = flow.vertex(first), flow.vertex(second)
    if a is None or b is None:  # an Add of more than two parts, or a constant scale; order does not matter for an Add
        return first, second
    return (first, second) if a.index < b.index else (second, first)


def _dtype(node: ir.Node, total: Vertex, layer_index: int) -> str:
    """The sum's dtype: from the value, else from what the node reads (a skip-norm's weight has the stream's dtype)."""
    values = [total.value, *(node.inputs if is_skip_norm(node) else node.inputs[:2]), node.outputs[0]]
    for value in values:
        found = _known_dtype(value)
        if found is not None:
            if found not in STREAM_DTYPES:
                why = "convert the model to float32" if found == ir.DataType.DOUBLE else _QUANTIZED_STREAM
                raise AnatomyNotFound(
                    f"layer {layer_index}: the residual sum {total.name!r} is {found.name}, expected a float stream; {why}"
                )
            return STREAM_DTYPES[found]
    raise AnatomyNotFound(
        f"layer {layer_index}: the dtype of {total.name!r} is unknown; run shape inference on the file"
    )


def _known_dtype(value: ir.Value | None) -> ir.DataType | None:
    if value is None:
        return None
    return value.const_value.dtype if value.const_value is not None else value.dtype


def stream_width(graph: ir.Graph, source: Vertex, sites: tuple[ResidualSite, ...]) -> int:
    """Hidden size: a static last dimension, else the length of a norm's weight that the sum meets."""
    entering = source.value.shape if source.value is not None else None
    width = entering[2] if entering is not None and len(entering) == 3 else None
    if isinstance(width, int):
        return width
    anchors = {node.outputs[0].name: node for node in reversed(graph) if node.outputs}
    searched: set[tuple[ir.Value, int]] = set()
    for site in sites:
        node = anchors[site.anchor]
        if is_skip_norm(node):
            weight = node.inputs[2]
            length = weight.shape[0] if weight is not None and weight.shape is not None else None
            if isinstance(length, int):
                return length
        for value in (*node.outputs, *node.inputs[:2]):
            if value is not None and value.shape is not None and len(value.shape) == 3:
                last = value.shape[2]
                if isinstance(last, int):
                    return last
        width = _width_from_consumers(node.outputs[0], searched)
        if width is not None:
            return width
    raise AnatomyNotFound(f"the width of the residual stream is unknown at {sites[0].anchor!r}; run shape inference")


def _width_from_consumers(value: ir.Value, searched: set[tuple[ir.Value, int]], depth: int = 6) -> int | None:
    """The length of a norm's weight at most `depth` nodes behind the value.

    Args:
        searched: values and the depth to which each was searched without success; a value is searched once.
    """
    if depth == 0 or (value, depth) in searched:
        return None
    searched.add((value, depth))
    for node in value.consumers():
        for operand in node.inputs:
            tensor = operand.const_value if operand is not None else None
            length = tensor.shape[0] if tensor is not None and len(tensor.shape) == 1 else None
            if isinstance(length, int) and length > 1 and node.op_type in _SCALES:
                return length
        for output in node.outputs:
            width = _width_from_consumers(output, searched, depth - 1)
            if width is not None:
                return width
    return None


def past_sums(declared: LayerCount | None) -> str:
    """What goes past the sums: as the config declares it, else what it can be."""
    if declared is not None and declared.past_sums:
        return f"the config declares {' and '.join(declared.past_sums)}"
    return "several streams, or paths past the sums (embeddings per layer, keys and values that layers share)"
