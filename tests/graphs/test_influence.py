"""What a value can depend on: every way that carries a number carries influence, and ordinary shape computations carry none."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hand_graphs import text_model
from onnx import TensorProto, helper
from tampering_graphs import CHANNELS, VOCABULARY, cast_needs_a_type, numbers

from vlmguard.graphs.influence import Influence, spread
from vlmguard.graphs.ranks import Ranks


def reached(graph: ir.Graph, source: str, *kinds: str) -> set[str]:
    """Names of the values whose numbers (or cells of other kinds) an input's numbers reach."""
    influence = Influence(graph)
    start = influence.of([value for value in graph.inputs if value.name == source])
    bits = spread(influence, dict.fromkeys(start, 1), {})
    cells = zip(influence.cells, bits, strict=True)
    return {value.name or "" for (value, kind), bit in cells if bit and kind in (kinds or ("numbers",))}


def channel_model(channel: str) -> onnx.ModelProto:
    """`token` comes in and `back` goes out, by one of the channels of an attack."""
    model = helper.make_model(
        helper.make_graph(
            [],
            "channel",
            [helper.make_tensor_value_info("token", TensorProto.INT64, [])],
            [helper.make_tensor_value_info("back", TensorProto.INT64, [])],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    numbers(model)
    model.graph.node.extend(cast_needs_a_type(CHANNELS[channel](model)))
    return model


@pytest.mark.parametrize("channel", CHANNELS)
def test_what_carries_a_number_carries_influence(channel: str) -> None:
    """The runtime shows that the channel is one, so that the attack is real."""
    model = channel_model(channel)
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    lowest = 1 if channel == "the Size of a Resize" else 0  # which makes nothing empty
    for token in range(lowest, VOCABULARY):
        assert session.run(None, {"token": np.array(token)})[0] == token
    assert "back" in reached(ir.from_proto(model).graph, "token")


def test_sizes_of_inputs_are_free() -> None:
    """Batch and sequence length reach no number: positions and masks are made of them in every decoder."""
    graph = text_model(
        """
        g (float[B, S, 4] x) => (int64[N] y, float[B, S, 4] z)
        <int64[1] one = {1}, int64 from = {0}, int64 step = {1}, int64[3] shape = {0, 0, 4}> {
            s = Shape(x)
            length = Gather(s, one)
            count = Squeeze(length)
            y = Range(from, count, step)
            z = Reshape(x, shape)
        }
        """
    ).graph
    assert reached(graph, "x") == {"x", "z"}
    assert reached(graph, "x", "sizes", "rows") == set()


def test_sizes_that_depend_on_numbers_pass_through_what_comes_after() -> None:
    """An Add, a Cast and a Reshape keep them; a Shape turns them into numbers."""
    graph = text_model(
        """
        g (int64 n, float[4] x) => (int64[1] y) <int64 from = {0}, int64 step = {1}, int64[1] minus = {-1}> {
            r = Range(from, n, step)
            c = Cast<to = 1>(r)
            a = Add(c, c)
            f = Reshape(a, minus)
            y = Shape(f)
        }
        """
    ).graph
    assert reached(graph, "n") == {"n", "r", "c", "a", "f", "y"}
    assert reached(graph, "n", "rows") == {"r", "c", "a"} and reached(graph, "n", "sizes") == {"f"}
    assert reached(graph, "x") == {"x"}


EXPERTS = """
    g (float[N, 4] x, int64 chosen, int64[M, 1] order) => (float[M, 4] y, int64[2] seen)
    <float[4, 4] first = {1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1}, int64 from = {0}, int64 step = {1}, int64 all = {8}> {
        here = Range(from, chosen, step)
        rest = Range(chosen, all, step)
        a = Gather<axis = 0>(x, here)
        b = Gather<axis = 0>(x, rest)
        p = MatMul(a, first)
        q = MatMul(b, first)
        both = Concat<axis = 0>(p, q)
        y = GatherND(both, order)
        seen = Shape(PICKED)
    }
"""


def test_rows_that_experts_took_are_forgotten_where_they_are_picked_by_index() -> None:
    """A mixture of experts is no leak: how many rows each took decides no size of the result."""
    assert "seen" not in reached(text_model(EXPERTS.replace("PICKED", "y")).graph, "chosen")
    assert "seen" in reached(text_model(EXPERTS.replace("PICKED", "both")).graph, "chosen")
    turned = EXPERTS.replace("axis = 0>(x, here)", "axis = 1>(x, here)")
    assert "seen" in reached(text_model(turned.replace("PICKED", "y")).graph, "chosen")


@pytest.mark.parametrize(("axis", "leaks"), [(-1, False), (1, False), (0, True), (-2, True)])
def test_a_norm_of_what_experts_gave_keeps_their_rows(axis: int, leaks: bool) -> None:
    """Muse Spark: a reduction over the last axis has as many rows as before; over the first one nothing is said."""
    normed = EXPERTS.replace(
        "y = GatherND(both, order)", "m = ReduceMean(both, over) n = Mul(both, m) y = GatherND(n, order)"
    )
    normed = normed.replace("int64 all = {8}", f"int64 all = {{8}}, int64[1] over = {{{axis}}}")
    assert ("seen" in reached(text_model(normed.replace("PICKED", "y")).graph, "chosen")) == leaks


def test_an_operator_that_is_not_known_may_size_by_every_number() -> None:
    header = '<ir_version: 9, opset_import: ["" : 18, "other" : 1]>'
    text = "g (float[2] x) => (int64[1] y) { a = other.Abs(x) y = Shape(a) }"
    assert reached(text_model(header + text).graph, "x") == {"x", "a", "y"}
    assert reached(text_model("g (float[2] x) => (int64[1] y) { a = Abs(x) y = Shape(a) }").graph, "x") == {"x", "a"}


def test_a_loop_carries_its_states_apart() -> None:
    """What one state becomes does not reach another, but the number of turns reaches all."""
    graph = text_model(
        """
        g (int64 n, bool c, float[2] p, float[2] q, float[2] z) => (float[2] pp, float[2] qq) {
            pp, qq = Loop (n, c, p, q) <
                body = turn (int64 i, bool go, float[2] a, float[2] b) => (bool on, float[2] aa, float[2] bb) {
                    on = Identity(go)
                    aa = Add(a, z)
                    bb = Identity(b)
                }
            >
        }
        """
    ).graph
    assert reached(graph, "p") == {"p", "pp"} and reached(graph, "q") == {"q", "qq"}
    assert reached(graph, "z") == {"z", "pp"}
    assert reached(graph, "n") == {"n", "pp", "qq"} and reached(graph, "c") == {"c", "pp", "qq"}


def test_a_state_that_another_feeds_is_reached_after_a_turn() -> None:
    graph = text_model(
        """
        g (int64 n, bool c, float[2] p, float[2] q) => (float[2] pp, float[2] qq) {
            pp, qq = Loop (n, c, p, q) <
                body = turn (int64 i, bool go, float[2] a, float[2] b) => (bool on, float[2] aa, float[2] bb) {
                    on = Identity(go)
                    aa = Identity(b)
                    bb = Identity(a)
                }
            >
        }
        """
    ).graph
    assert reached(graph, "p") == {"p", "pp", "qq"} and reached(graph, "q") == {"q", "pp", "qq"}


def test_a_condition_reaches_numbers_and_sizes() -> None:
    graph = text_model(
        """
        g (bool c, float[2] x, float[3] w) => (float[N] y, int64[1] s) {
            y = If (c) <
                then_branch = a () => (float[2] t) { t = Neg(x) },
                else_branch = b () => (float[3] e) { e = Neg(w) }
            >
            s = Shape(y)
        }
        """
    ).graph
    assert reached(graph, "c") >= {"y", "s"}
    assert "y" in reached(graph, "x") and "s" not in reached(graph, "x")


def test_floods_do_not_get_through_a_stop() -> None:
    graph = text_model("g (float[2] x) => (float[2] y) { a = Neg(x) b = Abs(x) y = Add(a, b) }").graph
    influence = Influence(graph)
    by_name = {value.name: cell for cell, (value, _) in enumerate(influence.cells)}
    bits = spread(influence, {by_name["x"]: 0b11}, {by_name["a"]: 0b01, by_name["b"]: 0b11})
    assert {name: bits[cell] for name, cell in by_name.items()} == {"x": 0b11, "a": 0b10, "b": 0, "y": 0b10}


def test_ranks_are_concluded_and_never_read_from_a_declaration() -> None:
    model = text_model(
        """
        g (float[B, S, 4] x, float[N] y) => (float[B, S, 4] z)
        <int64[1] last = {-1}, int64[2] two = {0, 4}, float[4, 4] w = {1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1}> {
            a = MatMul(x, w)
            b = Reshape(a, two)
            c = Unsqueeze(y, last)
            d = ReduceSum<keepdims = 0>(x, last)
            e = Einsum<equation = "bsw,bw->bs">(x, d)
            f = Add(y, x)
            s = Shape<start = 1>(x)
            g1 = Reshape(y, s)
            z = Mul(x, f)
        }
        """
    )
    ranks = Ranks()
    for node in model.graph:
        ranks.add(node)
    made = {value.name: ranks.of(value) for node in model.graph for value in node.outputs}
    assert made == {"a": 3, "b": 2, "c": 2, "d": 2, "e": 2, "f": 3, "s": 1, "g1": 2, "z": 3}
    lying = next(iter(model.graph)).outputs[0]
    lying.shape = ir.Shape([7])
    assert ranks.of(lying) == 3
