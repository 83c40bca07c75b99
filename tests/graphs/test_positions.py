"""The last attended token of each row, in the graph as in numpy."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hand_graphs import run, text_model
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vlmguard.graphs import reference
from vlmguard.graphs.positions import LastToken, mask_input
from vlmguard.graphs.scribe import Scribe

pytest.importorskip("onnxruntime")

WIDTH = 3


def probe(mask_type: str | None) -> ir.Model:
    """A graph that shows what `LastToken` makes of a stream `x` and a mask."""
    inputs = "float[B, S, 3] x" + (f", {mask_type}[B, T] attention_mask" if mask_type else "")
    model = text_model(f"g ({inputs}) => (float[B, S, 3] y) {{ y = Identity(x) }}")
    scribe = Scribe(model.graph, "probe")
    last = LastToken(scribe, model.graph.inputs[0], mask_input(model.graph))
    shown = ((last.pairs, ir.DataType.INT64), (last.selected, ir.DataType.BOOL))
    scribe.place_last()
    for value, dtype in shown:
        value.dtype = dtype
        model.graph.outputs.append(value)
    return model


def found(model: ir.Model, batch: int, sequence: int, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    feeds = {"x": np.zeros((batch, sequence, WIDTH), np.float32)}
    if mask is not None:
        feeds["attention_mask"] = mask
    _, pairs, selected = run(model, feeds).values()
    return pairs, selected


def assert_is_the_reference(pairs: np.ndarray, selected: np.ndarray, current: np.ndarray) -> None:
    """`current` is the mask of this call's tokens alone."""
    expected = reference.last_token(current)
    np.testing.assert_array_equal(selected.astype(np.float32), expected)
    assert selected.sum() == len(current)
    np.testing.assert_array_equal(pairs[:, 0], np.arange(len(current)))
    np.testing.assert_array_equal(pairs[:, 1], expected[..., 0].argmax(axis=1))


MASKED = probe("int64")


@given(
    st.integers(0, 3).flatmap(
        lambda past: st.tuples(
            st.just(past),
            arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(past + 1, 7)), elements=st.integers(0, 1)),
        )
    )
)
@settings(max_examples=60, deadline=None)
def test_any_mask_means_the_same_as_in_numpy(drawn: tuple[int, np.ndarray]) -> None:
    """Padding left, right or anywhere, past columns in front, rows without any token."""
    past, mask = drawn
    pairs, selected = found(MASKED, len(mask), mask.shape[1] - past, mask)
    assert_is_the_reference(pairs, selected, mask[:, past:])


@pytest.mark.parametrize(
    ("mask", "places"),
    [
        ([[1, 1, 1], [0, 0, 1]], [2, 2]),  # left padding
        ([[1, 1, 1], [1, 0, 0]], [2, 0]),  # right padding
        ([[1, 0, 1], [0, 1, 0]], [2, 1]),
        ([[7, -2, 0], [0, 5, 0]], [1, 1]),  # any number but 0 attends
    ],
)
def test_the_last_attended_token(mask: list[list[int]], places: list[int]) -> None:
    pairs, _ = found(MASKED, 2, 3, np.array(mask))
    assert pairs.tolist() == [[0, places[0]], [1, places[1]]]


@pytest.mark.parametrize(("onnx_type", "dtype"), [("int32", np.int32), ("bool", np.bool_), ("float", np.float32)])
def test_masks_of_other_dtypes(onnx_type: str, dtype: type) -> None:
    mask = np.array([[1, 1, 0, 0], [0, 1, 1, 0]]).astype(dtype)
    pairs, selected = found(probe(onnx_type), 2, 3, mask)
    assert pairs.tolist() == [[0, 0], [1, 1]]
    assert selected[..., 0].tolist() == [[True, False, False], [False, True, False]]


def test_a_fraction_attends_too() -> None:
    pairs, _ = found(probe("float"), 1, 3, np.array([[1.0, 0.25, 0.0]], np.float32))
    assert pairs.tolist() == [[0, 1]]


@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (3, 1), (2, 4)])
def test_without_a_mask_the_last_index_is_the_last_token(batch: int, sequence: int) -> None:
    pairs, selected = found(probe(None), batch, sequence, None)
    assert_is_the_reference(pairs, selected, np.ones((batch, sequence), np.int64))


def test_only_a_two_dimensional_attention_mask_is_one() -> None:
    """Transformers' 4-D masks have one row per token: no token is the last one there."""
    deep = text_model(
        "g (float[B, S, 3] x, float[B, 1, S, T] attention_mask) => (float[B, S, 3] y) { y = Identity(x) }"
    )
    assert mask_input(deep.graph) is None
    assert mask_input(probe(None).graph) is None
    two = text_model(
        "g (int64[B, S] input_ids, int64[B, T] attention_mask) => (int64[B, S] y) { y = Identity(input_ids) }"
    )
    assert mask_input(two.graph) is two.graph.inputs[1]


def test_a_mask_that_says_nothing_means_the_last_index() -> None:
    """A static cache has a mask longer than the tokens so far: its last columns are zeros, not padding."""
    mask = np.array([[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]])
    pairs, _ = found(MASKED, 2, 4, mask)
    np.testing.assert_array_equal(pairs, [[0, 3], [1, 3]])
