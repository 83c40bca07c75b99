"""A head that reads the last token alone: same numbers, fewer of them; and which graphs are left as they are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hand_graphs import copy_of, run, text_model
from text_decoder import IDS, decoder

from vlmguard.graphs.last_logits import keep_last_logits, reads_in_place

TABLE = "th = Transpose <perm = [1, 0]> (table)"


def logits(model: ir.Model) -> np.ndarray:
    pytest.importorskip("onnxruntime")
    return run(model, {"input_ids": IDS})["logits"]


@pytest.mark.parametrize(
    ("head", "weights"),
    [
        ("logits = MatMul(y1, head)", ""),
        (f"{TABLE} logits = MatMul(y1, th)", ""),
        ("l = MatMul(y1, head) s = Div(l, cap) t = Tanh(s) logits = Mul(t, cap)", "float[5] cap"),
        ("l = MatMul(y1, head) logits = Add(l, bias)", "float[5] bias"),
        ("l = MatMul(y1, head) logits = Identity(l)", ""),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_last_logits_are_the_same(head: str, weights: str, dtype: str) -> None:
    if dtype == "float16":
        weights = weights.replace("float", "float16")
    source = decoder(head=head, weights=weights, dtype=dtype)
    model = copy_of(source)
    assert keep_last_logits(model) and reads_in_place(model) and not reads_in_place(source)
    whole, last = logits(source), logits(model)
    assert last.shape == (2, 1, whole.shape[2])
    tolerance = {"float32": 1e-6, "float16": 2e-3}[dtype]
    np.testing.assert_allclose(last, whole[:, -1:], rtol=0, atol=tolerance * np.abs(whole).max())
    operators = [node.op_type for node in model.graph]
    assert ("Transpose" in operators[-4:]) == ("th)" in head and dtype == "float16")
    assert operators.count("Gemm") == ("th)" in head and dtype == "float32")


@pytest.mark.parametrize(
    "head",
    [
        "p = Transpose <perm = [1, 0, 2]> (y1) q = MatMul(p, head) logits = Transpose <perm = [1, 0, 2]> (q)",
        "q = MatMul(y1, head) logits = Softmax <axis = 1> (q)",
        "k = Transpose <perm = [0, 2, 1]> (y1) logits = MatMul(y1, k)",
        "logits = Add(y1, y0)",
    ],
)
def test_what_is_no_head_is_left_as_it_is(head: str) -> None:
    """Positions in another place, mixed, or multiplied with each other."""
    model = decoder(head=head)
    before = [node.op_type for node in model.graph]
    assert not keep_last_logits(model) and not reads_in_place(model)
    assert [node.op_type for node in model.graph] == before


def test_logits_that_something_else_reads_are_left() -> None:
    model = text_model(
        "g (float[B, S, 4] inputs_embeds) => (float[B, S, 5] logits, float[B, S, 5] other) <float[4, 5] head> "
        "{ h = Tanh(inputs_embeds) l = MatMul(h, head) logits = Identity(l) other = Tanh(l) }"
    )
    assert not keep_last_logits(model)
