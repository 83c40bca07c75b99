"""The value graph: what makes an edge, and the dominator chain against brute force."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir
import pytest
from hand_graphs import text_model
from hypothesis import event, given, settings
from hypothesis import strategies as st

from vlmguard.graphs.dataflow import CONTRIB_DOMAIN, Flow, captured, reads, skip_norm_bias
from vlmguard.graphs.node_builder import NodeBuilder

# ------------------------------------------------------------------------------------------------ the chain, brute force

Edges = dict[str, set[str]]
"""Every vertex by name -> the vertices that it is computed from."""


@dataclass
class RandomGraph:
    """An ONNX graph, and beside it the value graph that it should have, kept by hand."""

    values: list[ir.Value] = field(default_factory=list)
    nodes: list[ir.Node] = field(default_factory=list)
    edges: Edges = field(default_factory=dict)

    def pick(self, number: int) -> ir.Value:
        return self.values[number % len(self.values)]

    def add(self, op_type: str, inputs: list[ir.Value], outputs: list[str], domain: str = "test", **attributes) -> None:
        made = [ir.Value(name=name) for name in outputs]
        self.nodes.append(ir.node(op_type, inputs, attributes, domain=domain, outputs=made))
        self.values += [value for value in made if value.name]

    def connect(self, name: str, sources: list[ir.Value]) -> None:
        """An edge from every source that is activation data; nothing at all if none is."""
        dynamic = {str(value.name) for value in sources if value.name in self.edges}
        if dynamic:
            self.edges[name] = dynamic


def plain(graph: RandomGraph, name: str, a: ir.Value, b: ir.Value) -> None:
    graph.add("Mix", [a, b], [name])
    graph.connect(name, [a, b])


def two_outputs(graph: RandomGraph, name: str, a: ir.Value, b: ir.Value) -> None:
    graph.add("Split", [a, b], [name, f"{name}b"])
    graph.connect(name, [a, b])
    graph.connect(f"{name}b", [a, b])


def shape(graph: RandomGraph, name: str, a: ir.Value, b: ir.Value) -> None:
    graph.add("Shape", [a], [name], domain="")


def fused_sum(graph: RandomGraph, name: str, a: ir.Value, b: ir.Value) -> None:
    graph.add("SkipSimplifiedLayerNormalization", [a, b], [name, "", "", f"{name}s"], domain=CONTRIB_DOMAIN)
    graph.connect(f"{name}s", [a, b])
    if f"{name}s" in graph.edges:
        graph.edges[name] = {f"{name}s"}


def fused_hidden_sum(graph: RandomGraph, name: str, a: ir.Value, b: ir.Value) -> None:
    graph.add("SkipLayerNormalization", [a, b], [name], domain=CONTRIB_DOMAIN)
    graph.connect(f"sum of {name}", [a, b])
    if f"sum of {name}" in graph.edges:
        graph.edges[name] = {f"sum of {name}"}


def branching(graph: RandomGraph, name: str, a: ir.Value, b: ir.Value) -> None:
    """An If with a constant condition: all that flows is what its bodies capture."""
    bodies = {}
    for branch, value in (("then_branch", a), ("else_branch", b)):
        node = ir.node("Identity", [value], outputs=[ir.Value(name=f"{name} {branch}")])
        bodies[branch] = ir.Graph([], node.outputs, nodes=[node], name=branch)
    graph.add("If", [graph.values[0]], [name], domain="", **bodies)
    graph.connect(name, [a, b])


KINDS = (plain, two_outputs, shape, fused_sum, fused_hidden_sum, branching)


@st.composite
def random_graphs(draw: st.DrawFn) -> tuple[ir.Graph, Edges]:
    graph = RandomGraph()
    constant = ir.Value(name="constant", const_value=ir.tensor([1.0], name="constant"))
    inputs = [ir.Value(name=f"x{number}") for number in range(draw(st.integers(1, 2)))]
    graph.values += [constant, *inputs]
    graph.edges |= {str(value.name): set() for value in inputs}
    steps = draw(
        st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=12)
    )
    for number, (kind, a, b) in enumerate(steps):
        # counted from the latest value: chains that are long, not only wide
        kind(graph, f"n{number}", graph.pick(-1 - a // 5), graph.pick(b))
    outputs = [value for value in graph.values if value.name in graph.edges and value not in inputs][-1:]
    return ir.Graph(inputs, outputs, nodes=graph.nodes, initializers=[constant]), graph.edges


def reaches(edges: Edges, source: str, sink: str, without: str | None = None) -> bool:
    """Whether some path leads from source to sink, once a vertex is taken away."""
    stack, seen = [sink], {sink, without}
    if without in (source, sink):
        return False
    while stack:
        name = stack.pop()
        if name == source:
            return True
        stack += edges[name] - seen
        seen |= edges[name]
    return False


def chain_by_brute_force(edges: Edges, source: str, sink: str) -> set[str]:
    """The vertices without which the sink cannot be reached."""
    if not reaches(edges, source, sink):
        return set()
    return {name for name in edges if not reaches(edges, source, sink, without=name)}


@given(random_graphs())
@settings(max_examples=300, deadline=None)
def test_vertices_and_edges_are_those_of_the_description(drawn: tuple[ir.Graph, Edges]) -> None:
    graph, edges = drawn
    flow = Flow(graph)
    assert [vertex.index for vertex in flow.vertices] == list(range(len(flow.vertices)))
    found = {v.name: {flow.vertices[p].name for p in flow.predecessors[v.index]} for v in flow.vertices}
    assert found == edges
    backward = {(p, v.index) for v in flow.vertices for p in flow.predecessors[v.index]}
    assert backward == {(v.index, s) for v in flow.vertices for s in flow.successors[v.index]}


@given(random_graphs(), st.integers(0, 40))
@settings(max_examples=300, deadline=None)
def test_the_dominator_chain_equals_brute_force(drawn: tuple[ir.Graph, Edges], start: int) -> None:
    graph, edges = drawn
    flow = Flow(graph)
    source, sink = flow.vertices[start % min(3, len(flow.vertices))], flow.vertices[-1]
    chain = flow.dominator_chain(source, sink)
    expected = chain_by_brute_force(edges, source.name, sink.name)
    event(f"chain of {min(len(expected), 5)}, {'some' if len(expected) < len(edges) else 'none'} left out")
    assert {vertex.name for vertex in chain} == expected
    assert len(chain) == len(expected)
    assert [vertex.index for vertex in chain] == sorted(vertex.index for vertex in chain)


@given(random_graphs(), st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_between_is_what_lies_on_some_path(drawn: tuple[ir.Graph, Edges], start: int) -> None:
    graph, edges = drawn
    flow = Flow(graph)
    source, sink = flow.vertices[start % min(3, len(flow.vertices))], flow.vertices[-1]
    between = [flow.vertices[index].name for index in flow.between(source, sink)]
    expected = [
        vertex.name
        for vertex in flow.vertices
        if reaches(edges, source.name, vertex.name) and reaches(edges, vertex.name, sink.name)
    ]
    assert between == expected


def test_a_diamond_has_a_chain_without_its_sides() -> None:
    flow = Flow(text_model("g (float[2] x) => (float[2] y) { a = Neg(x) b = Abs(a) c = Exp(a) y = Add(b, c) }").graph)
    chain = flow.dominator_chain(flow.vertices[0], flow.vertices[-1])
    assert [vertex.name for vertex in chain] == ["x", "a", "y"]
    assert [vertex.op_type for vertex in chain] == ["input", "Neg", "Add"]


def test_there_is_no_chain_against_the_flow() -> None:
    flow = Flow(text_model("g (float[2] x) => (float[2] y) { a = Neg(x) y = Abs(a) }").graph)
    assert flow.dominator_chain(flow.vertices[-1], flow.vertices[0]) == []
    assert [v.name for v in flow.dominator_chain(flow.vertices[1], flow.vertices[1])] == ["a"]


# -------------------------------------------------------------------------------------------------------- what is an edge


def names(flow: Flow) -> list[str]:
    return [vertex.name for vertex in flow.vertices]


def test_shapes_and_constants_are_not_activation_data() -> None:
    model = text_model(
        """
        g (float[B, 4] x) => (float[B, 4] y) <float w = {2.0}> {
            size = Size(x)
            shape = Shape(x)
            twice = Concat <axis = 0> (shape, shape)
            k = Constant <value_float = 3.0> ()
            kw = Mul(k, w)
            z = Mul(x, kw)
            y = Reshape(z, shape)
        }
        """
    )
    flow = Flow(model.graph)
    assert names(flow) == ["x", "z", "y"]
    assert flow.predecessors == [(), (0,), (1,)]
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    assert flow.vertex(by_name["twice"]) is None and not flow.is_dynamic(by_name["kw"])
    assert flow.vertex(None) is None and not flow.is_dynamic(None)
    assert flow.is_dynamic(by_name["z"])


def test_a_shape_of_another_domain_is_an_op_like_any_other() -> None:
    header = '<ir_version: 9, opset_import: ["" : 18, "other" : 1]>'
    flow = Flow(text_model(header + "g (float[2] x) => (float[2] y) { a = other.Shape(x) y = Neg(a) }").graph)
    assert names(flow) == ["x", "a", "y"]


def test_an_initializer_that_is_listed_as_an_input_is_a_constant() -> None:
    model = text_model("g (float[2] x, float[2] w) => (float[2] y) { a = Neg(w) y = Add(x, a) }")
    weight = model.graph.inputs[1]
    weight.const_value = ir.tensor([1.0, 2.0], name="w")
    model.graph.register_initializer(weight)
    assert names(Flow(model.graph)) == ["x", "y"]


def test_a_value_read_twice_is_one_edge() -> None:
    flow = Flow(text_model("g (float[2] x) => (float[2] y) { y = Add(x, x) }").graph)
    assert flow.predecessors == [(), (0,)]
    assert names(flow) == [v.name for v in flow.dominator_chain(flow.vertices[0], flow.vertices[1])]


# -------------------------------------------------------------------------------------------------------------- skip-norms

FUSED = """
    g (float[B, S, 4] x, float[B, S, 4] b) => (float[B, S, 4] y) <float[4] w = {1, 1, 1, 1}, float[4] k = {0, 0, 0, 0}> {
        OUTPUTS = com.microsoft.OPERATOR(x, b, INPUTS)
        y = Add(n, LAST)
    }
"""


def fused(outputs: str, last: str, operator: str = "SkipSimplifiedLayerNormalization", inputs: str = "w") -> Flow:
    text = FUSED.replace("OUTPUTS", outputs).replace("LAST", last).replace("OPERATOR", operator)
    return Flow(text_model(text.replace("INPUTS", inputs)).graph)


@pytest.mark.parametrize("operator", ["SkipSimplifiedLayerNormalization", "SkipLayerNormalization"])
def test_a_skip_norm_is_a_sum_and_the_norm_of_that_sum(operator: str) -> None:
    flow = fused("n, unused_mean, unused_deviation, s", "s", operator)
    assert names(flow) == ["x", "b", "s", "n", "y"]
    assert flow.predecessors[2:] == [(0, 1), (2,), (2, 3)]
    assert [vertex.is_sum for vertex in flow.vertices] == [False, False, True, False, False]
    assert flow.sum_vertex(next(iter(flow.graph))) is flow.vertices[2]
    assert [v.name for v in flow.dominator_chain(flow.vertices[0], flow.vertices[-1])] == ["x", "s", "y"]


@pytest.mark.parametrize("outputs", ["n", "n, mean", "n, mean, deviation"])
def test_the_sum_of_a_skip_norm_without_output_3_is_virtual(outputs: str) -> None:
    flow = fused(outputs, "n")
    assert names(flow) == ["x", "b", "sum of n", "n", "y"]
    assert flow.vertices[2].value is None and flow.vertices[2].is_sum
    assert flow.sum_vertex(next(iter(flow.graph))) is flow.vertices[2]


def test_a_skip_norm_of_another_domain_is_an_op_like_any_other() -> None:
    header = '<ir_version: 9, opset_import: ["" : 18, "other" : 1]>'
    text = (
        FUSED.replace("OUTPUTS", "n")
        .replace("LAST", "n")
        .replace("com.microsoft.OPERATOR", "other.SkipLayerNormalization")
    )
    flow = Flow(text_model(header + text.replace("INPUTS", "w")).graph)
    assert names(flow) == ["x", "b", "n", "y"]
    with pytest.raises(AssertionError):
        flow.sum_vertex(next(iter(flow.graph)))


@pytest.mark.parametrize(
    ("operator", "inputs", "bias"),
    [
        ("SkipSimplifiedLayerNormalization", "w", None),
        ("SkipSimplifiedLayerNormalization", "w, k", "k"),
        ("SkipLayerNormalization", "w", None),
        ("SkipLayerNormalization", "w, k", None),  # that one is beta, which is not part of the sum
        ("SkipLayerNormalization", "w, w, k", "k"),
    ],
)
def test_the_bias_of_a_skip_norm_is_found_by_its_place(operator: str, inputs: str, bias: str | None) -> None:
    flow = fused("n", "n", operator, inputs)
    found = skip_norm_bias(next(iter(flow.graph)))
    assert (found.name if found is not None else None) == bias


# ----------------------------------------------------------------------------------------------------------- control flow

NESTED = """
    g (float[2] x, float[2] p, float[2] q, bool c) => (float[2] y) <float[2] w = {1, 1}> {
        a = Neg(x)
        y = If (c) <
            then_branch = outer () => (float[2] t) <float[2] v = {1, 1}> {
                inner = Add(p, v)
                local = Mul(inner, w)
                t = If (c) <
                    then_branch = deep () => (float[2] dt) { dt = Add(local, q) },
                    else_branch = deeper () => (float[2] de) { de = Identity(inner) }
                >
            },
            else_branch = other () => (float[2] e) { e = Identity(a) }
        >
    }
"""


def test_a_control_flow_node_reads_what_its_bodies_capture() -> None:
    graph = text_model(NESTED).graph
    flow = Flow(graph)
    assert names(flow) == ["x", "p", "q", "c", "a", "y"]
    assert {flow.vertices[index].name for index in flow.predecessors[-1]} == {"p", "q", "c", "a"}
    assert [v.name for v in flow.dominator_chain(flow.vertices[0], flow.vertices[-1])] == ["x", "a", "y"]


def test_captured_values_are_those_from_outside_alone() -> None:
    node = list(text_model(NESTED).graph)[-1]
    then_body, else_body = node.attributes["then_branch"].as_graph(), node.attributes["else_branch"].as_graph()
    # from the inner If as well; not `inner` and `local`, which are the body's own, nor its initializer `v`
    assert {value.name for value in captured(then_body)} == {"p", "w", "c", "q"}
    assert {value.name for value in captured(else_body)} == {"a"}
    assert {value.name for value in reads(node)} == {"c", "p", "w", "q", "a"}


def test_a_value_that_a_body_only_hands_out_is_captured() -> None:
    outside = ir.Value(name="outside")
    body = ir.Graph([], [outside], nodes=[], name="body")
    assert [value.name for value in captured(body)] == ["outside"]


def test_a_loop_reads_what_its_body_captures() -> None:
    model = text_model(
        """
        g (float[2] x, float[2] z, int64 n, bool c) => (float[2] y) {
            y = Loop (n, c, x) <
                body = step (int64 i, bool go, float[2] state) => (bool on, float[2] next) {
                    on = Identity(go)
                    next = Add(state, z)
                }
            >
        }
        """
    )
    flow = Flow(model.graph)
    assert names(flow) == ["x", "z", "n", "c", "y"]
    assert {flow.vertices[index].name for index in flow.predecessors[-1]} == {"x", "z", "n", "c"}


# -------------------------------------------------------------------------------------------------- after an edit


def test_nodes_put_in_later_are_part_of_the_flow() -> None:
    """The proof reads the flow of a rewritten graph: what was inserted in the middle must not look detached."""
    model = text_model("g (float[2] x) => (float[2] y) { a = Neg(x) y = Abs(a) }")
    first, last = list(model.graph)
    builder = NodeBuilder(model.graph, "scope")
    last.replace_input_with(0, builder.op("doubled", "Add", [first.outputs[0], first.outputs[0]]))
    builder.place_after(first)
    flow = Flow(model.graph)
    assert [v.name for v in flow.dominator_chain(flow.vertices[0], flow.vertices[-1])] == [
        "x",
        "a",
        "vlmguard/scope/doubled",
        "y",
    ]


def test_an_absent_input_is_no_read() -> None:
    x = ir.Value(name="x")
    assert [value.name for value in reads(ir.node("Clip", [x, None, x]))] == ["x", "x"]
