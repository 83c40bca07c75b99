"""Paired rows (`--supervisor rows`): the laws of the reference first, then graphs, then what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hand_graphs import WIDTH, copy_of, decoder, directions, guard_model, run
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vlmguard.graphs import reference
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.dtypes import NUMPY_DTYPES
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.modes import MODES
from vlmguard.graphs.pairs import reads_pairs
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.proof.strip import strip_guard
from vlmguard.graphs.reference import LayerGuard
from vlmguard.graphs.spec import GuardSpec

SPEC = GuardSpec(mode="align", supervisor="rows")
# Two pairs and a row without a partner: padded on the left, on the right, and not at all.
MASK = np.array([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
ROWS, TOKENS = MASK.shape
states = arrays(np.float64, (ROWS, TOKENS, WIDTH), elements=st.floats(-100, 100))


def layer_of(rank: int) -> LayerGuard:
    ssd = np.linalg.qr(np.random.default_rng(rank).normal(size=(WIDTH, rank)))[0].T
    zeros = np.zeros(rank)
    return LayerGuard(ssd, zeros, zeros, ssd[0], -np.inf, 1.0)


def paired(layer: LayerGuard, h: np.ndarray, mask: np.ndarray = MASK, past: int = 0) -> np.ndarray:
    """What paired rows give, by the reference."""
    known = mask, h.shape[1], past
    text = reference.text_coordinates(layer, h, reference.last_index(*known))
    return reference.guard("align", layer, h, text, reference.last_token(*known) * reference.paired_rows(*known))


# --------------------------------------------------------------------------------------------------- laws of the reference


@given(h=states, rank=st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_text_rows_and_a_row_without_a_partner_are_never_changed(h: np.ndarray, rank: int) -> None:
    np.testing.assert_array_equal(paired(layer_of(rank), h)[::2], h[::2])


@given(h=states, rank=st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_equal_rows_change_nothing(h: np.ndarray, rank: int) -> None:
    h, mask = h[[0, 0, 1, 1]], MASK[[0, 0, 2, 2]]
    np.testing.assert_allclose(paired(layer_of(rank), h, mask), h, atol=1e-10)


@given(h=states)
@settings(max_examples=50, deadline=None)
def test_with_all_rows_of_v_the_last_state_becomes_the_text_only_state(h: np.ndarray) -> None:
    found = paired(layer_of(WIDTH), h)
    for text, last in ((0, 3), (2, 1)):
        np.testing.assert_allclose(found[text + 1, 3], h[text, last], atol=1e-10)
    np.testing.assert_array_equal(found[:, :3], h[:, :3])


@given(h=states, rank=st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_paired_rows_are_the_input_fed_with_the_text_only_coordinates(h: np.ndarray, rank: int) -> None:
    layer = layer_of(rank)
    text = np.stack([h[0, 3], h[0, 3], h[2, 1], h[2, 1], h[4, 3]])[:, None] @ layer.ssd.T
    fed = reference.guard("align", layer, h, text, reference.last_token(MASK))
    np.testing.assert_allclose(paired(layer, h)[1::2], fed[1::2], atol=1e-10)


def test_a_decode_step_and_a_row_that_is_absent_are_not_edited() -> None:
    assert not reference.paired_rows(np.ones((4, 9)), 1, 8).any()
    mask = np.ones((6, 6))
    mask[0, 2:] = mask[3, 2:] = 0  # no token of these in a call of the last four columns
    assert reference.paired_rows(mask, 4, 2)[:, 0, 0].tolist() == [0, 0, 0, 0, 0, 1]


# ----------------------------------------------------------------------------------------------------------------- graphs


def feeds(dtype: str = "float32", tokens: int = TOKENS, mask: np.ndarray = MASK) -> dict[str, np.ndarray]:
    embeds = np.random.default_rng(1).normal(size=(len(mask), tokens, WIDTH)).astype(NUMPY_DTYPES[dtype])
    cache = np.zeros((len(mask), 1, mask.shape[1] - tokens, WIDTH), embeds.dtype)
    return {"inputs_embeds": embeds, "attention_mask": mask, "past_key_values.0.key": cache}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("lowering", ["lowrank", "rank1"])
@pytest.mark.parametrize("kind", ["add", "skip_norm", "skip_norm_bias"])
def test_the_graph_equals_the_reference(kind: Any, lowering: str, dtype: str) -> None:
    for rank in (1, 3):
        spec = GuardSpec(mode="align", supervisor="rows", lowering=lowering)
        made = guard_model(decoder(kind, dtype=dtype, cache=True), directions(rank=rank), spec)
        raw = run(decoder(kind, dtype=dtype, cache=True), feeds(dtype))
        found = run(made.model, feeds(dtype))
        expected = paired(made.plan.guards[0], raw["hidden"].astype(np.float64))
        off = np.abs(found["hidden"] - expected).max() / np.abs(expected).max()
        assert off < {"float32": 2e-6, "float16": 5e-3}[dtype]
        moved = (found["hidden"] != raw["hidden"]).any(axis=-1)
        assert np.argwhere(moved).tolist() == [[1, 3], [3, 3]]
        for name in ("hidden", "logits"):
            assert found[name][::2].tobytes() == raw[name][::2].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_decode_step_and_rows_without_a_token_are_the_source_bit_for_bit(dtype: str) -> None:
    made = guard_model(decoder(dtype=dtype, cache=True), directions(), SPEC)
    absent = np.ones((4, 6), np.int64)
    absent[0, 2:] = absent[3, 2:] = 0
    for given_feeds in (feeds(dtype, 1), feeds(dtype, 4, absent), feeds(dtype, mask=np.ones((1, 4), np.int64))):
        expected, found = run(decoder(dtype=dtype, cache=True), given_feeds), run(made.model, given_feeds)
        assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


def test_inputs_and_outputs_are_the_sources_and_the_graph_is_marked() -> None:
    source = decoder(cache=True)
    made = guard_model(copy_of(source), directions(), SPEC)
    assert [value.name for value in made.model.graph.inputs] == [value.name for value in source.graph.inputs]
    assert [value.name for value in made.model.graph.outputs] == [value.name for value in source.graph.outputs]
    assert made.plan.added_inputs == made.plan.added_outputs == () and made.plan.to_json()["supervisor"] == "rows"
    assert reads_pairs(made.model) and not reads_pairs(source)
    strip_guard(made.model)
    assert [node.name for node in made.model.graph] == [node.name for node in source.graph]
    assert not reads_pairs(made.model)


# ---------------------------------------------------------------------------------------------------------------- refusals


def refusal(model: Any) -> str:
    with pytest.raises(GuardError) as error:
        plan_guard(model, dissect(model), directions(), SPEC)
    return str(error.value)


def fixed(axis: int) -> Any:
    model = decoder(cache=True)
    shape = model.graph.inputs[0].shape
    assert shape is not None
    sizes: list[Any] = list(shape)
    sizes[axis] = 1
    model.graph.inputs[0].shape = type(shape)(sizes)
    return model


def test_graphs_that_cannot_take_pairs_are_refused_in_one_line() -> None:
    assert refusal(fixed(0)) == (
        "the graph takes batches of 1, paired rows need 2; export it with an open batch size, or choose --supervisor input"
    )
    assert refusal(fixed(1)) == (
        "the graph takes one token per call, so paired rows cannot distinguish a prompt from an answer; "
        "choose --supervisor input"
    )
    assert refusal(decoder()) == (
        "the graph has no KV cache, so every call repeats the prompt and paired rows cannot distinguish it from an answer; "
        "choose --supervisor input"
    )
    assert refusal(decoder(mask=False, cache=True)) == (
        "the graph has no attention mask, so the two prompts of a pair cannot have different lengths; choose --supervisor input"
    )


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "align"])
def test_other_modes_do_not_read_pairs(mode: Any) -> None:
    with pytest.raises(GuardError) as error:
        GuardSpec(mode=mode, supervisor="rows")
    assert str(error.value) == f"mode {mode} does not read paired rows; leave --supervisor out, or choose align"


def test_the_mode_must_be_named() -> None:
    with pytest.raises(GuardError) as error:
        GuardSpec(supervisor="rows")
    assert str(error.value) == (
        "paired rows are read by mode align alone; give --mode align too, or leave --supervisor out"
    )


def test_an_unknown_supervisor_is_refused() -> None:
    with pytest.raises(GuardError) as error:
        GuardSpec(mode="align", supervisor="row")  # type: ignore[arg-type]
    assert str(error.value) == "supervisor 'row' is unknown; choose one of input, rows"
