"""Gate taps say what the reference says of the same states, in every mode and lowering, and in both branches of an `If`."""

from __future__ import annotations

import numpy as np
import pytest
from hand_graphs import WIDTH, decoder, directions, guard_model, merged, run, supervisor_input

from vlmguard.graphs import reference
from vlmguard.graphs.gate_taps import tap_gates
from vlmguard.graphs.modes import guard_mode, modes_where
from vlmguard.graphs.spec import GuardSpec
from vlmguard.graphs.taps import tap_guard

pytest.importorskip("onnxruntime")

EMBEDS = np.random.default_rng(5).normal(size=(6, 4, WIDTH)).astype(np.float32)
MASK = np.ones((6, 4), np.int64)


@pytest.mark.parametrize("lowering", ["lowrank", "rank1"])
@pytest.mark.parametrize("mode", modes_where(has_threshold=True))
def test_a_gate_is_open_where_the_reference_opens_it(mode: str, lowering: str) -> None:
    wish = GuardSpec(mode=mode, lowering=lowering, positions="all")  # type: ignore[arg-type]
    made = guard_model(decoder(layers=3), directions((0, 2)), wish)
    taps = tap_guard(made.model, made.plan, made.report)
    names = tap_gates(made.model, made.report.to_json())
    assert names == {0: "vlmguard.gate.0", 2: "vlmguard.gate.2"}
    supervisor = np.random.default_rng(1).normal(size=(6, 2, made.plan.sites[0].guard.rank)).astype(np.float32)
    feeds = {"inputs_embeds": EMBEDS, "attention_mask": MASK}
    found = run(made.model, feeds | ({supervisor_input(mode): supervisor} if guard_mode(mode).supervisor else {}))
    seen = set()
    for number, (planned, (raw, _)) in enumerate(zip(made.plan.sites, taps, strict=True)):
        states, guard = found[raw], planned.guard
        told = supervisor[:, number, None, :1]
        gate = found[names[planned.layer_index]]
        np.testing.assert_array_equal(gate, reference.gate(mode, guard, states, told))
        seen |= set(np.unique(gate))
    assert seen == {0.0, 1.0}  # open for some, closed for others


def test_a_guard_without_gates_leaves_the_graph_alone() -> None:
    made = guard_model(decoder(layers=2), directions((0,)), GuardSpec(mode="project"))
    outputs = [output.name for output in made.model.graph.outputs]
    assert tap_gates(made.model, made.report.to_json()) == {}
    assert [output.name for output in made.model.graph.outputs] == outputs


def test_both_branches_show_their_gate() -> None:
    made = guard_model(merged(layers=3), directions((1,)), GuardSpec(mode="restore"))
    names = tap_gates(made.model, made.report.to_json())
    feeds = {"inputs_embeds": EMBEDS, "attention_mask": MASK}
    inputs = {value.name for value in made.model.graph.inputs}
    feeds = {name: array for name, array in feeds.items() if name in inputs}
    both = [run(made.model, feeds | {"use_cache_branch": np.array([branch])})[names[1]] for branch in (True, False)]
    assert both[0].shape == (6, 4, 1) and set(np.unique(both[0])) <= {0.0, 1.0}
    np.testing.assert_array_equal(*both)
