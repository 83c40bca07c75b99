"""A guard cut out of its graph: the nodes of some sites as a small model that runs without the decoder's weights.

The cut holds exactly the nodes and numbers of the file that it was loaded from. It ends where the guard ends: at the
stream (the raw sum, or the summands of a fused skip-norm), the inputs that show which token of a call is last, and the
guard's own inputs. Anything else that a guard's node reads is reported as `foreign`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from ..call_inputs import CallInputs, call_inputs
from ..dtypes import IR_DTYPES
from ..node_builder import PREFIX
from ..plan import GuardPlan, SitePlan
from ..rewrite import GuardedSite, GuardReport
from ..site_streams import stream_parts
from ..sites import find_node
from ..subgraphs import DecoderSubgraph, find_bodies


@dataclass(frozen=True)
class CutSite:
    """One guarded layer in a cut.

    Attributes:
        planned, done: the plan and the report of this site.
        stream: name of the input that the guard replaces: the raw sum, or the branch of a skip-norm.
        guarded: name of the output behind the guard.
        residual, bias: names of the other summands of a skip-norm, or "".
    """

    planned: SitePlan
    done: GuardedSite
    stream: str
    guarded: str
    residual: str = ""
    bias: str = ""


@dataclass(frozen=True)
class Cut:
    """Some sites of one body as a model of their own.

    Attributes:
        model: the small model; `None` where the body is gone.
        sites: what is in it.
        outputs: each of the guard's own outputs -> its name here.
        calls: those of the graph's inputs that show where the tokens of a call lie; the cut reads some of them.
        foreign: values of the decoder that its nodes read although no guard may, or that are missing, in words.
    """

    model: ir.Model | None
    sites: tuple[CutSite, ...]
    outputs: dict[str, str]
    calls: CallInputs
    foreign: tuple[str, ...]

    @property
    def inputs(self) -> dict[str, ir.Value]:
        return {} if self.model is None else {value.name or "": value for value in self.model.graph.inputs}


def cut_out(
    model: ir.Model, plan: GuardPlan, report: GuardReport, body: str, layers: Sequence[int], outputs: bool
) -> Cut:
    """Cut the guards of some layers out of one body.

    Args:
        model: the guarded graph; not changed.
        plan: the guard's plan.
        report: of the rewrite.
        body: name of the body.
        layers: guarded layers to cut out.
        outputs: include the guard's own outputs (coordinates, scores, gates); `layers` must then be all guarded layers.
    """
    bodies = find_bodies(model, [body])
    sites = [
        (planned, guarded_site)
        for planned, guarded_site in zip(plan.sites, report.sites, strict=True)
        if guarded_site.body == body and guarded_site.layer_index in layers
    ]
    if not bodies:
        return Cut(None, (), {}, CallInputs(), (f"body {body!r} is no longer in the graph",))
    shears = _Shears(model, bodies[0], plan, report)
    cut = [site for planned, guarded_site in sites if (site := shears.site(planned, guarded_site)) is not None]
    if outputs:
        for name in plan.added_outputs:
            shears.own_output(name)
    return shears.finish(tuple(cut))


@dataclass
class _Shears:
    """Collects what belongs to a cut, from its outputs backwards."""

    model: ir.Model
    body: DecoderSubgraph
    plan: GuardPlan
    report: GuardReport
    stops: dict[ir.Value, str] = field(default_factory=dict)  # where the guard ends -> dtype of the stream there
    wanted: list[tuple[ir.Value, ir.DataType]] = field(default_factory=list)
    outputs: dict[str, str] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values = self.body.values()
        self.calls = call_inputs(self.model.graph) if self.plan.mask else CallInputs()
        first = next(p for p in self.plan.sites if p.site.body == self.body.name)
        node = find_node(self.body.graph, first.site.anchor)
        for value in (
            node.inputs[:2] if node is not None else ()
        ):  # the shared nodes read the sizes of the first residual
            if value is not None and value.name == first.site.residual:
                self.stops[value] = first.site.dtype

    def site(self, planned: SitePlan, done: GuardedSite) -> CutSite | None:
        dtype, layer = planned.site.dtype, done.layer_index
        raw = self.values.get(done.raw) or self.values.get(f"{done.raw}/unguarded")
        guarded = self.values.get(done.guarded)
        node = find_node(self.body.graph, planned.site.anchor)
        if raw is None or guarded is None or node is None:
            self.foreign.append(f"layer {layer}: its guarded value or its sum is gone")
            return None
        self.stops[raw] = dtype
        self.wanted.append((guarded, IR_DTYPES[dtype]))
        parts = stream_parts(self.body.graph, planned.site, raw, guarded)
        if parts is None:
            self.foreign.append(f"layer {layer}: the fused sum does not read the guarded branch")
            return None
        self.stops |= dict.fromkeys(parts, dtype)
        return CutSite(planned, done, raw.name or "", guarded.name or "", *(part.name or "" for part in parts[1:]))

    def own_output(self, name: str) -> None:
        """An output of the guard, as a branch computes it where the body is one."""
        value = next((output for output in self.model.graph.outputs if output.name == name), None)
        owner = self.body.owner
        if value is not None and owner is not None:
            index = value.index() if value.producer() is owner else None
            within = self.body.graph.outputs
            value = within[index] if index is not None and index < len(within) else None
        if value is None:
            self.foreign.append(f"output {name!r} is gone, or comes from elsewhere")
            return
        self.outputs[name] = value.name or ""
        self.wanted.append((value, ir.DataType.FLOAT))

    def finish(self, sites: tuple[CutSite, ...]) -> Cut:
        nodes, ends = self._reach()
        known = {value: self._constant(value) if self._is_constant(value) else self._input(value) for value in ends}
        inputs = [value for end, value in known.items() if not self._is_constant(end)]
        numbers = [value for value in known.values() if value.const_value is not None]
        copies = self._copies([node for node in self.body.graph if node in nodes], known)
        outputs = []
        for value, dtype in self.wanted:
            if value.producer() not in nodes:
                self.foreign.append(f"{value.name!r} is not made by the guard's nodes")
                continue
            known[value].type = ir.TensorType(dtype)
            outputs.append(known[value])
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=copies,
            initializers=numbers,
            opset_imports=dict(self.model.graph.opset_imports),
            name="guard",
        )
        made = ir.Model(graph, ir_version=self.model.ir_version or 8)
        return Cut(made, sites, dict(self.outputs), self.calls, tuple(dict.fromkeys(self.foreign)))

    def _copies(self, nodes: Sequence[ir.Node], known: dict[ir.Value, ir.Value]) -> list[ir.Node]:
        """The nodes in their order, on the values of the small model; `known` learns what they make."""
        made = []
        for node in nodes:
            late = [value.name for value in node.inputs if value is not None and value not in known]
            if late:
                self.foreign.append(f"node {node.name!r} reads {late[0]!r} before it is made")
                known |= {value: ir.Value(name=value.name) for value in node.inputs if value and value not in known}
            inputs = [None if value is None else known[value] for value in node.inputs]
            outputs = [ir.Value(name=value.name) for value in node.outputs]
            attributes = list(node.attributes.values())
            made.append(
                ir.Node(
                    node.domain,
                    node.op_type,
                    inputs,
                    attributes,
                    overload=node.overload,
                    outputs=outputs,
                    name=node.name,
                )
            )
            known |= dict(zip(node.outputs, outputs, strict=True))
        return made

    def _reach(self) -> tuple[set[ir.Node], list[ir.Value]]:
        """Nodes of the guard behind the outputs, and the values at which they end."""
        own = {*self.report.shared_nodes, *(name for site in self.report.sites for name in site.nodes)}
        nodes: set[ir.Node] = set()
        ends: dict[ir.Value, None] = {}
        waiting = [value for value, _ in self.wanted]
        while waiting:
            value = waiting.pop()
            node = value.producer()
            if value in self.stops or node is None or node.graph is not self.body.graph or node.name not in own:
                ends[value] = None
            elif node not in nodes:
                nodes.add(node)
                waiting += [each for each in node.inputs if each is not None]
        return nodes, list(ends)

    @property
    def _expected(self) -> set[str]:
        """Names of the graph's inputs that a guard may read."""
        cache = None if self.calls.cache is None else self.calls.cache.value
        known = (self.calls.mask, self.calls.positions, cache)
        return {*self.plan.added_inputs, *(value.name or "" for value in known if value is not None)}

    def _is_constant(self, value: ir.Value) -> bool:
        return value.const_value is not None and value not in self.stops and (value.name or "").startswith(PREFIX)

    def _constant(self, value: ir.Value) -> ir.Value:
        """The same numbers, inside the small model wherever they lie."""
        assert value.const_value is not None
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            tensor = ir.Tensor(tensor.numpy().copy(), name=value.name, dtype=tensor.dtype)
        shape = ir.Shape(tensor.numpy().shape)
        return ir.Value(name=value.name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)

    def _input(self, value: ir.Value) -> ir.Value:
        """An input of the small model; a knob keeps its default."""
        name, of_graph = value.name or "", value.is_graph_input()
        dtype = IR_DTYPES[self.stops[value]] if value in self.stops else value.dtype or ir.DataType.FLOAT
        if value not in self.stops and not (of_graph and name in self._expected):
            self.foreign.append(f"the guard reads {name!r}, which is neither its stream nor one of its inputs")
        default = None
        if name in self.plan.knobs and of_graph:
            if value.const_value is None:
                self.foreign.append(f"the knob {name!r} has no default")
            else:
                default = ir.Tensor(value.const_value.numpy(), name=name)
        shape = value.shape if of_graph else None
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=default)
