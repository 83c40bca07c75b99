"""Graphs beside the decoder: a KV cache gives a decoder away by its form, whatever its inputs are called."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from hand_graphs import decoder, text_model

from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.bystanders import decoder_in

CACHE = "float[B, 2, P, 4] {past}"
GROWN = "float[B, 2, T, 4] {present}"


def kept(past: str, present: str, output: str = GROWN) -> ir.Model:
    text = (
        f"g (float[B, 2, S, 4] rows, {CACHE}) => (float[B, 2, S, 4] y, {output}) {{ "
        "{present} = Concat <axis = 2> ({past}, rows) y = Neg(rows) }}"
    )
    return text_model(text.replace("{past}", past).replace("{present}", present).replace("}}", "}"))


@pytest.fixture(scope="module")
def whole() -> ir.Model:
    return decoder(layers=2)


@pytest.mark.parametrize(("past", "present"), [("past_conv_0", "other"), ("a", "present_0"), ("a", "b")])
def test_a_cache_is_known_by_its_form_or_its_name(whole: ir.Model, past: str, present: str) -> None:
    found = past if past != "a" or present == "b" else present
    assert decoder_in(kept(past, present), whole, dissect(whole)) == f"keeps a cache ({found!r})"


def test_rows_that_go_through_are_no_cache(whole: ir.Model) -> None:
    """A projector gives as many rows as it takes, and a resampler others, but neither continues its input."""
    projector = text_model("g (float[B, N, 16] x) => (float[B, N, 16] y) { y = Neg(x) }")
    assert decoder_in(projector, whole, dissect(whole)) == ""
    tiles = text_model("g (float[B, 3, H, W] x) => (float[B, 3, H, W] y) { y = Neg(x) }")
    assert decoder_in(tiles, whole, dissect(whole)) == ""


HEADS = {
    "a product": ("", "y = MatMul(x, table)"),
    "a norm, and logits that are capped": ("", "n = Neg(x) z = MatMul(n, table) y = Tanh(z)"),
}
NO_HEADS = {
    "sums over tokens": ("", "total = CumSum(x, one) y = MatMul(total, table)"),
    "an attention over tokens": (
        "",
        "t = Transpose <perm = [0, 2, 1]> (x) s = MatMul(x, t) p = Softmax(s) z = MatMul(p, x) y = MatMul(z, table)",
    ),
    "another input": (", float[B, S, 7] more", "z = MatMul(x, table) y = Add(z, more)"),
}


@pytest.mark.parametrize(("more", "nodes"), [*HEADS.values(), *NO_HEADS.values()], ids=[*HEADS, *NO_HEADS])
def test_a_head_makes_logits_of_one_state_at_a_time(whole: ir.Model, more: str, nodes: str) -> None:
    """It may output logits, whatever its input is called; what sees several tokens may not."""
    text = f"g (float[B, S, 16] x{more}) => (float[B, S, 7] y) <float[16, 7] table, int64 one = {{1}}> {{ {nodes} }}"
    model = text_model(text)
    model.graph.outputs[0].name = "logits"
    said = "" if (more, nodes) in HEADS.values() else "outputs logits"
    assert decoder_in(model, whole, dissect(whole)) == said
