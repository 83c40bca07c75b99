"""The last token of a call whose mask has a column for each token so far: the same one as the reference's, by comparisons."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hand_graphs import run, text_model
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vlmguard.graphs import reference
from vlmguard.graphs.call_inputs import call_inputs
from vlmguard.graphs.errors import RunFailed
from vlmguard.graphs.node_builder import NodeBuilder
from vlmguard.graphs.token_layout import of_one_token
from vlmguard.graphs.whole_mask import WholeMask

pytest.importorskip("onnxruntime")


def probe(cache: bool, mask: str = "int64", opset: int = 18) -> ir.Model:
    """A graph that outputs the selection for a stream `x`, and `x` at the selected tokens."""
    inputs, outputs = f"float[B, S, 3] x, {mask}[B, T] attention_mask", "float[B, S, 3] y"
    nodes = "y = Identity(x)"
    if cache:
        inputs, outputs = f"{inputs}, float[B, 2, P, 4] past", f"{outputs}, float[B, 2, P_and_S, 4] present"
        nodes += " present = Concat <axis = 2> (past, past)"
    model = text_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {nodes} }}')
    builder = NodeBuilder(model.graph, "probe")
    selected = WholeMask(builder, model.graph.inputs[0], call_inputs(model.graph)).selected
    read = of_one_token(builder, model.graph.inputs[0], selected, (3, 1))
    builder.place_last()
    for value, dtype in ((selected, ir.DataType.BOOL), (read, ir.DataType.FLOAT)):
        value.dtype = dtype
        model.graph.outputs.append(value)
    return model


CACHED, PLAIN = probe(cache=True), probe(cache=False)


def feeds(mask: np.ndarray, tokens: int, past: int | None) -> dict[str, np.ndarray]:
    stream = np.random.default_rng(0).normal(size=(len(mask), tokens, 3)).astype(np.float32)
    cache = {} if past is None else {"past": np.zeros((len(mask), 2, past, 4), np.float32)}
    return {"x": stream, "attention_mask": mask, **cache}


@st.composite
def calls(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """A mask, the tokens of the call and the past ones: padding anywhere, gaps, rows without any token."""
    batch, tokens, past = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(0, 4))
    return draw(arrays(np.int64, (batch, past + tokens), elements=st.integers(0, 1))), tokens, past


@given(calls())
@settings(max_examples=150, deadline=None)
def test_it_is_the_token_of_the_reference_and_no_other(drawn: tuple[np.ndarray, int, int]) -> None:
    mask, tokens, past = drawn
    for model, cached in ((CACHED, past), (PLAIN, None))[: 2 if past == 0 else 1]:
        fed = feeds(mask, tokens, cached)
        shown = run(model, fed)
        selected = shown["vlmguard/probe/selected"]
        np.testing.assert_array_equal(selected, reference.last_token(mask, tokens, past) > 0)
        assert (selected.sum(axis=1) == 1).all()
        place = reference.last_index(mask, tokens, past)
        np.testing.assert_array_equal(shown["vlmguard/probe/last"][..., 0], fed["x"][np.arange(len(mask)), place])


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize(("onnx_type", "dtype"), [("int64", np.int64), ("bool", np.bool_), ("float", np.float32)])
def test_opsets_and_dtypes_of_masks(opset: int, onnx_type: str, dtype: type) -> None:
    """Any number but 0 attends, a fraction too."""
    mask = np.array([[1, 1, 0.25, 0], [1, 1, 1, -7], [0, 0, 0, 0]])
    mask = (mask if dtype is np.float32 else mask != 0).astype(dtype)
    shown = run(probe(True, onnx_type, opset), feeds(mask, 3, 1))
    assert shown["vlmguard/probe/selected"][..., 0].argmax(axis=1).tolist() == [1, 2, 2]


@pytest.mark.parametrize("columns", [1, 4, 6, 9])
@pytest.mark.parametrize("model", [CACHED, PLAIN], ids=["cache", "no cache"])
def test_a_mask_with_another_number_of_columns_is_an_error(model: ir.Model, columns: int) -> None:
    with pytest.raises(RunFailed):
        run(model, feeds(np.ones((2, columns), np.int64), 5, 0 if model is CACHED else None))


@pytest.mark.parametrize("other", [np.nan, np.inf, -np.inf, 3e38])
def test_what_other_tokens_hold_does_not_reach_what_is_read(other: float) -> None:
    """Rows of padding may be NaN in a decoder: nothing attends to them."""
    fed = feeds(np.array([[0, 0, 1], [1, 0, 0]]), 3, 0)
    wanted = fed["x"][[0, 1], [2, 0]].copy()
    fed["x"][0, :2] = fed["x"][1, 1:] = other
    np.testing.assert_array_equal(run(CACHED, fed)["vlmguard/probe/last"][..., 0], wanted)
