"""Proves a guarded graph without running it: signature, counts, dominators, unchanged weights.

The strongest of these is domination: the guard's output must lie on EVERY path from the stream's source to its sink, or
some path avoids the guard. Each check counts what it compared, and an empty comparison is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ..anatomy import DecoderAnatomy, ResidualStream, find_sink
from ..avoidance import Barrier, Surroundings
from ..dataflow import Flow
from ..inline_weights import InFile
from ..node_builder import PREFIX
from ..plan import GuardPlan
from ..rewrite import GuardedSite, GuardReport
from ..roles import input_roles
from ..runtime_controls import is_default
from ..side_paths import described
from ..site_streams import stream_parts, values_behind, vertex_behind
from ..subgraphs import DecoderSubgraph, find_bodies
from .carried import carrying, without_side_paths
from .leaks import leaking_outputs

# What runtimes read the answer from, by these names.
_ANSWERS = frozenset({"logits", "last_hidden_state"})


@dataclass(frozen=True)
class Check:
    """One comparison of a proof.

    Attributes:
        name: what was checked, a phrase.
        compared: how many things were compared; zero is never ok.
        worst: the largest deviation seen (0 for exact checks).
        limit: the largest deviation allowed.
        ok: whether it holds.
        note: a note for the user, or the failure.
    """

    name: str
    compared: int
    worst: float
    limit: float
    ok: bool
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def exact(name: str, compared: int, wrong: list[str], note: str = "") -> Check:
    """A check that allows no deviation.

    Args:
        name: of the check.
        compared: number of compared things; zero fails.
        wrong: descriptions of the deviations.
        note: shown if nothing deviates.
    """
    said = f"{'; '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}" if wrong else note
    if not compared and not wrong:
        said = "nothing was compared"
    return Check(name, compared, float(len(wrong)), 0.0, compared > 0 and not wrong, said)


def prove_structure(
    source: ir.Model, guarded: ir.Model, anatomy: DecoderAnatomy, plan: GuardPlan, report: GuardReport
) -> tuple[Check, ...]:
    """All static checks of a rewrite.

    Args:
        source: the graph before the rewrite.
        guarded: the graph after it.
        anatomy: of the source.
        plan: the guard's plan.
        report: of the rewrite.
    """
    roles = input_roles(source.graph)  # a genai_config.json may rename the inputs that are fed text
    return (
        signature_unchanged(source, guarded, plan),
        sites_guarded_once(guarded, plan, report),
        guard_dominates(guarded, anatomy, plan, report, [name for name in (roles.tokens, roles.embeds) if name]),
        initializers_untouched(source, guarded),
    )


def signature_unchanged(source: ir.Model, guarded: ir.Model, plan: GuardPlan) -> Check:
    """Inputs and outputs keep names, dtypes, shapes and order; only the opted-in ones are added, at the end."""
    wrong: list[str] = []
    compared = 0
    for what, before, after, added in (
        ("input", source.graph.inputs, guarded.graph.inputs, plan.added_inputs),
        ("output", source.graph.outputs, guarded.graph.outputs, plan.added_outputs),
    ):
        expected = [_signature(value) for value in before]
        found = [_signature(value) for value in after]
        compared += len(expected)
        if found[: len(expected)] != expected:
            wrong.append(f"{what}s differ from the source")
        extra = tuple(value.name for value in list(after)[len(expected) :])
        if extra != added:
            wrong.append(f"added {what}s are {extra}, planned {added}")
    return exact("inputs and outputs unchanged", compared, wrong)


def sites_guarded_once(guarded: ir.Model, plan: GuardPlan, report: GuardReport) -> Check:
    """Every planned layer has exactly the nodes that were reported, and no other node carries the guard's name."""
    names = [node.name or "" for node in guarded.graph.all_nodes() if (node.name or "").startswith(PREFIX)]
    reported = [name for site in report.sites for name in site.nodes] + list(report.shared_nodes)
    wrong = []
    planned = [(site.layer_index, site.site.body) for site in plan.sites]
    guarded_sites = [(site.layer_index, site.body) for site in report.sites]
    if sorted(planned) != sorted(guarded_sites) or len(set(planned)) != len(planned):
        wrong.append(
            f"planned layers {plan.layers}, guarded {report.layers} ({len(guarded_sites)} of {len(planned)} sites)"
        )
    if sorted(names) != sorted(reported) or len(set(names)) != len(names):
        wrong.append(f"{len(names)} guard nodes in the graph, {len(reported)} reported")
    return exact("every planned site guarded exactly once", len(report.sites), wrong, f"{len(names)} nodes")


def guard_dominates(
    guarded: ir.Model, anatomy: DecoderAnatomy, plan: GuardPlan, report: GuardReport, text: Collection[str] = ()
) -> Check:
    """Nothing reaches the output around a guard (`avoidance.py`), and no other output shows a layer's state from before it.

    Args:
        guarded: the graph.
        anatomy, plan, report: of it; `anatomy` as it was before the guard.
        text: names of inputs that are fed text besides the usual ones.
    """
    bodies = {body.name: body for body in find_bodies(guarded, anatomy.bodies)}
    flows = {name: body.flow() for name, body in bodies.items()}
    wrong = [f"body {name!r} is no longer in the graph" for name in anatomy.bodies if name not in bodies]
    for stream in anatomy.streams:
        if stream.body in bodies:
            wrong += _avoiding(bodies[stream.body], flows[stream.body], stream, plan, report)
    if not wrong:
        wrong = _around(guarded.graph, bodies, flows, anatomy, plan, report, text)
    said = "; ".join(described(anatomy.side_paths))
    return exact("no path avoids a guard (dominators)", len(report.sites), wrong, f"besides: {said}" if said else "")


def _avoiding(
    body: DecoderSubgraph, flow: Flow, stream: ResidualStream, plan: GuardPlan, report: GuardReport
) -> list[str]:
    """Faults of the path from the stream's source to its sink in one body, as text.

    Side paths of the anatomy are left out here. What they may carry is judged anew in `_around`.
    """
    values = body.values()
    source, sink = flow.vertex(values.get(stream.source)), flow.vertex(values.get(stream.sink))
    if source is None or sink is None:
        return [f"{stream.source!r} or {stream.sink!r} is no longer in the graph"]
    flow = without_side_paths(flow, values, stream.side_paths)
    on_chain = {vertex.index for vertex in flow.dominator_chain(source, sink)}
    wrong: list[str] = []
    for planned, site in zip(plan.sites, report.sites, strict=True):
        if site.body != body.name:
            continue
        raw, new = _before_and_after(values, site)
        if raw is None or new is None:
            wrong.append(f"layer {site.layer_index}: the guarded value is gone")
            continue
        own = set(site.nodes) | set(report.shared_nodes)
        if any(node.name not in own for node in raw.consumers()) or raw.is_graph_output():
            wrong.append(f"layer {site.layer_index}: {site.raw!r} is read past the guard")
        guard = vertex_behind(flow, planned.site, new)
        if guard is None or guard.index not in on_chain:
            wrong.append(f"layer {site.layer_index}: a path avoids the guard")
    return wrong


def _around(
    graph: ir.Graph,
    bodies: Mapping[str, DecoderSubgraph],
    flows: Mapping[str, Flow],
    anatomy: DecoderAnatomy,
    plan: GuardPlan,
    report: GuardReport,
    text: Collection[str],
) -> list[str]:
    """What gets around the guards of the whole graph, in words; every guard is known to be in its place."""
    values = {name: body.values() for name, body in bodies.items()}
    behind: dict[int, list[ir.Value]] = {}
    raw_sums: dict[int, list[Sequence[ir.Value]]] = {}
    for planned, site in zip(plan.sites, report.sites, strict=True):
        raw, new = _before_and_after(values[site.body], site)
        assert raw is not None and new is not None
        behind.setdefault(site.layer_index, []).extend(values_behind(planned.site, new))
        parts = stream_parts(bodies[site.body].graph, planned.site, raw, new)
        assert parts is not None
        raw_sums.setdefault(site.layer_index, []).append(parts)
    barriers = [Barrier(layer, tuple(found)) for layer, found in sorted(behind.items())]
    sources = [values[stream.body][stream.source] for stream in anatomy.streams]
    wrong: list[str] = []
    for stream in anatomy.streams:
        surroundings = Surroundings(graph, [], [values[stream.body][stream.source]], plan.width, text)
        wrong += carrying(bodies[stream.body], flows[stream.body], stream, report, surroundings)
    if wrong:
        return wrong
    excepted = [
        (values[s.body][path.value], values[s.body][path.into]) for s in anatomy.streams for path in s.side_paths
    ]
    around = Surroundings(graph, barriers, sources, plan.width, text, excepted)
    read = {*_ANSWERS, *(stream.sink for stream in anatomy.streams if not stream.body)}
    sinks = {find_sink(graph), *(value for value in graph.outputs if value.name in read)}
    wrong = [said for sink in graph.outputs if sink in sinks for said in around.avoiding(sink)]
    leaks = leaking_outputs(around, [raw_sums[barrier.layer] for barrier in barriers], plan.added_outputs)
    return wrong + [f"layer {layer}: output {name!r} shows the state from before the guard" for layer, name in leaks]


def _before_and_after(values: Mapping[str, ir.Value], site: GuardedSite) -> tuple[ir.Value | None, ir.Value | None]:
    return values.get(site.raw) or values.get(f"{site.raw}/unguarded"), values.get(site.guarded)


def initializers_untouched(source: ir.Model, guarded: ir.Model) -> Check:
    """Every initializer of the source is in the guarded graph, the same bytes; only `vlmguard/` ones are new, and defaults of
    knobs that leave the guard as it was calibrated."""
    before, after = source.graph.initializers, guarded.graph.initializers
    wrong = [name for name in before if name not in after or not same_tensor(before[name], after[name])]
    new = {name: value for name, value in after.items() if name not in before}
    wrong += [name for name, value in new.items() if not (name.startswith(PREFIX) or is_default(value))]
    return exact("untouched initializers identical", len(before), wrong)


def same_tensor(a: ir.Value, b: ir.Value) -> bool:
    """Whether two initializers are the same to the bit, or the same piece of the same file."""
    x, y = a.const_value, b.const_value
    if x is None or y is None or x.dtype != y.dtype or tuple(x.shape) != tuple(y.shape):
        return False
    if isinstance(x, ir.ExternalTensor) and isinstance(y, ir.ExternalTensor):
        # Never read gigabytes to learn that a reference is the same reference; the file's digest covers the bytes.
        return (x.location, x.offset, x.length) == (y.location, y.offset, y.length)
    if isinstance(x, InFile) and isinstance(y, InFile):
        return x.same_bytes(y)
    return x is y or x.tobytes() == y.tobytes()


def _signature(value: ir.Value) -> tuple[str | None, str, str]:
    return value.name, str(value.dtype), str(value.shape)


def same_graph(name: str, expected: ir.Model, found: ir.Model) -> Check:
    """Node for node (operator, inputs, outputs, attributes, order), initializer for initializer (bits), signature, declared
    types and shapes, and what else a runtime may go by (operator sets, metadata, functions)."""
    wrong = [f"{what} differ" for what, of in _HEADERS.items() if of(expected) != of(found)]
    left, right = list(expected.graph), list(found.graph)
    wrong += _unfounded(expected, found)
    if len(left) != len(right):
        wrong.append(f"{len(right)} nodes, expected {len(left)}")
    for a, b in zip(left, right, strict=False):
        if _node(a) != _node(b):
            wrong.append(f"node {b.name or b.outputs[0].name!r} differs")
    before, after = expected.graph.initializers, found.graph.initializers
    wrong += [f"initializer {key!r} differs" for key in before if key not in after]
    wrong += [f"initializer {key!r} was added" for key in after if key not in before]
    wrong += [f"initializer {k!r} differs" for k in before if k in after and not same_tensor(before[k], after[k])]
    for a, b in ((expected.graph.inputs, found.graph.inputs), (expected.graph.outputs, found.graph.outputs)):
        if [_signature(value) for value in a] != [_signature(value) for value in b]:
            wrong.append("inputs or outputs differ")
    return exact(name, len(left) + len(before), wrong)


_HEADERS: Mapping[str, Callable[[ir.Model], object]] = {
    "operator sets": lambda model: model.opset_imports,
    "metadata": lambda model: (dict(model.metadata_props), dict(model.graph.metadata_props)),
    "functions": lambda model: sorted(map(str, model.functions)),
}


def _unfounded(expected: ir.Model, found: ir.Model) -> list[str]:
    """Values, those of bodies too, of which the found graph declares what the expected one does not."""
    pairs = zip(expected.graph.all_nodes(), found.graph.all_nodes(), strict=False)
    values = (both for a, b in pairs for both in zip(a.outputs, b.outputs, strict=False))
    return [f"{y.name!r} is declared otherwise" for x, y in values if not _is_founded(_claim(x), _claim(y))]


_Claim = tuple[ir.DataType | None, tuple[int | None, ...] | None]


def _claim(value: ir.Value) -> _Claim:
    """A value's declared type, rank and fixed sizes, which a runtime may use; names of open sizes are ignored."""
    shape = None if value.shape is None else tuple(size if isinstance(size, int) else None for size in value.shape)
    return value.dtype, shape


def _is_founded(known: _Claim, claimed: _Claim) -> bool:
    """Whether nothing is claimed that is not known; to claim less is no harm."""
    (dtype, sizes), (its_dtype, its_sizes) = known, claimed
    if its_dtype not in (None, dtype):
        return False
    if its_sizes is None:
        return True
    if sizes is None or len(sizes) != len(its_sizes):
        return False
    return all(size is None or size == right for right, size in zip(sizes, its_sizes, strict=True))


def _node(node: ir.Node) -> tuple[object, ...]:
    """A node in a comparable form."""
    attributes = tuple((key, attribute_bits(value)) for key, value in sorted(node.attributes.items()))
    inputs = tuple(value.name if value is not None else None for value in node.inputs)
    return node.op_type, node.domain, node.overload, inputs, tuple(value.name for value in node.outputs), attributes


def attribute_bits(attribute: ir.Attr) -> object:
    """What an attribute holds, to the bit: printed, a tensor is rounded, and cut short from 1000 numbers on."""
    if attribute.is_ref():
        return "reference", attribute.ref_attr_name
    if attribute.type == ir.AttributeType.TENSOR:
        return _bits(attribute.as_tensor())
    if attribute.type == ir.AttributeType.TENSORS:
        return tuple(_bits(tensor) for tensor in attribute.as_tensors())
    if attribute.type == ir.AttributeType.GRAPH:
        return _body(attribute.as_graph())
    if attribute.type == ir.AttributeType.GRAPHS:
        return tuple(_body(graph) for graph in attribute.as_graphs())
    return str(attribute.type), str(attribute.value)


def _body(graph: ir.Graph) -> tuple[object, ...]:
    names = tuple(tuple(value.name for value in values) for values in (graph.inputs, graph.outputs))
    tensors = {name: value.const_value for name, value in graph.initializers.items()}
    weights = tuple((name, None if tensor is None else _bits(tensor)) for name, tensor in sorted(tensors.items()))
    return names, tuple(_node(node) for node in graph), weights


def _bits(tensor: ir.TensorProtocol) -> tuple[object, ...]:
    if isinstance(tensor, ir.ExternalTensor):  # a reference, as in `same_tensor`
        return tensor.location, tensor.offset, tensor.length
    return tensor.dtype, tuple(tensor.shape), tensor.tobytes()
