"""The plan: which defaults are taken and why, the sentence for every wish that cannot be met, and its JSON, pinned."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hand_graphs import decoder, directions, guard_model, layer_directions, orthonormal, uncalibrated

from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.directions import Directions, LayerDirections
from vlmguard.graphs.errors import DirectionMismatch, GuardError
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.modes import MODES, guard_mode, modes_where
from vlmguard.graphs.plan import GuardPlan
from vlmguard.graphs.planner import plan_guard, require_unguarded
from vlmguard.graphs.spec import GuardSpec

LAYERS = 3
BARE_NOTE = (
    "an uncalibrated projection may over-refuse or do nothing, so evaluate it, or calibrate (give --anchors too)"
)


def plan(found: Directions, model: ir.Model | None = None, **wish: Any) -> GuardPlan:
    model = model or decoder(layers=LAYERS)
    return plan_guard(model, dissect(model), found, GuardSpec(**wish))


def refusal(kind: type[GuardError], found: Directions, model: ir.Model | None = None, **wish: Any) -> str:
    with pytest.raises(GuardError) as raised:
        plan(found, model, **wish)
    assert type(raised.value) is kind and "\n" not in str(raised.value)
    return str(raised.value)


# --------------------------------------------------------------------------------------------------------------- the mode


def test_calibrated_directions_mean_restore() -> None:
    made = plan(directions((1, 2)))
    assert made.mode == "restore"
    assert made.notes == (
        "mode restore: the directions carry readout, target and threshold",
        "layers 1, 2: those that the directions calibrate",
    )


def test_an_ssd_alone_means_project_with_a_warning() -> None:
    made = plan(uncalibrated((0, 2)))
    assert made.mode == "project"
    assert made.notes == (
        f"mode project: the directions carry an SSD alone; {BARE_NOTE}",
        "layers 0, 2: those of the directions file",
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_mode_of_the_calibration_comes_first(mode: str) -> None:
    made = plan(directions(mode=mode))
    assert made.mode == mode
    why = "that of the directions" if mode == "align" else "what the directions were calibrated for"
    assert made.notes[0] == f"mode {mode}: {why}"


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_may_be_asked_for(mode: str) -> None:
    made = plan(directions(), mode=mode)
    assert made.mode == mode
    assert made.notes[0] == f"mode {mode} as requested"


def test_a_projection_that_nobody_calibrated_carries_its_warning() -> None:
    note = "mode project as requested: an uncalibrated projection may over-refuse or do nothing; evaluate it"
    assert plan(uncalibrated(), mode="project").notes[0] == note


def test_thresholds_of_another_mode_are_refused() -> None:
    found = directions(mode="restore")
    for mode in ("steer", "supervise"):
        assert refusal(DirectionMismatch, found, mode=mode) == (
            f"the directions' thresholds were calibrated for restore, not for {mode}; give --tau, or calibrate again "
            "with --anchors"
        )
        assert plan(found, mode=mode, tau=0.25).sites[0].guard.threshold == 0.25
    assert plan(found, mode="project").mode == "project"  # it has no threshold
    assert plan(found, mode="restore").mode == "restore"


# -------------------------------------------------------------------------------------------------------------- the layers


def test_asked_layers_are_taken_in_order() -> None:
    made = plan(directions((0, 1, 2)), layers=(2, 0))
    assert made.layers == (0, 2)
    assert made.notes[1] == "layers 2, 0 as requested"


def test_recommended_layers_come_before_all_layers() -> None:
    made = plan(directions((0, 1, 2), recommended_layers=(1,)))
    assert made.layers == (1,)
    assert made.notes[1] == "layers 1: what calibration chose"


def test_a_layer_named_twice_is_guarded_once() -> None:
    assert plan(directions((0, 2)), layers=(2, 2)).layers == (2,)


def test_a_directions_file_recommends_a_layer_once() -> None:
    with pytest.raises(
        DirectionMismatch, match=r"layers \(2, 0, 2\) are recommended, one of them twice; name it once$"
    ):
        directions((0, 2), recommended_layers=(2, 0, 2))


def test_layers_are_ascending_whatever_the_directions_order() -> None:
    assert plan(directions((2, 0))).layers == (0, 2)
    assert plan(uncalibrated((2, 0, 1))).layers == (0, 1, 2)


def test_modes_with_a_readout_take_only_the_layers_that_are_calibrated() -> None:
    mixed = Directions(16, {0: LayerDirections(orthonormal(2)), 2: layer_directions()})
    assert plan(mixed).layers == plan(mixed, mode="combined").layers == (2,)
    assert plan(mixed, mode="project").layers == (0, 2)


def test_a_layer_that_the_decoder_has_not_is_refused() -> None:
    assert refusal(GuardError, directions((0,)), layers=(0, 3)) == (
        "the decoder has no layer 3, only layers 0 to 2; layers count from 0"
    )


def test_directions_of_a_deeper_model_are_refused() -> None:
    assert refusal(DirectionMismatch, directions((1, 5))) == (
        "the directions are for layer 5, the decoder has layers 0 to 2; were they extracted from another model?"
    )


def test_a_layer_without_directions_is_refused() -> None:
    assert refusal(DirectionMismatch, directions((0, 2)), layers=(1, 2)) == (
        "the directions have no layer 1, only layers 0, 2; extract them for that layer too"
    )


# ------------------------------------------------------------------------------------------------------------- the numbers


def test_directions_of_another_width_are_refused() -> None:
    assert refusal(DirectionMismatch, directions(width=24)) == (
        "the directions have width 24, the decoder has 16; were they extracted from another model?"
    )


def test_a_lower_rank_takes_the_first_rows() -> None:
    found = directions(rank=3)
    guard = plan(found, rank=2).sites[0].guard
    layer = found.layers[0]
    np.testing.assert_array_equal(guard.ssd, layer.ssd[:2])
    np.testing.assert_array_equal(guard.target, layer.target[:2])
    np.testing.assert_array_equal(guard.readout, layer.readout)
    np.testing.assert_array_equal(plan(found, rank=2, mode="supervise").sites[0].guard.origin, layer.origin[:2])
    assert plan(found).sites[0].guard.rank == 3


def test_a_rank_that_the_directions_have_not_is_refused() -> None:
    assert refusal(DirectionMismatch, directions((0, 1)), rank=3) == (
        "rank 3 is more than the 2 rows of the directions of layer 0; extract them with a higher --rank"
    )


def test_restore_and_project_have_no_strength() -> None:
    for mode in ("restore", "project"):
        assert refusal(GuardError, directions(), mode=mode, alpha=1.0) == (
            f"mode {mode} has no strength alpha; leave --alpha out, or choose steer or supervise"
        )
        assert plan(directions(alpha=3.0), mode=mode).sites[0].guard.alpha == 1.0


def test_the_strength_is_asked_for_or_calibrated_or_one() -> None:
    for mode in ("steer", "supervise"):
        assert plan(directions(), mode=mode).sites[0].guard.alpha == 1.0
        assert plan(directions(alpha=2.5), mode=mode).sites[0].guard.alpha == 2.5
        assert plan(directions(alpha=2.5), mode=mode, alpha=0.0).sites[0].guard.alpha == 0.0
        assert plan(directions(), mode=mode, alpha=0.1).sites[0].guard.alpha == float(np.float32(0.1))


def test_a_strength_that_no_state_survives_is_refused() -> None:
    for found, wish in ((directions(), {"alpha": 1e4}), (directions(alpha=1e4), {})):
        assert refusal(GuardError, found, mode="steer", **wish) == (
            "alpha 10000 is beyond 1000; no hidden state survives that"
        )
    assert plan(directions(), mode="steer", alpha=1000.0).sites[0].guard.alpha == 1000.0


def test_project_has_no_threshold() -> None:
    assert refusal(GuardError, directions(), mode="project", tau=0.0) == (
        "mode project has no gate; leave --tau out, or choose a mode with one"
    )
    assert plan(directions(), mode="project").sites[0].guard.threshold == 0.0


def test_the_threshold_is_asked_for_or_calibrated() -> None:
    for mode in ("restore", "steer", "supervise", "combined"):
        assert plan(directions(), mode=mode).sites[0].guard.threshold == 0.125
        assert plan(directions(), mode=mode, tau=0.1).sites[0].guard.threshold == float(np.float32(0.1))


def test_a_threshold_is_what_the_graph_compares_with() -> None:
    """float32, whether the directions come from a file or from the calibrator: `verify` plans again from the file."""
    found = directions(parts={"threshold": 0.1})
    assert plan(found).sites[0].guard.threshold == float(np.float32(0.1)) != 0.1


@pytest.mark.parametrize("mode", modes_where(has_readout=True))
def test_a_mode_with_a_readout_needs_a_target_and_a_threshold(mode: str) -> None:
    no_target, no_threshold = directions(parts={"target": None}), directions(parts={"threshold": None})
    assert refusal(DirectionMismatch, no_target, mode=mode) == (
        f"mode {mode} needs a target level, layer 0 of the directions has none; calibrate with --anchors"
    )
    assert refusal(DirectionMismatch, no_threshold, mode=mode) == (
        f"mode {mode} needs a threshold, layer 0 of the directions has none; give --tau, or calibrate with --anchors"
    )
    assert plan(no_threshold, mode=mode, tau=1.0).sites[0].guard.threshold == 1.0


def test_combined_needs_a_threshold_for_the_text_too() -> None:
    """`--tau` is that of the readout; nothing stands in for the text's."""
    without = directions((1,), parts={"text_threshold": None})
    for wish in ({}, {"tau": 1.0}):
        assert refusal(DirectionMismatch, without, mode="combined", **wish) == (
            "mode combined needs a threshold for the text too, layer 1 of the directions has none; calibrate with --anchors"
        )
    for mode in set(MODES) - {"combined"}:
        assert plan(without, mode=mode).sites[0].guard.text_shift == 0.0


def test_the_text_of_combined_is_moved_to_the_readouts_threshold() -> None:
    found = directions(parts={"threshold": 0.75, "text_threshold": -1.5})
    assert plan(found, mode="combined").sites[0].guard.text_shift == 2.25
    assert plan(found, mode="combined", tau=0.1).sites[0].guard.text_shift == float(np.float32(np.float32(0.1) + 1.5))


def test_restore_without_a_readout_reads_the_first_row_and_says_so() -> None:
    found = directions((1,), parts={"readout": None})
    made = plan(found, mode="restore")
    np.testing.assert_array_equal(made.sites[0].guard.readout, found.layers[1].ssd[0])
    assert made.notes[-1] == "layer 1 has no readout of its own: its gate reads the first row of the SSD"


@pytest.mark.parametrize("mode", ["steer", "supervise"])
def test_without_a_threshold_the_papers_zero_is_taken_and_said(mode: str) -> None:
    made = plan(uncalibrated((0, 1)), mode=mode)
    assert [site.guard.threshold for site in made.sites] == [0.0, 0.0]
    assert made.notes == (
        f"mode {mode} as requested",
        "layers 0, 1: those of the directions file",
        "tau = 0, as in the paper: the directions carry no threshold, and coordinates are not centred on 0",
    )


def test_supervise_without_an_origin_starts_at_zero() -> None:
    made = plan(uncalibrated(rank=3), mode="supervise", rank=2)
    np.testing.assert_array_equal(made.sites[0].guard.origin, np.zeros(2, np.float32))


@pytest.mark.parametrize("mode", modes_where(supervisor=True))
def test_a_supervisor_needs_one_rank_in_all_layers(mode: str) -> None:
    mixed = Directions(16, {0: layer_directions(3), 1: layer_directions(2)})
    assert refusal(GuardError, mixed, mode=mode, layers=(0, 1)) == (
        f"{mode} needs one rank in all layers, found [2, 3]; give --rank 2"
    )
    assert [site.guard.rank for site in plan(mixed, mode=mode, rank=2, layers=(0, 1)).sites] == [2, 2]
    assert [site.guard.rank for site in plan(mixed, mode="restore").sites] == [3, 2]


@pytest.mark.parametrize("scale", [1e6, 1e-6])
def test_a_readout_that_float16_cannot_hold_is_no_obstacle(scale: float) -> None:
    """The lowerings scale it; test_float16_range.py runs them."""
    found = directions(parts={"readout": np.full(16, scale, np.float32)})
    assert plan(found, decoder(dtype="float16")).mode == "restore"


# --------------------------------------------------------------------------------------------------------------- the graph


def test_an_old_opset_is_refused() -> None:
    assert refusal(GuardError, directions(), decoder(opset=12)) == (
        "the graph has opset 12, the guard needs 13 or later; convert it with onnx.version_converter"
    )
    assert plan(directions(), decoder(opset=13)).layers == (0,)


def test_a_guarded_graph_is_refused() -> None:
    model = decoder(layers=LAYERS)
    guard_model(model, directions(), GuardSpec())
    sentence = "this decoder already carries a guard; start again from the unguarded model"
    assert refusal(GuardError, directions((1,)), model) == sentence


@pytest.mark.parametrize("what", ["node", "initializer"])
def test_one_trace_of_a_guard_is_enough(what: str) -> None:
    model = decoder()
    if what == "node":
        next(iter(model.graph)).name = "vlmguard/layer_0/guarded"
    else:
        model.graph.register_initializer(ir.Value(name="vlmguard/x", const_value=ir.tensor([1.0], name="vlmguard/x")))
    with pytest.raises(GuardError, match="already carries a guard"):
        require_unguarded(model)
    require_unguarded(decoder())


def test_the_mask_is_planned_for_or_its_absence_is_said() -> None:
    assert plan(directions()).mask == "attention_mask"
    without = plan(directions(), decoder(mask=False))
    assert without.mask == ""
    assert without.notes[-1] == "no attention_mask input: the last index of each call is edited, so pad on the left"
    every = plan(directions(), decoder(mask=False), positions="all")
    assert not any("attention_mask" in note for note in every.notes)


def test_only_a_supervised_graph_gets_another_signature() -> None:
    for mode in MODES:
        made = plan(directions(), mode=mode)
        name = "vlmguard.prompt_supervisor" if mode == "align" else "vlmguard.supervisor"
        expected = ((name,), ("vlmguard.coordinates",)) if guard_mode(mode).supervisor else ((), ())
        assert (made.added_inputs, made.added_outputs) == expected


def test_the_lowering_is_decided_with_its_reason() -> None:
    made = plan(directions(), mode="project", lowering="dense")
    assert (made.lowering, made.lowering_reason) == (
        "dense",
        "as requested: the literal h @ (I - V^T V), one d x d MatMul per layer (to compare with; the others cost less)",
    )
    assert refusal(GuardError, directions(), mode="restore", lowering="dense") == (
        "lowering 'dense' cannot write mode 'restore'; choose lowrank or rank1"
    )


def test_planning_changes_nothing() -> None:
    model = decoder(layers=LAYERS)
    anatomy = dissect(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    plan_guard(model, anatomy, directions((0, 2)), GuardSpec())
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


# --------------------------------------------------------------------------------------------------------------- its JSON


def readable(rank: int = 2, width: int = 16) -> LayerDirections:
    """Numbers that are the same on every machine, and digests of them."""
    return LayerDirections(
        ssd=np.eye(width, dtype=np.float32)[:rank],
        origin=np.array([0.25, -0.25], np.float32)[:rank],
        target=np.array([1.5, 0.5], np.float32)[:rank],
        readout=np.full(width, 0.125, np.float32),
        threshold=0.75,
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_plan_is_sorted_plain_data(mode: str) -> None:
    made = plan(directions((2, 0)), mode=mode, layers=(0, 2)).to_json()
    assert json.loads(json.dumps(made)) == made
    assert made["layers"] == [site["layer"] for site in made["sites"]] == [0, 2]
    numbers = {"tau", "alpha", "origin", "target", "readout_sha256", "text_shift"} & made["sites"][0].keys()
    assert (
        numbers
        == {
            "project": set(),
            "steer": {"tau", "alpha"},
            "supervise": {"tau", "alpha", "origin"},
            "restore": {"tau", "target", "readout_sha256"},
            "combined": {"tau", "target", "readout_sha256", "text_shift"},
            "align": set(),
        }[mode]
    )


def test_each_number_of_the_guard_shows_in_the_plan() -> None:
    """Two guards that differ have plans that differ: the manifest is compared by this."""
    layer = layer_directions()
    changed = {
        "ssd": layer.ssd[::-1],
        "target": layer.target + 1,
        "readout": np.nextafter(layer.readout, np.float32(2)),
        "threshold": 0.5,
    }
    base = plan(directions()).to_json()
    for part, value in changed.items():
        assert plan(directions(parts={part: value})).to_json() != base
    supervised = plan(directions(), mode="supervise").to_json()
    assert plan(directions(parts={"origin": layer.origin + 1}), mode="supervise").to_json() != supervised
    assert plan(directions(alpha=2.0), mode="supervise").to_json() != supervised
    combined = plan(directions(), mode="combined").to_json()
    for part, value in (changed | {"text_threshold": 0.5}).items():
        assert plan(directions(parts={part: value}), mode="combined").to_json() != combined


def test_the_plan_of_a_hand_made_decoder_is_pinned(golden: Callable[[str, Any], None]) -> None:
    found = Directions(16, {0: readable(), 2: readable()}, alpha=2.0)
    golden("plan_hand_supervise.json", plan(found, decoder("skip_norm", LAYERS), mode="supervise").to_json())


def test_the_plan_of_a_real_export_is_pinned(zoo, golden: Callable[[str, Any], None]) -> None:
    package = open_package(zoo("llama-genai-fp32").path)
    model = package.load_decoder()
    anatomy = dissect(model, package.expected_layers)
    layers = {number: readable(width=64) for number in (0, 1, 3)}
    found = Directions(64, layers, mode="restore", recommended_layers=(1, 3))
    made = plan_guard(model, anatomy, found, GuardSpec())
    golden("plan_llama_genai.json", made.to_json())
    assert replace(made, notes=()).to_json()["notes"] == []
