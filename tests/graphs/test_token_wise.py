"""Which values hold one row per token that is computed from that token alone; running them is the oracle."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hand_graphs import run, text_model

from vlmguard.graphs.axis_sizes import BATCH, TOKENS, reshaped
from vlmguard.graphs.dataflow import Flow
from vlmguard.graphs.token_wise import TokenWise

pytest.importorskip("onnxruntime")

BATCHES, LENGTH, WIDTH, PAST, HEADS = 2, 5, 16, 3, 4
INPUTS = "float[B, S, 16] x, float[B, 4, P, 4] past, int64[B, S] positions"
WEIGHTS = (
    "<float[16, 16] w, float[16] gain, int64[1] last = {-1}, int64[1] one = {1}, int64[1] two = {2}, int64[1] zero = {0}, "
    "int64[1] eight = {8}, int64[1] four = {4}, int64 first = {0}, int64 first_axis = {1}, int64[2] picked = {0, 3}, "
    "int64[4] heads = {0, 0, 4, 4}, int64[4] open_heads = {0, -1, 4, 4}, int64[3] flat = {0, 0, -1}, "
    "int64[2] rows = {-1, 16}, int64[3] turned_rows = {0, 16, -1}, int64[5] repeated = {1, 1, 2, 1, 1}, "
    "int64[1] minus = {-1}, int64[2] halves = {8, 8}>"
)
KEYS = "k0 = MatMul(x, w) k1 = Reshape(k0, heads) k2 = Transpose <perm = [0, 2, 1, 3]> (k1) all = Concat <axis = 2> (past, k2) "
SIZES = (
    "b = Shape <start = 0, end = 1> (positions) s = Shape <start = 1, end = 2> (x) p = Shape <start = 2, end = 3> (past) "
    "t = Add(p, s) "
)
ALONE = {
    "a product with a weight": "y = MatMul(x, w)",
    "a gate": "a = MatMul(x, w) g = Sigmoid(a) y = Mul(x, g)",
    "a norm": "y = LayerNormalization <axis = -1> (x, gain)",
    "a norm in small steps": "sq = Mul(x, x) m = ReduceMean <keepdims = 1> (sq, last) r = Sqrt(m) y = Div(x, r)",
    "heads": "y = Reshape(x, heads)",
    "heads and back": "h = Reshape(x, heads) y = Reshape(h, flat)",
    "heads by the rest": "h = Reshape(x, open_heads) y = Reshape(h, flat)",
    "rows of all batches on one axis": "y = Reshape(x, rows)",
    "heads by sizes": f"{SIZES} shape = Concat <axis = 0> (b, s, four, four) y = Reshape(x, shape)",
    "one head": "h = Reshape(x, heads) y = Gather <axis = 2> (h, first)",
    "some heads": "h = Reshape(x, heads) y = Gather <axis = 2> (h, picked)",
    "half a row": "y = Slice(x, zero, eight, last)",
    "two halves turned": "a, b = Split <axis = -1> (x, halves) n = Neg(b) y = Concat <axis = -1> (n, a)",
    "keys with a past": f"{KEYS} y = Identity(all)",
    "repeated keys": (
        f"{KEYS} {SIZES} u = Unsqueeze(all, two) e = Expand(u, repeated) shape = Concat <axis = 0> (b, eight, t, four) "
        "y = Reshape(e, shape)"
    ),
    "repeated keys as TorchScript writes them": (
        f"{KEYS} {SIZES} u = Unsqueeze(all, two) wide = Concat <axis = 0> (b, four, two, t, four) five = Shape(wide) "
        "ones = ConstantOfShape <value = int64[1] {1}> (five) less = Mul(ones, minus) is_open = Equal(wide, less) "
        "sizes = Where(is_open, ones, wide) e = Expand(u, sizes) shape = Concat <axis = 0> (b, eight, t, four) "
        "y = Reshape(e, shape)"
    ),
    "positions may enter": "p = Cast <to = 1> (positions) c = Cos(p) u = Unsqueeze(c, two) y = Mul(x, u)",
}
MIXED = {
    "attention": "k = Transpose <perm = [0, 2, 1]> (x) sc = MatMul(x, k) sh = Softmax(sc) y = MatMul(sh, x)",
    "a product of tokens": "k = Transpose <perm = [0, 2, 1]> (x) sc = MatMul(x, k) y = MatMul(sc, x)",
    "a running sum": "y = CumSum(x, first_axis)",
    "a mean over tokens": "m = ReduceMean <keepdims = 1> (x, one) y = Add(x, m)",
    "a largest number of all": "m = ReduceMax <keepdims = 1> (x) y = Sub(x, m)",
    "the first token": "f = Gather <axis = 1> (x, zero) y = Add(x, f)",
    "shares among tokens": "y = Softmax <axis = 1> (x)",
    "rows cut anew": "c = Reshape(x, turned_rows) y = ReduceMean <keepdims = 1> (c, last)",
    "tokens as numbers": "k = Transpose <perm = [0, 2, 1]> (x) y = ReduceSum <keepdims = 0> (k, last)",
    "batches that meet tokens": "m = ReduceSum <keepdims = 0> (x, last) k = Transpose <perm = [1, 0]> (m) y = MatMul(m, k)",
    "rows in turned order": (
        f"{SIZES} k = Transpose <perm = [1, 0, 2]> (x) r = Reshape(k, rows) width = Shape <start = 2, end = 3> (x) "
        "shape = Concat <axis = 0> (b, s, width) y = Reshape(r, shape)"
    ),
    "tokens behind tokens": "y = Concat <axis = 1> (x, x)",
    "later tokens": "y = Slice(x, one, eight, one)",
}


def model(body: str) -> ir.Model:
    text = f"g ({INPUTS}) => (float y) {WEIGHTS} {{ {body} }}"
    made = text_model(text)
    for name in ("w", "gain"):
        weight = made.graph.initializers.get(name)
        if weight is not None and weight.const_value is not None:
            numbers = np.random.default_rng(0).normal(0, 0.3, weight.const_value.shape.numpy())
            weight.const_value = ir.Tensor(numbers.astype(np.float32), name=name)
    return made


def analysis(made: ir.Model) -> TokenWise:
    x = made.graph.inputs[0]
    flow = Flow(made.graph)
    source = flow.vertex(x)
    assert source is not None
    behind = flow.reached_from(source)
    return TokenWise(made.graph, {x: 0}, lambda value: (at := flow.vertex(value)) is not None and at.index in behind)


def feeds() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    x = random.normal(0, 1, (BATCHES, LENGTH, WIDTH)).astype(np.float32)
    past = random.normal(0, 1, (BATCHES, HEADS, PAST, WIDTH // HEADS)).astype(np.float32)
    return {"x": x, "past": past, "positions": np.arange(LENGTH)[None].repeat(BATCHES, 0)}


def changed_rows(made: ir.Model, token: int) -> np.ndarray:
    """Where the output changes when one token of row 0 does."""
    fed = feeds()
    other = {**fed, "x": fed["x"].copy()}
    other["x"][0, token] += 1.0
    return run(made, fed)["y"] != run(made, other)["y"]


@pytest.mark.parametrize("name", ALONE)
def test_what_is_token_wise_is_found_and_really_is(name: str) -> None:
    made = model(ALONE[name])
    rows = analysis(made).of(made.graph.outputs[0])
    assert rows is not None and rows.roots == {0}
    both = [at for at, axis in enumerate(rows.axes) if BATCH in axis and TOKENS in axis]
    for token in range(LENGTH):
        changed = changed_rows(made, token)
        assert changed.ndim == len(rows.axes) and changed.any()
        if both:
            expected, axes = [token], both
        else:
            axes = [at for at, axis in enumerate(rows.axes) if BATCH in axis] + [
                at for at, axis in enumerate(rows.axes) if any(TOKENS in str(factor) for factor in axis)
            ]
            past = PAST if "past" in name or "keys" in name else 0
            expected = [0, past + token]
        assert {tuple(place[axis] for axis in axes) for place in np.argwhere(changed)} == {tuple(expected)}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_tokens_is_not_token_wise(name: str) -> None:
    made = model(MIXED[name])
    assert analysis(made).of(made.graph.outputs[0]) is None


def test_the_first_value_that_is_not_is_named() -> None:
    made = model("a = MatMul(x, w) c = CumSum(a, first_axis) d = MatMul(c, w) y = Mul(d, gain)")
    assert analysis(made).broken_at(made.graph.outputs[0]).name == "c"


def test_an_initializer_that_an_app_may_feed_is_no_constant() -> None:
    made = model("y = Reshape(x, heads)")
    made.graph.inputs.append(made.graph.initializers["heads"])
    assert analysis(made).of(made.graph.outputs[0]) is None


def test_another_input_shows_the_batch_and_not_the_tokens() -> None:
    """A mask of the same declared length may be fed longer."""
    batch = "b = Shape <start = 0, end = 1> (positions) "
    body = batch + "{s} shape = Concat <axis = 0> (b, s, four, four) y = Reshape(x, shape)"
    own = model(body.replace("{s}", "s = Shape <start = 1, end = 2> (x)"))
    assert analysis(own).of(own.graph.outputs[0]) is not None
    other = model(body.replace("{s}", "s = Shape <start = 1, end = 2> (positions)"))
    assert analysis(other).of(other.graph.outputs[0]) is None


@pytest.mark.parametrize("name", ["a product with a weight", "heads", "one head"])
def test_a_node_without_its_second_input_is_no_traceback(name: str) -> None:
    made = model(ALONE[name])
    node = made.graph.outputs[0].producer()
    assert node is not None
    node.resize_inputs(1)
    assert analysis(made).of(made.graph.outputs[0]) is None


def test_a_shape_that_explodes_takes_no_time() -> None:
    doubled = "d0 = Concat <axis = 0> (one, one) "
    doubled += "".join(f"d{n} = Concat <axis = 0> (d{n - 1}, d{n - 1}, d{n - 1}) " for n in range(1, 15))
    made = model(doubled + "y = Reshape(x, d14)")
    assert analysis(made).of(made.graph.outputs[0]) is None


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ((0, 0, 4, 16), ((BATCH,), (TOKENS,), (4,), (16,))),
        ((0, -1, 4, 16), ((BATCH,), (TOKENS,), (4,), (16,))),
        ((-1, 64), ((BATCH, TOKENS), (64,))),
        (((BATCH,), (TOKENS,), 64), ((BATCH,), (TOKENS,), (64,))),
        (((TOKENS, BATCH), 64), ((BATCH, TOKENS), (64,))),
        ((0, 0, 1, 64), ((BATCH,), (TOKENS,), (), (64,))),
        ((0, -1, 128), None),  # two tokens in a row
        ((0, 64, -1), None),
        (((TOKENS,), (BATCH,), 64), None),
        ((0, 0, 3, -1), None),
        ((0, 0, 32), None),
        ((0, -1, -1), None),
        ((0, 0, 64, 0), None),
        ((0, None, 64), None),
        ((-2, 64), None),
    ],
)
def test_a_reshape_keeps_batch_and_tokens_whole(target: tuple, expected: tuple | None) -> None:
    assert reshaped(((BATCH,), (TOKENS,), (64,)), target) == expected
