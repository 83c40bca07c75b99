"""State shared by the guarded layers of one subgraph during the rewrite."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import onnx_ir as ir

from .lowerings.table import Lowering
from .lowerings.task import Held, SharedGate, Written
from .node_builder import NodeBuilder
from .plan import GuardPlan, SitePlan
from .subgraphs import DecoderSubgraph


@dataclass
class SubgraphEdit:
    """State shared by the sites of one body during the rewrite."""

    model: ir.Model
    body: DecoderSubgraph
    plan: GuardPlan
    lowering: Lowering
    given: dict[str, ir.Value] = field(default_factory=dict)
    ends: ir.Value | None = None  # tokens to read: (row, position) of each, or for calls `whole` the selection of them
    text_ends: ir.Value | None = None
    step_tokens: str = ""
    offset: ir.Value | None = None
    held: dict[int, Held] = field(default_factory=dict)  # by layer
    supervisors: dict[int, ir.Value] = field(default_factory=dict)  # by layer, [batch, 1, m]
    numbers: dict[int, tuple[ir.Value, ...]] = field(default_factory=dict)  # `Task.numbers`, by layer
    aims: dict[int, tuple[ir.Value, ...]] = field(default_factory=dict)  # `Task.aims`, by layer
    shared_gates: dict[int, SharedGate] = field(default_factory=dict)  # by layer
    places: ir.Value | None = None  # tokens to edit, [batch, sequence, 1] bool
    selections: dict[str, ir.Value] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    initializers: list[str] = field(default_factory=list)
    guard_outputs: dict[str, list[Written]] = field(default_factory=lambda: defaultdict(list))

    @property
    def graph(self) -> ir.Graph:
        return self.body.graph

    @property
    def sites(self) -> tuple[SitePlan, ...]:
        return tuple(site for site in self.plan.sites if site.site.body == self.body.name)

    def builder(self, scope: str, properties: dict[str, str] | None = None) -> NodeBuilder:
        return NodeBuilder(self.graph, scope, properties, home=self.model.graph, path=self.body.path)
