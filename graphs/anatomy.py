"""Finds the residual stream of a graph, layer by layer, from its structure and never from names.

The steps (docs/graphs.md has the patterns that real exporters write, and why each step is needed):

1. Sources: table lookups indexed by a graph input, and rank-3 float graph inputs (`inputs_embeds`).
   Sink: the first rank-2 or rank-3 float output (`logits`, `last_hidden_state`).
2. The dominator chain from source to sink: every residual sum lies on it.
3. A gap of the chain with a sequence mixer in it is an attention gap.
4. The output of layer `l` is the last sum before the next attention gap; that of the last layer the last true join.
Where some path goes past the sums, the walk back from the sink finds the stream, and each such path must be harmless
(`spine.py`, `side_paths.py`). The source that gives the most layers wins. A count other than the config's is a refusal,
never a guess.
Where the top graph holds no decoder, every branch of the `If` that the output comes out of is looked at the same way, and
all must agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from .baked_lengths import require_open_length
from .dataflow import Flow, Vertex, is_sorted
from .dtypes import STREAM_DTYPES
from .errors import AnatomyNotFound, ModelUnreadable, first_line
from .inlining import require_inlinable
from .layer_count import LayerCount
from .layering import Chain
from .mixers import is_attention, is_mixer
from .no_layers import names_of, reason_for_nothing
from .node_builder import PREFIX
from .side_paths import SidePath, spelled
from .sites import (
    RESHAPES,
    ResidualSite,
    past_sums,
    residual_site,
    stream_width,
)
from .spine_layers import stream_by_spine
from .subgraphs import branches_on_path

# Sources times values. The largest hybrid decoders have some 100 convolution states and 30,000 values.
_MOST_LOOKED_AT = 4_000_000


@dataclass(frozen=True)
class ResidualStream:
    """The residual stream through one body of the graph.

    Attributes:
        body: "" for the top graph, else the branch of an `If`.
        source: name of the value that enters the first layer's stream.
        sink: name of the output of this body that the stream ends in.
        sites: one per layer, ascending.
        side_paths: what enters layers beside the stream.
    """

    body: str
    source: str
    sink: str
    sites: tuple[ResidualSite, ...]
    side_paths: tuple[SidePath, ...] = ()


@dataclass(frozen=True)
class DecoderAnatomy:
    """The residual stream of a decoder.

    Attributes:
        streams: one; for a merged decoder one per branch of its `If`, all with the same layers.
        width: hidden size `d`.
        certainty: `confirmed` (the config's layer count agrees) or `structural` (no config was at hand).
        nodes: number of examined nodes.
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
    def side_paths(self) -> tuple[SidePath, ...]:
        """Values that enter layers beside the (first body's) stream."""
        return self.streams[0].side_paths

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
            "side_paths": [path.to_json() for path in self.side_paths],
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
        return [_stream("", flow, sink, declared, flow.graph)]
    branches = branches_on_path(flow, _vertex(flow, sink))
    if not branches:
        raise AnatomyNotFound(reason_for_nothing(flow, any(True for _ in _sources(flow)), declared))
    found = []
    for body, output in branches:
        try:
            found.append(_stream(body.name, Flow(body.graph, flow), output, declared, flow.graph))
        except AnatomyNotFound as error:
            raise AnatomyNotFound(f"{body.name} of the If {body.owner and body.owner.name!r}: {error}") from None
    shapes = {(len(stream.sites), width) for stream, width in found}
    if len(shapes) > 1:
        sizes = ", ".join(f"{stream.body} {len(stream.sites)} layers of width {width}" for stream, width in found)
        raise AnatomyNotFound(
            f"the branches of the If disagree ({sizes}); a merged decoder holds the same layers in each, export it again"
        )
    return found


def _stream(
    body: str, flow: Flow, sink: ir.Value, declared: LayerCount | None, top: ir.Graph
) -> tuple[ResidualStream, int]:
    end = _vertex(flow, sink)
    paths: tuple[SidePath, ...] = ()
    try:
        chain, source = _best_chain(flow, end, declared)
        sites = _sites(chain, flow, source, body, declared)
    except AnatomyNotFound as refusal:
        beside = stream_by_spine(flow, top, list(_sources(flow)), end, declared)
        if beside is None:
            raise refusal
        source = beside.source
        sites = _sites(beside.chain, beside.flow, source, body, declared)
        paths = beside.harmless_paths()
    require_open_length(flow, source, end)
    return ResidualStream(body, source.name, sink.name or "", sites, paths), stream_width(flow.graph, source, sites)


def _best_chain(flow: Flow, sink: Vertex, declared: LayerCount | None) -> tuple[Chain, Vertex]:
    """The dominator chain that shows most layers, and its source."""
    best: tuple[Chain, Vertex] | None = None
    most = (0, 0)
    sources = list(_sources(flow))
    if len(sources) * len(flow.vertices) > _MOST_LOOKED_AT:  # each is followed through the whole graph
        raise AnatomyNotFound(
            f"{len(sources)} values could be where the stream begins, among {len(flow.vertices)}; is this a decoder?"
        )
    for source in sources:
        chain = Chain(flow, source, sink)
        # The state of a convolution is a rank-3 input too, and reaches as many layers. But it enters the first sum from
        # the branch alone, where the stream's source enters from both sides: one join more.
        if len(chain.gaps()) < max(most[0], 1):
            continue
        found = len(chain.gaps()), chain.join_count()
        if found > most:
            best, most = (chain, source), found
    if best is None:
        raise AnatomyNotFound(reason_for_nothing(flow, any(True for _ in _sources(flow)), declared))
    chain, source = best
    _require_one_stream(flow, chain.gaps(), source, sink, declared)
    return best


def _sites(
    chain: Chain, flow: Flow, source: Vertex, body: str, declared: LayerCount | None
) -> tuple[ResidualSite, ...]:
    """One site per layer, as many as the config declares."""
    sites = tuple(residual_site(flow, index, layer, source, body) for index, layer in enumerate(chain.layers(declared)))
    if declared is not None and len(sites) != declared.count:
        raise AnatomyNotFound(
            f"the config declares {declared.count} layers, the graph's residual stream shows {len(sites)} "
            f"({sites[0].value or sites[0].anchor} to {sites[-1].value or sites[-1].anchor}{chain.kinds()}); "
            f"{_missing_layers(declared, len(sites))}"
        )
    return sites


def _missing_layers(declared: LayerCount, found: int) -> str:
    """Advice for a layer count that differs from the config's."""
    cross = declared.cross_attention
    if cross and found == declared.count - len(cross):
        return (
            f"the layers with cross attention ({spelled(cross)}) were left out of it, so its layers are not numbered as the "
            "config's are; export the decoder with cross_attention_states among its inputs"
        )
    return "check that config.json belongs to this graph, and that no layer was left out of it"


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
        if node is None or node.op_type not in {"Cast", "Identity", "Clip", *RESHAPES}:
            return None
        index = node.inputs[0]
    return index


def _is_flat(rows: ir.Value | None) -> bool:
    """Whether a lookup of reshaped tokens gives `[tokens, width]`, which no longer separates the rows of a batch."""
    index = rows.producer().inputs[1] if rows is not None and rows.producer() is not None else None  # type: ignore
    node = index.producer() if index is not None else None
    reshaped = node is not None and node.op_type in RESHAPES
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
        f"no rank-2 or rank-3 float output (logits or last_hidden_state) among {names_of(graph.outputs)}; is it a decoder?"
    )


def _vertex(flow: Flow, value: ir.Value) -> Vertex:
    vertex = flow.vertex(value)
    if vertex is None:
        raise AnatomyNotFound(f"output {value.name!r} does not depend on the graph's inputs; is it a decoder?")
    return vertex


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
                wanted = f" of the config's {declared.count}" if declared is not None else ""
                raise AnatomyNotFound(
                    f"the stream splits: {len(inside)} attention nodes follow one another inside layer {layer} without "
                    f"a sum that all paths pass (best partial match: {len(layers)} layers{wanted}): {past_sums(declared)}; "
                    "such decoders cannot be guarded"
                )
