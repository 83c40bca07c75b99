"""The rewrite: put the planned guard into the decoder's graph, and count what was done.

A plain Add: `h = Add(residual, branch)`; every reader of `h` reads the guarded `h'` instead. A fused
`Skip*LayerNormalization` computes the sum and its norm in one node, so `h` cannot be replaced behind it; there the BRANCH
is corrected: `t = residual + branch`, `delta = w V`, and the node gets `(residual, branch + delta)`. The fusion survives,
and with a closed gate its inputs are the old ones bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from .dataflow import skip_norm_bias
from .errors import GuardIncomplete
from .guard_ports import (
    add_output,
    declare_inputs,
    keep_outputs,
    names_of,
    port_shapes,
    record_guard,
    supervisor_numbers,
)
from .lowerings.fold import FOLD, fold
from .lowerings.table import lowering_named
from .lowerings.task import Task, Written, WrittenWhole
from .node_builder import NodeBuilder
from .plan import COORDINATES_OUTPUT, GuardPlan, SitePlan
from .planner import require_unguarded
from .shared_parts import write_shared_parts
from .sites import find_node
from .subgraph_edit import SubgraphEdit
from .subgraphs import find_bodies


@dataclass(frozen=True)
class GuardedSite:
    """The changes at one layer.

    Attributes:
        layer_index: 0-based.
        kind: as in `ResidualSite`.
        raw: name of the value before the guard: the sum or what stands behind it, or the branch of a skip-norm.
        guarded: name of the value after it.
        nodes: names of the nodes that were put in.
        readers: how many uses now read the guarded value.
        body: the body of the graph that it lies in, as in `ResidualSite`.
        handles: names of the values by which a proof opens, closes or reads the guard.
    """

    layer_index: int
    kind: str
    raw: str
    guarded: str
    nodes: tuple[str, ...]
    readers: int
    body: str = ""
    handles: GuardHandles = field(default_factory=lambda: GuardHandles())

    def to_json(self) -> dict[str, Any]:
        gate = {"gate": self.handles.gate} if self.handles.gate else {}
        return {
            "layer": self.layer_index,
            "body": self.body,
            "kind": self.kind,
            "raw": self.raw,
            "guarded": self.guarded,
            **gate,
            "nodes": len(self.nodes),
        }


@dataclass(frozen=True)
class GuardHandles:
    """Names of values of one guard in its graph, as the lowering handed them out.

    Attributes:
        gate: the value that is 1 where the gate is open, else 0; "" without a gate.
        threshold: the initializer that the gate's score is compared with; "" without a gate.
        weights: initializers with zeros in whose place nothing is edited.
        matrix: the initializer with the identity in whose place nothing is edited; "" if there is none.
    """

    gate: str = ""
    threshold: str = ""
    weights: tuple[str, ...] = ()
    matrix: str = ""

    @classmethod
    def of(cls, written: Written | WrittenWhole) -> GuardHandles:
        """The handles of what a lowering wrote."""
        if isinstance(written, WrittenWhole):
            return cls(matrix=written.matrix.name or "")
        weights = tuple(value.name or "" for value in written.weights)
        if written.gate is None:
            return cls(weights=weights)
        return cls(written.gate.opened.name or "", written.gate.threshold.name or "", weights)


@dataclass(frozen=True)
class GuardReport:
    """The actual changes, counted.

    Attributes:
        sites: one per guarded layer and body.
        shared_nodes: names of the nodes that serve all sites.
        initializers: names of the guard's numbers.
        added_inputs, added_outputs: of the graph.
        step_tokens: name of the initializer up to whose number of tokens a call counts as a decode step (paired rows), or "".
    """

    sites: tuple[GuardedSite, ...]
    shared_nodes: tuple[str, ...]
    initializers: tuple[str, ...]
    added_inputs: tuple[str, ...] = ()
    added_outputs: tuple[str, ...] = ()
    step_tokens: str = ""

    @property
    def layers(self) -> tuple[int, ...]:
        """The guarded layers, ascending."""
        return tuple(sorted({site.layer_index for site in self.sites}))

    @property
    def node_count(self) -> int:
        return len(self.shared_nodes) + sum(len(site.nodes) for site in self.sites)

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "nodes": self.node_count,
            "initializers": len(self.initializers),
            "added_inputs": list(self.added_inputs),
            "added_outputs": list(self.added_outputs),
            "sites": [site.to_json() for site in self.sites],
        }


def rewrite(model: ir.Model, plan: GuardPlan) -> GuardReport:
    """Put the guard in; `model` is changed in place.

    Raises:
        GuardIncomplete: a planned site is not there, or not every planned layer was guarded.
    """
    require_applicable(model, plan)
    if not plan.sites:
        raise GuardIncomplete("the plan names no layer to guard; nothing was written")
    if plan.lowering == FOLD:
        return _fold(model, plan)
    lowering = lowering_named(plan.lowering)
    assert lowering is not None, plan.lowering
    shapes = port_shapes(model, plan)  # while the graph is as the exporter wrote it
    declared = declare_inputs(model, plan, shapes)
    edits = [SubgraphEdit(model, body, plan, lowering, declared) for body in find_bodies(model, plan.bodies)]
    guarded_sites = {(site.layer_index, site.body): site for edit in edits for site in _guard_body(edit)}
    for output in plan.added_outputs:
        add_output(model, edits, output, shapes[output])
    record_guard(model, plan)
    planned = [(site.layer_index, site.site.body) for site in plan.sites]
    if sorted(guarded_sites) != sorted(planned):
        raise GuardIncomplete(f"planned layers {planned}, guarded {list(guarded_sites)}; nothing was written")
    return GuardReport(
        tuple(guarded_sites[key] for key in planned),
        tuple(name for edit in edits for name in edit.shared),
        tuple(dict.fromkeys((*plan.knobs, *(name for edit in edits for name in edit.initializers)))),
        plan.added_inputs,
        plan.added_outputs,
        next((edit.step_tokens for edit in edits if edit.step_tokens), ""),
    )


def _fold(model: ir.Model, plan: GuardPlan) -> GuardReport:
    """No node: the weights that write the stream are replaced."""
    last = plan.layers[-1]
    ends = [planned.site for planned in plan.sites if planned.layer_index == last]
    folded = fold(model, ends, plan.sites[0].guard.ssd)
    record_guard(model, plan)
    sites = tuple(
        GuardedSite(p.layer_index, p.site.kind, p.site.value, p.site.value, (), 0, p.site.body) for p in plan.sites
    )
    return GuardReport(sites, (), folded)


def _guard_body(edit: SubgraphEdit) -> list[GuardedSite]:
    write_shared_parts(edit)
    return [_guard_site(edit, site) for site in edit.sites]


def require_applicable(model: ir.Model, plan: GuardPlan) -> None:
    """Check that every planned site exists with the planned summands, before anything changes."""
    require_unguarded(model)
    graphs = {body.name: body.graph for body in find_bodies(model, plan.bodies)}
    for planned in plan.sites:
        site = planned.site
        node = find_node(graphs[site.body], site.anchor) if site.body in graphs else None
        if node is None:
            raise GuardIncomplete(
                f"layer {site.layer_index}: no node makes {site.anchor!r}; was the plan made for this graph?"
            )
        summands = {value.name for value in node.inputs[:2] if value is not None}
        if summands != {name for name in (site.residual, site.branch) if name}:
            raise GuardIncomplete(
                f"layer {site.layer_index}: {site.anchor!r} sums {sorted(map(str, summands))}, the plan has "
                f"{sorted((site.residual, site.branch))}; was the plan made for this graph?"
            )


def _guard_site(edit: SubgraphEdit, planned: SitePlan) -> GuardedSite:
    node = find_node(edit.graph, planned.site.anchor)
    assert node is not None
    properties = {
        "vlmguard.layer": str(planned.layer_index),
        "vlmguard.mode": edit.plan.mode,
        "vlmguard.positions": edit.plan.positions,
        "vlmguard.lowering": edit.plan.lowering,
    }
    builder = edit.builder(f"layer_{planned.layer_index}", properties)
    guard = _guard_fused if planned.site.is_fused else _guard_value
    site = guard(edit, planned, node, builder)
    edit.initializers += builder.initializers
    return site


def _guard_value(edit: SubgraphEdit, planned: SitePlan, node: ir.Node, builder: NodeBuilder) -> GuardedSite:
    """Every reader of the sum, or of what stands behind it, reads the guarded one."""
    raw = node.outputs[0]
    new, written = edit.lowering.guarded(builder, raw, _task(edit, planned, builder))
    keep_outputs(edit, written)
    new.type, new.shape = raw.type, raw.shape
    readers = _redirect(edit.graph, raw, new, builder)
    builder.place_after(node)
    names = raw.name or "", new.name or "", names_of(builder)
    handles = GuardHandles.of(written)
    return GuardedSite(planned.layer_index, planned.site.kind, *names, readers, edit.body.name, handles)


def _guard_fused(edit: SubgraphEdit, planned: SitePlan, node: ir.Node, builder: NodeBuilder) -> GuardedSite:
    """The fused node gets a corrected branch; the residual stays as it is."""
    at = next(i for i, value in enumerate(node.inputs[:2]) if value is not None and value.name == planned.site.branch)
    branch, residual = node.inputs[at], node.inputs[1 - at]
    assert branch is not None and residual is not None
    bias = skip_norm_bias(node)
    total = _sum(builder, residual, branch, bias)
    written = edit.lowering.correction(builder, total, _task(edit, planned, builder))
    new = builder.op("guarded", "Add", [branch, written.delta], like=branch)
    keep_outputs(edit, written)
    node.replace_input_with(at, new)
    builder.place_before(node)
    names = branch.name or "", new.name or "", names_of(builder)
    return GuardedSite(planned.layer_index, planned.site.kind, *names, 1, edit.body.name, GuardHandles.of(written))


def _task(edit: SubgraphEdit, planned: SitePlan, builder: NodeBuilder) -> Task:
    mode, dtype = edit.plan.mode, planned.site.dtype
    # Every token is read, and the selection closes the gate or is multiplied with `w`: on one token, where time counts, that
    # costs less than gathering it first, and a prefill's MatMuls hide it (benchmarks/spellings.py).
    selected = edit.selections.get(edit.lowering.selects(mode, dtype))
    layer = planned.layer_index
    return Task(
        mode,
        planned.guard,
        dtype,
        supervisor=edit.supervisors.get(layer),
        selected=selected,
        offset=edit.offset,
        held=edit.held.get(layer),
        text_ends=edit.text_ends,
        numbers=edit.numbers.get(layer) or supervisor_numbers(edit, planned),
        aims=edit.aims.get(layer, ()),
        outputs_coordinates=COORDINATES_OUTPUT in edit.plan.added_outputs,
        shared=edit.shared_gates.get(layer),
    )


def _sum(builder: NodeBuilder, residual: ir.Value, branch: ir.Value, bias: ir.Value | None) -> ir.Value:
    total = builder.op("sum", "Add", [residual, branch], like=residual)
    return total if bias is None else builder.op("sum_bias", "Add", [total, bias], like=residual)


def _redirect(graph: ir.Graph, raw: ir.Value, new: ir.Value, builder: NodeBuilder) -> int:
    """Every use of `raw` outside the guard becomes a use of `new`; a graph output keeps its name."""
    own, readers = set(builder.nodes), 0
    for node, index in tuple(raw.uses()):
        if node not in own:
            node.replace_input_with(index, new)
            readers += 1
    for index, output in enumerate(graph.outputs):
        if output is raw:
            name, raw.name = raw.name, f"{raw.name}/unguarded"
            graph.outputs[index] = new
            new.name = name
            readers += 1
    return readers
