"""What the graph IS: its residual stream, layer by layer, found from structure and never from names.

The steps (docs/graphs.md has the patterns that real exporters write, and why each step is needed):

1. Sources: table lookups indexed by a graph input, and rank-3 float graph inputs (`inputs_embeds`).
   Sink: the first rank-2 or rank-3 float output (`logits`, `last_hidden_state`).
2. The dominator chain from source to sink: every residual sum lies on it.
3. A gap of the chain with a sequence mixer in it is an attention gap.
4. The output of layer `l` is the last sum before the next attention gap; that of the last layer the last true join.
The source that gives the most layers wins. A count other than the config's is a refusal, never a guess.
Where the top graph holds no decoder, every branch of the `If` that the output comes out of is looked at the same way, and
all must agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from .bodies import branches_on_path
from .dataflow import Flow, Vertex, is_skip_norm, is_sorted
from .errors import AnatomyNotFound, ModelUnreadable, first_line
from .inlining import require_inlinable
from .layer_count import LayerCount
from .layering import Chain, Layer
from .mixers import OTHER_MIXERS, QUANTIZED_SUM, is_attention, is_mixer, is_sum_of
from .scribe import PREFIX
from .side_paths import side_path

SiteKind = Literal["add", "skip_norm", "behind"]
_STREAM_AXES = 3  # [batch, sequence, width]
STREAM_DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}

_MOST_NAMED = 40  # names in a sentence
# Sources times values. The largest hybrid decoders have some 100 convolution states and 30,000 values.
_MOST_LOOKED_AT = 4_000_000
_QUANTIZED_STREAM = "models whose stream is quantized between layers cannot be guarded"
# What a norm ends in, or is: its weight is as long as the stream is wide.
_SCALES = frozenset({"Mul", "RMSNormalization", "SimplifiedLayerNormalization", "LayerNormalization"})
_RESHAPES = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})


@dataclass(frozen=True)
class ResidualSite:
    """Where one layer's output leaves it.

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


@dataclass(frozen=True)
class ResidualStream:
    """The residual stream through one body of the graph.

    Attributes:
        body: "" for the top graph, else the branch of an `If`.
        source: name of the value that enters the first layer's stream.
        sink: name of the output of this body that the stream ends in.
        sites: one per layer, ascending.
    """

    body: str
    source: str
    sink: str
    sites: tuple[ResidualSite, ...]


@dataclass(frozen=True)
class DecoderAnatomy:
    """The residual stream of a decoder.

    Attributes:
        streams: one; for a merged decoder one per branch of its `If`, all with the same layers.
        width: hidden size `d`.
        certainty: `confirmed` (the config's layer count agrees) or `structural` (no config was at hand).
        nodes: how many nodes were looked at.
        guarded_layers: layers that carry nodes of a guard already, by their names; `verify` is what proves a guard.
    """

    streams: tuple[ResidualStream, ...]
    width: int
    certainty: Literal["confirmed", "structural"]
    nodes: int
    guarded_layers: tuple[int, ...] = ()

    def __repr__(self) -> str:
        guard = f", guarded on layers {self.guarded_layers}" if self.guarded_layers else ""
        return f"DecoderAnatomy({self.layer_count} layers of width {self.width}, {self.certainty}{guard})"

    @property
    def layer_count(self) -> int:
        return len(self.streams[0].sites)

    @property
    def bodies(self) -> tuple[str, ...]:
        """Names of the bodies that hold the decoder: `("",)`, or those of all branches."""
        return tuple(stream.body for stream in self.streams)

    @property
    def sites(self) -> tuple[ResidualSite, ...]:
        """Every site: by layer, and within a layer by body."""
        return tuple(site for layer in zip(*(stream.sites for stream in self.streams), strict=True) for site in layer)

    @property
    def source(self) -> str:
        """Name of the value that enters the (first body's) stream."""
        return self.streams[0].source

    @property
    def sink(self) -> str:
        """Name of the output that the (first body's) stream ends in."""
        return self.streams[0].sink

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "layers": self.layer_count,
            "width": self.width,
            "source": self.source,
            "sink": self.sink,
            "certainty": self.certainty,
            "nodes": self.nodes,
            "guarded_layers": list(self.guarded_layers),
            "bodies": list(self.bodies),
            "sites": [asdict(site) for site in self.sites],
        }

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(sorted({site.dtype for site in self.sites}))


def dissect(model: ir.Model, expected_layers: LayerCount | int | None = None) -> DecoderAnatomy:
    """Find the residual stream. Inlines model-local functions and infers missing types in `model`; nothing else changes.

    Args:
        model: the decoder.
        expected_layers: what the config declares, where there is one.

    Raises:
        AnatomyNotFound: with the reason and the best partial match.
    """
    prepare(model)
    declared = LayerCount(expected_layers) if isinstance(expected_layers, int) else expected_layers
    streams = _streams(Flow(model.graph), find_sink(model.graph), declared)
    nodes = sum(1 for _ in model.graph.all_nodes())
    certainty: Literal["confirmed", "structural"] = "structural" if declared is None else "confirmed"
    return DecoderAnatomy(
        tuple(stream for stream, _ in streams), streams[0][1], certainty, nodes, guarded_layers(model.graph)
    )


def _streams(flow: Flow, sink: ir.Value, declared: LayerCount | None) -> list[tuple[ResidualStream, int]]:
    """The stream through the top graph, or one through every branch; each with its width."""
    if any(is_mixer(flow, vertex) for vertex in flow.vertices):
        return [_stream("", flow, sink, declared)]
    branches = branches_on_path(flow, _vertex(flow, sink))
    if not branches:
        raise AnatomyNotFound(_reason_for_nothing(flow, declared))
    found = []
    for body, output in branches:
        try:
            found.append(_stream(body.name, Flow(body.graph, flow), output, declared))
        except AnatomyNotFound as error:
            raise AnatomyNotFound(f"{body.name} of the If {body.owner and body.owner.name!r}: {error}") from None
    shapes = {(len(stream.sites), width) for stream, width in found}
    if len(shapes) > 1:
        told = ", ".join(f"{stream.body} {len(stream.sites)} layers of width {width}" for stream, width in found)
        raise AnatomyNotFound(
            f"the branches of the If disagree ({told}); a merged decoder holds the same layers in each, export it again"
        )
    return found


def _stream(body: str, flow: Flow, sink: ir.Value, declared: LayerCount | None) -> tuple[ResidualStream, int]:
    best: tuple[Chain, Vertex] | None = None
    most = (0, 0)
    sources = list(_sources(flow))
    if len(sources) * len(flow.vertices) > _MOST_LOOKED_AT:  # each is followed through the whole graph
        raise AnatomyNotFound(
            f"{len(sources)} values could be where the stream begins, among {len(flow.vertices)}; is this a decoder?"
        )
    for source in sources:
        chain = Chain(flow, source, _vertex(flow, sink))
        # The state of a convolution is a rank-3 input too, and reaches as many layers. But it enters the first sum from
        # the branch alone, where the stream's source enters from both sides: one join more.
        if len(chain.gaps()) < max(most[0], 1):
            continue
        found = len(chain.gaps()), chain.join_count()
        if found > most:
            best, most = (chain, source), found
    if best is None:
        for source in _sources(flow):
            _require_no_side_path(flow, source, _vertex(flow, sink), declared)
        raise AnatomyNotFound(_reason_for_nothing(flow, declared))
    chain, source = best
    _require_one_stream(flow, chain.gaps(), source, _vertex(flow, sink), declared)
    layers = chain.layers(declared)
    sites = tuple(_site(flow, index, layer, source, body) for index, layer in enumerate(layers))
    if declared is not None and len(sites) != declared.count:
        raise AnatomyNotFound(
            f"the config says {declared.count} layers, the graph's residual stream shows {len(sites)} "
            f"({sites[0].value or sites[0].anchor} to {sites[-1].value or sites[-1].anchor}{chain.kinds()}); "
            "check that config.json belongs to this graph, and that no layer was left out of it"
        )
    return ResidualStream(body, source.name, sink.name or "", sites), _width(flow.graph, source, sites)


def guarded_layers(graph: ir.Graph) -> tuple[int, ...]:
    """Layers that carry nodes of a guard, by the nodes' names, ascending."""
    found = (re.match(rf"{PREFIX}(?:\w+_branch/)?layer_([0-9]{{1,9}})/", node.name or "") for node in graph.all_nodes())
    return tuple(sorted({int(match[1]) for match in found if match is not None}))


def prepare(model: ir.Model) -> None:
    """Make structure visible: inline model-local functions, put nodes behind what they read, infer types where the
    exporter wrote none."""
    if model.functions:
        require_inlinable(model)
        try:
            InlinePass()(model)
        except (ir.passes.InvariantError, ir.passes.PassError) as error:
            raise ModelUnreadable(
                f"the graph's own functions cannot be inlined ({first_line(error)}); export it again"
            ) from None
    if not all(is_sorted(graph) for graph in model.graphs()):
        try:
            model.graph.sort()  # onnxruntime's float16 converter appends casts behind their readers, and its runtime sorts
        except ValueError:
            raise ModelUnreadable("the graph has a cycle: some node reads what is made of its own output") from None
    missing = any(value.dtype is None for node in model.graph.all_nodes() for value in node.outputs if value.name)
    if missing:  # TorchScript files (optimum) have no value types at all
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)


def find_node(graph: ir.Graph, anchor: str) -> ir.Node | None:
    """The node whose first output is called `anchor`."""
    return next((node for node in graph if node.outputs and node.outputs[0].name == anchor), None)


# 1. Source and sink


def _sources(flow: Flow) -> Iterator[Vertex]:
    for value in flow.inputs:
        if value.dtype in STREAM_DTYPES and value.shape is not None and len(value.shape) == 3:
            vertex = flow.vertex(value)
            if vertex is not None:
                yield vertex
    for vertex in flow.vertices:
        node = vertex.node
        if node is None or node.op_type not in {"Gather", "GatherBlockQuantized"} or len(node.inputs) < 2:
            continue
        table, index = node.inputs[0], node.inputs[1]
        if not flow.is_dynamic(table) and _token_input(index) is not None and not _is_flat(vertex.value):
            yield vertex


def _token_input(index: ir.Value | None) -> ir.Value | None:
    """The graph input that an index is, up to casts and to a change of its form (GPT-2 and OPT: `view(-1, length)`)."""
    while index is not None and not index.is_graph_input():
        node = index.producer()
        if node is None or node.op_type not in {"Cast", "Identity", "Clip", *_RESHAPES}:
            return None
        index = node.inputs[0]
    return index


def _is_flat(rows: ir.Value | None) -> bool:
    """Whether a lookup of reshaped tokens gives `[tokens, width]`: rows of one batch that nothing tells apart any more."""
    index = rows.producer().inputs[1] if rows is not None and rows.producer() is not None else None  # type: ignore
    node = index.producer() if index is not None else None
    reshaped = node is not None and node.op_type in _RESHAPES
    return reshaped and rows is not None and rows.shape is not None and len(rows.shape) != 3


def find_sink(graph: ir.Graph) -> ir.Value:
    """The output that the stream ends in: the first with the type and rank of logits or of a state."""
    for value in graph.outputs:
        if value.dtype in STREAM_DTYPES and value.shape is not None and len(value.shape) in (2, 3):
            return value
    for value in graph.outputs:  # some exporters write no shapes: then the first float output, by convention
        if value.shape is None and value.dtype in (*STREAM_DTYPES, None):
            return value
    raise AnatomyNotFound(
        f"no rank-2 or rank-3 float output (logits or last_hidden_state) among {_names(graph.outputs)}; is it a decoder?"
    )


def _vertex(flow: Flow, value: ir.Value) -> Vertex:
    vertex = flow.vertex(value)
    if vertex is None:
        raise AnatomyNotFound(f"output {value.name!r} does not depend on the graph's inputs; is it a decoder?")
    return vertex


def _names(values: Iterable[ir.Value]) -> str:
    names = [str(value.name) for value in values]
    return ", ".join(names[:_MOST_NAMED]) + (" ..." if len(names) > _MOST_NAMED else "") or "nothing"


def _require_one_stream(
    flow: Flow, layers: list[tuple[Vertex, Vertex]], source: Vertex, sink: Vertex, declared: LayerCount | None
) -> None:
    """Two attentions in a row without a common sum between them: several streams run side by side (Gemma3n).

    Only on the way from the source: an image tower in the same graph has attentions too, and enters before layer 0.
    """
    members = set(flow.between(source, sink))
    boundaries = [source.index, *(output.index for _, output in layers)]
    for layer, (low, high) in enumerate(pairwise(boundaries)):
        inside = [v for v in flow.vertices[low + 1 : high] if v.index in members and is_attention(flow, v)]
        for first, second in pairwise(inside):
            if flow.between(first, second):
                _require_no_side_path(flow, source, sink, declared)
                wanted = f" of the config's {declared.count}" if declared is not None else ""
                raise AnatomyNotFound(
                    f"the stream splits: {len(inside)} attention nodes follow one another inside layer {layer} without "
                    f"a sum that all paths pass (best partial match: {len(layers)} layers{wanted}): {_past_sums(declared)}; "
                    "such decoders cannot be guarded"
                )


def _require_no_side_path(flow: Flow, source: Vertex, sink: Vertex, declared: LayerCount | None) -> None:
    """Where no sum is passed by all paths: it is one path from the embedding that goes past them, and the stream is one."""
    attentions = sum(is_attention(flow, flow.vertices[index]) for index in flow.between(source, sink))
    if attentions < 2 or (declared is not None and declared.count != attentions):
        return
    found = side_path(flow, source, sink, attentions)
    if found is None:
        return
    path, sums = found
    if all(_axes(total, source) in (None, _STREAM_AXES) for total in sums):
        raise AnatomyNotFound(
            f"one residual stream of {len(sums)} layers, but a side path leaves the embedding at {path.name!r} and enters "
            "layers past their sums (as Gemma 4's per-layer embeddings do), where a guard on the sums would not see it; such "
            "decoders cannot be guarded yet"
        )


def _site(flow: Flow, layer_index: int, layer: Layer, source: Vertex, body: str) -> ResidualSite:
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
    if value.shape is None or len(value.shape) != _STREAM_AXES - 1:
        return value
    node = value.producer()
    for summand in node.inputs if node is not None else ():
        maker = summand.producer() if summand is not None else None
        if maker is not None and maker.op_type == "Reshape":
            shaped = maker.inputs[0]
            if shaped is not None and shaped.shape is not None and len(shaped.shape) == _STREAM_AXES:
                return shaped
    return None


def _require_sequences(layer_index: int, total: Vertex, source: Vertex) -> None:
    """The stream is `[batch, sequence, width]`, as far as the file says."""
    axes = _axes(total, source)
    if axes is None or axes == _STREAM_AXES:
        return
    if axes == _STREAM_AXES - 1:
        raise AnatomyNotFound(
            f"layer {layer_index}: the residual sum {total.name!r} is [tokens, width], with the tokens of all sequences on one "
            "axis (a paged or flattened graph), so which of them ends a sequence is not known; export the decoder without "
            "paged attention"
        )
    raise AnatomyNotFound(
        f"layer {layer_index}: the residual sum {total.name!r} has {axes} axes and not [batch, sequence, width] (several "
        "streams side by side); such decoders cannot be guarded"
    )


def _axes(total: Vertex, source: Vertex) -> int | None:
    """How many axes a sum has; where the file does not say, as many as what enters the stream."""
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


def _width(graph: ir.Graph, source: Vertex, sites: tuple[ResidualSite, ...]) -> int:
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
        searched: values, and how far behind each was looked in vain; a value has many ways to it, and is looked at once.
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


def _past_sums(declared: LayerCount | None) -> str:
    """What goes past the sums: as the config declares it, else what it can be."""
    if declared is not None and declared.past_sums:
        return f"the config declares {' and '.join(declared.past_sums)}"
    return "several streams, or paths past the sums (embeddings per layer, keys and values that layers share)"


def _reason_for_nothing(flow: Flow, declared: LayerCount | None) -> str:
    """Why no layer was found, with what was."""
    mixers = [v for v in flow.vertices if is_mixer(flow, v)]
    if not mixers:
        return (
            f"no attention found among {len(flow.vertices)} values, so there are no decoder layers; "
            "is this the decoder graph?"
        )
    if not any(True for _ in _sources(flow)):
        return (
            f"{_counted(mixers)} but no embedding lookup or inputs_embeds among the inputs "
            f"{_names(flow.graph.inputs)}; is this a decoder graph?"
        )
    everything = set(range(len(flow.vertices)))
    if any(_sums_between(flow, first, second, everything) for first, second in pairwise(mixers)):
        return (
            f"{len(mixers)} attention nodes follow one another without a single sum that all paths pass: "
            f"{_past_sums(declared)}; such decoders cannot be guarded"
        )
    return (
        f"{_counted(mixers)} but no residual sum that every path from the embedding to the output passes; "
        "this is not a pre-norm or post-norm decoder"
    )


def _counted(mixers: list[Vertex]) -> str:
    """How many of which: convolutions and loops mix tokens too, and are no attention."""
    others = sorted({vertex.op_type for vertex in mixers if vertex.op_type in OTHER_MIXERS})
    attentions = sum(vertex.op_type not in OTHER_MIXERS for vertex in mixers)
    parts = [f"{attentions} attention node{'s' * (attentions > 1)}"] if attentions else []
    return " and ".join([*parts, *([f"nodes that mix tokens ({', '.join(others)})"] if others else [])])


def _sums_between(flow: Flow, first: Vertex, second: Vertex, everything: set[int]) -> bool:
    """Whether the way from one attention to the next leads through a sum."""
    return any(is_sum_of(flow, flow.vertices[index], everything) for index in flow.between(first, second))
