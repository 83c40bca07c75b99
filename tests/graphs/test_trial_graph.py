"""One graph, many guards: numbers that are fed compute what the same numbers compute when they are baked in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hand_graphs import WIDTH, copy_of, decoder, directions, run, supervisor_input
from hand_graphs import merged as merged_decoder

from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.dtypes import NUMPY_DTYPES
from vlmguard.graphs.graph_io import graph_bytes
from vlmguard.graphs.modes import MODES, guard_mode
from vlmguard.graphs.plan import COORDINATES_OUTPUT, GuardPlan
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.rewrite import rewrite
from vlmguard.graphs.spec import GuardSpec
from vlmguard.graphs.trial_graph import guard_numbers, make_overridable, neutral, widened

WIDEST = 4


def plan_for(graph: ir.Model, mode: str, rank: int, **options: Any) -> GuardPlan:
    alpha = 1.5 if guard_mode(mode).has_alpha else None
    return plan_guard(
        graph,
        dissect(graph),
        directions(rank=rank, parts={"threshold": -30.0}),
        GuardSpec(mode=mode, alpha=alpha, **options),
    )  # type: ignore[arg-type]


def opened(graph: ir.Model, mode: str) -> tuple[onnxruntime.InferenceSession, dict[str, np.ndarray]]:
    """The graph with a neutral guard whose numbers can be fed, and those numbers."""
    plan = neutral(plan_for(graph, mode, WIDEST))
    defaults = guard_numbers(plan)
    rewrite(graph, plan)
    make_overridable(graph, list(defaults))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph_bytes(graph), options, providers=["CPUExecutionProvider"]), defaults


def feeds(dtype: str, mode: str, rank: int = WIDEST) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    given = {
        "inputs_embeds": random.normal(size=(3, 5, WIDTH)).astype(NUMPY_DTYPES[dtype]),
        "attention_mask": np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]),
    }
    if guard_mode(mode).supervisor:
        coordinates = np.zeros((3, 1, rank), np.float32)
        coordinates[:, 0, :1] = [[-0.9], [0.7], [1.5]]
        given[supervisor_input(mode)] = coordinates
    return given


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("mode", MODES)
def test_the_numbers_are_those_that_the_rewrite_bakes_in(mode: str, dtype: str) -> None:
    graph = decoder("add", dtype=dtype)
    plan = plan_for(graph, mode, rank=2)
    numbers = guard_numbers(plan)
    rewrite(graph, plan)
    baked = {n: v.const_value for n, v in graph.graph.initializers.items() if n.startswith("vlmguard/layer_")}
    assert numbers.keys() == baked.keys() and len(numbers) >= 2
    for name, tensor in baked.items():
        assert tensor is not None and numbers[name].dtype == tensor.numpy().dtype
        np.testing.assert_array_equal(numbers[name], tensor.numpy())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("mode", MODES)
def test_a_neutral_guard_changes_no_bit(mode: str, dtype: str) -> None:
    source = decoder("add", dtype=dtype, mask=True)
    session, _ = opened(copy_of(source), mode)
    given = feeds(dtype, mode)
    plain = run(source, {name: array for name, array in given.items() if name != supervisor_input(mode)})
    np.testing.assert_array_equal(session.run(["logits"], given)[0], plain["logits"])


@pytest.mark.parametrize("rank", [1, 2, WIDEST])
@pytest.mark.parametrize("kind", ["add", "skip_norm"])
@pytest.mark.parametrize("mode", MODES)
def test_fed_numbers_compute_what_baked_ones_do(mode: str, kind: Any, rank: int) -> None:
    """A guard of fewer rows in a graph of more, and again after another one: nothing stays behind."""
    source = decoder(kind, mask=True)
    baked = copy_of(source)
    plan = plan_for(baked, mode, rank)
    rewrite(baked, plan)
    session, defaults = opened(copy_of(source), mode)
    wide = replace(plan, sites=tuple(replace(s, guard=widened(s.guard, WIDEST)) for s in plan.sites))
    numbers = guard_numbers(wide)
    assert numbers.keys() == defaults.keys()
    given = feeds("float32", mode)
    narrow = {supervisor_input(mode): given[supervisor_input(mode)][..., :rank]} if guard_mode(mode).supervisor else {}
    expected = run(baked, given | narrow)
    for _ in range(2):
        names = [output.name for output in session.get_outputs()]
        actual = dict(zip(names, session.run(names, given | numbers), strict=True))
        np.testing.assert_allclose(actual["logits"], expected["logits"], rtol=0, atol=1e-5)
        if guard_mode(mode).supervisor:
            own = actual[COORDINATES_OUTPUT]
            np.testing.assert_allclose(own[..., :rank], expected[COORDINATES_OUTPUT], rtol=0, atol=1e-5)
            assert not own[..., rank:].any()
        off = session.run(["logits"], given)[0]
        assert np.abs(off - expected["logits"]).max() > 1e-2


def test_both_branches_of_a_merged_decoder_read_the_same_numbers() -> None:
    source = merged_decoder()
    plan = plan_for(source, "project", rank=1)
    numbers = guard_numbers(plan)
    graph = copy_of(source)
    rewrite(graph, neutral(plan))
    make_overridable(graph, list(numbers))
    assert [value.name for value in graph.graph.inputs][-len(numbers) :] == list(numbers)
    onnxruntime.InferenceSession(graph_bytes(graph), providers=["CPUExecutionProvider"])
