"""Modes at the prompt's end: `align`, and `supervise` with `--positions prompt`; the laws of the reference first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hand_graphs import WIDTH, copy_of, decoder, directions, guard_model, layer_directions, run, uncalibrated
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vlmguard.graphs import reference
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.plan import PROMPT_SUPERVISOR_INPUT
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.proof.strip import strip_guard
from vlmguard.graphs.reference import NO_SUPERVISOR, SUPERVISED_ABOVE, LayerGuard
from vlmguard.graphs.spec import GuardSpec

BATCH, SEQUENCE = 3, 4
MASK = np.array([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
states = arrays(np.float64, (BATCH, SEQUENCE, WIDTH), elements=st.floats(-100, 100))


def guard_of(rank: int) -> LayerGuard:
    ssd = np.linalg.qr(np.random.default_rng(rank).normal(size=(WIDTH, rank)))[0].T
    zeros = np.zeros(rank)
    return LayerGuard(ssd, zeros, zeros, ssd[0], SUPERVISED_ABOVE, 1.0)


# --------------------------------------------------------------------------------------------------- laws of the reference


@given(h=states, text=arrays(np.float64, (BATCH, 1, WIDTH), elements=st.floats(-100, 100)))
@settings(max_examples=50, deadline=None)
def test_with_all_rows_the_state_becomes_the_text_only_state(h: np.ndarray, text: np.ndarray) -> None:
    layer = guard_of(WIDTH)
    found = reference.guard("align", layer, h, text @ layer.ssd.T, reference.last_token(MASK))
    np.testing.assert_allclose(found[:, -1:], text, atol=1e-10)


@given(h=states, rank=st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_equal_coordinates_change_nothing(h: np.ndarray, rank: int) -> None:
    layer = guard_of(rank)
    own = h[:, -1:] @ layer.ssd.T
    found = reference.guard("align", layer, h, own, reference.last_token(MASK))
    np.testing.assert_allclose(found, h, atol=1e-10)


@given(h=states, rank=st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_without_a_supervisor_nothing_changes(h: np.ndarray, rank: int) -> None:
    listen = np.full((BATCH, 1, rank), NO_SUPERVISOR)
    np.testing.assert_array_equal(reference.guard("align", guard_of(rank), h, listen), h)


@given(h=states, rank=st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_align_is_supervise_at_full_strength_without_an_origin_or_a_threshold(h: np.ndarray, rank: int) -> None:
    layer, text = guard_of(rank), np.random.default_rng(0).normal(size=(BATCH, 1, rank))
    aligned, supervised = (reference.guard(mode, layer, h, text) for mode in ("align", "supervise"))
    np.testing.assert_allclose(aligned, supervised, atol=1e-10)


# ----------------------------------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("lowering", ["lowrank", "rank1"])
@pytest.mark.parametrize("mode", ["align", "supervise"])
def test_a_call_without_a_supervisor_is_the_source_and_one_with_it_edits_the_last_token(
    mode: Any, lowering: str
) -> None:
    spec = GuardSpec(mode=mode, positions="prompt", lowering=lowering)
    made = guard_model(decoder(), directions(parts={"threshold": -1e6}), spec)
    assert made.plan.positions == "prompt" and made.plan.added_inputs == (PROMPT_SUPERVISOR_INPUT,)
    feeds = {
        "inputs_embeds": np.random.default_rng(1).normal(size=(BATCH, SEQUENCE, WIDTH)).astype(np.float32),
        "attention_mask": MASK,
    }
    expected = run(decoder(), feeds)
    silent = run(made.model, feeds | {PROMPT_SUPERVISOR_INPUT: np.full((BATCH, 1, 2), NO_SUPERVISOR, np.float32)})
    told = run(made.model, feeds | {PROMPT_SUPERVISOR_INPUT: np.ones((BATCH, 1, 2), np.float32)})
    for name in ("hidden", "logits"):
        assert silent[name].tobytes() == expected[name].tobytes()
        assert told[name][:, :-1].tobytes() == expected[name][:, :-1].tobytes()
        assert (told[name][:, -1] != expected[name][:, -1]).any(axis=-1).all()


def test_only_rows_with_a_supervisor_are_edited() -> None:
    """Rows of one batch may differ, and a coordinate at the constant between the two counts as none."""
    made = guard_model(decoder(), directions(), GuardSpec(mode="align"))
    feeds = {
        "inputs_embeds": np.random.default_rng(1).normal(size=(BATCH, SEQUENCE, WIDTH)).astype(np.float32),
        "attention_mask": MASK,
    }
    supervisor = np.ones((BATCH, 1, 2), np.float32)
    supervisor[0, 0, 0], supervisor[2] = SUPERVISED_ABOVE, NO_SUPERVISOR
    hidden = run(made.model, feeds | {PROMPT_SUPERVISOR_INPUT: supervisor})["hidden"]
    assert (hidden != run(decoder(), feeds)["hidden"]).any(axis=(1, 2)).tolist() == [False, True, False]


@pytest.mark.parametrize("kind", ["add", "skip_norm", "skip_norm_bias"])
def test_a_stripped_graph_is_the_source(kind: Any) -> None:
    source = decoder(kind, layers=2)
    made = guard_model(copy_of(source), directions((0, 1)), GuardSpec(mode="align"))
    strip_guard(made.model)
    assert [value.name for value in made.model.graph.inputs] == [value.name for value in source.graph.inputs]
    assert [node.name for node in made.model.graph] == [node.name for node in source.graph]


# ------------------------------------------------------------------------------------------------------------------- plan


def planned(count: int, found: Any, **wish: Any) -> Any:
    model = decoder(layers=count)
    return plan_guard(model, dissect(model), found, GuardSpec(mode="align", **wish))


@pytest.mark.parametrize(("count", "layers"), [(1, (0,)), (2, (1,)), (3, (1,)), (6, (2, 3, 4)), (7, (3, 4, 5))])
def test_the_later_two_thirds_of_the_layers_without_the_last_are_guarded(count: int, layers: tuple[int, ...]) -> None:
    made = planned(count, uncalibrated(range(count)))
    assert made.layers == layers
    shown = ", ".join(map(str, layers))
    which = "the later two thirds of the decoder without its last layer"
    which = {1: "those of the directions file", 2: "the later two thirds of the decoder"}.get(count, which)
    assert f"layers {shown}: {which}; nothing is calibrated in mode align" in made.notes


def test_layers_of_another_modes_calibration_are_not_taken() -> None:
    calibrated = directions(range(3), mode="restore", recommended_layers=(0,))
    assert planned(3, calibrated).layers == (1,)
    assert planned(3, calibrated, layers=(0,)).layers == (0,)


def test_every_layer_has_the_constant_for_a_threshold_and_no_other_number() -> None:
    made = planned(3, directions(range(3)))
    for site in made.sites:
        assert site.guard.threshold == np.float32(SUPERVISED_ABOVE) and site.guard.threshold > NO_SUPERVISOR
        shown = site.to_json("align")
        assert not {"tau", "alpha", "origin", "target", "readout_sha256", "text_shift"} & shown.keys()


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        (
            {"mode": "align", "positions": "all"},
            "mode align edits the end of the prompt and no other token; leave --positions out",
        ),
        (
            {"mode": "align", "telemetry": True},
            "mode align has no threshold, so there is no score to output; leave --telemetry out",
        ),
        (
            {"mode": "align", "gate": "prompt"},
            "mode align has no gate to hold: it edits the end of the prompt alone; leave --gate out",
        ),
        *(
            (
                {"mode": mode, "positions": "prompt"},
                f"mode {mode} cannot leave the answer's tokens out; leave --positions out, or choose align or supervise",
            )
            for mode in ("project", "steer", "restore", "combined")
        ),
    ],
)
def test_what_cannot_be_wished(wish: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GuardError) as refusal:
        GuardSpec(**wish)
    assert str(refusal.value) == sentence


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ({"tau": 0.5}, "mode align has no threshold; leave --tau out, or choose a mode with one"),
        ({"alpha": 1.5}, "mode align has no strength alpha; leave --alpha out, or choose steer or supervise"),
    ],
)
def test_numbers_that_the_mode_does_not_have_are_refused(wish: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GuardError) as refusal:
        planned(2, directions((0, 1)), **wish)
    assert str(refusal.value) == sentence


def test_one_layer_directions_are_enough() -> None:
    assert layer_directions().ssd.shape == (2, WIDTH)
    assert planned(3, uncalibrated((0,))).layers == (0,)
