"""Knobs, telemetry and held gates equal the numpy reference, and change nothing at their defaults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hand_graphs import (
    KINDS,
    WIDTH,
    Guarded,
    Kind,
    copy_of,
    decoder,
    directions,
    guard_model,
    layer_directions,
    merged,
    run,
    supervisor_input,
    uncalibrated,
)

from vlmguard.graphs import reference
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.dtypes import NUMPY_DTYPES
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.graph_io import graph_bytes
from vlmguard.graphs.modes import MODES, POSITIONS, guard_mode, modes_where
from vlmguard.graphs.plan import COORDINATES_OUTPUT
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.proof.strip import strip_guard
from vlmguard.graphs.proof.structure import initializers_untouched, prove_structure, same_graph, signature_unchanged
from vlmguard.graphs.reference import (
    AS_CALIBRATED,
    LARGEST_STRENGTH,
    NO_SUPERVISOR,
    UNDECIDED,
    LayerGuard,
    RuntimeControls,
)
from vlmguard.graphs.rewrite import rewrite
from vlmguard.graphs.runtime_controls import (
    OFFSET_INPUT,
    PAST_GATE_INPUT,
    PRESENT_GATE_OUTPUT,
    SCORES_OUTPUT,
    STRENGTH_INPUT,
)
from vlmguard.graphs.spec import LARGEST_TAU, GuardSpec
from vlmguard.graphs.taps import tap_guard

pytest.importorskip("onnxruntime")

CONTROLLED = ("lowrank", "rank1")
HELD = ("steer", "restore", "combined")  # supervise decides once per request already
LAYERS = (0, 1)
MASK = np.array([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
BATCH, SEQUENCE = MASK.shape
# Relative to the largest number compared, as for the lowerings.
TOLERANCE = {"float32": 2e-6, "float16": 5e-3}

every_mode = pytest.mark.parametrize("mode", MODES)
every_lowering = pytest.mark.parametrize("lowering", CONTROLLED)
every_kind = pytest.mark.parametrize("kind", KINDS)


def _place(mode: str, turn: int) -> str:
    return "prompt" if mode == "align" else POSITIONS[turn % 2]


def cases(modes: Iterable[str]) -> pytest.MarkDecorator:
    """Every mode, lowering and kind of sum, with positions and dtypes in turn, so that each meets each."""
    numbered = product(enumerate(sorted(modes)), enumerate(CONTROLLED), enumerate(KINDS))
    found = [
        (mode, lowering, _place(mode, m + at + k), kind, list(TOLERANCE)[(m // 2 + at + k) % 2])
        for (m, mode), (at, lowering), (k, kind) in numbered
    ]
    return pytest.mark.parametrize(("mode", "lowering", "positions", "kind", "dtype"), found)


def feeds(mode: str, dtype: str = "float32", rank: int = 2) -> dict[str, np.ndarray]:
    """Four prompts; of the supervisor's coordinates two open the gates, two do not."""
    random = np.random.default_rng(3)
    given = {"inputs_embeds": random.normal(size=(BATCH, SEQUENCE, WIDTH)).astype(NUMPY_DTYPES[dtype])}
    given["attention_mask"] = MASK
    if guard_mode(mode).supervisor:
        coordinates = random.normal(size=(BATCH, len(LAYERS), rank)).astype(np.float32)
        coordinates[:, :, 0] = np.array([-0.9, 0.7, 1.5, -0.2])[:, None]
        given[supervisor_input(mode)] = coordinates
    return given


def knobs(strength: float | None = None, offset: float | None = None) -> dict[str, np.ndarray]:
    asked = {STRENGTH_INPUT: strength, OFFSET_INPUT: offset}
    return {name: np.array(value, np.float32) for name, value in asked.items() if value is not None}


def guarded(mode: str, kind: Kind = "add", dtype: str = "float32", **wish: Any) -> Guarded:
    """Two layers, thresholds in the middle of what the scores are."""
    parts = {"threshold": 0.125}
    found = directions(LAYERS, parts=parts, alpha=3.0 if mode == "steer" else None)
    return guard_model(decoder(kind, 2, dtype), found, GuardSpec(mode=mode, **wish))  # type: ignore[arg-type]


def unguarded(kind: Kind, dtype: str, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return run(decoder(kind, 2, dtype), {name: given[name] for name in ("inputs_embeds", "attention_mask")})


def controls_of(mode: str) -> dict[str, Any]:
    """All runtime controls that a mode has."""
    return {
        "knobs": True,
        "telemetry": guard_mode(mode).has_threshold,
        "gate": "prompt" if mode in HELD else "token",
    }


def undecided() -> dict[str, np.ndarray]:
    return {PAST_GATE_INPUT: np.full((BATCH, len(LAYERS)), UNDECIDED, np.float32)}


# --------------------------------------------------------------------------------------------------- laws of the reference


@pytest.fixture
def layer() -> LayerGuard:
    found = layer_directions()
    assert found.origin is not None and found.target is not None and found.readout is not None
    return LayerGuard(found.ssd, found.origin, found.target, found.readout, 0.125, 1.5)


def states() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(size=(BATCH, SEQUENCE, WIDTH)), random.normal(size=(BATCH, 1, 2))


@every_mode
def test_strength_scales_the_edit_and_zero_or_less_is_the_identity(layer: LayerGuard, mode: str) -> None:
    h, a = states()
    whole = reference.guard(mode, layer, h, a) - h
    assert np.abs(whole).max() > 0.1
    for strength in (0.25, 1.0, LARGEST_STRENGTH):
        found = reference.guard(mode, layer, h, a, runtime_controls=RuntimeControls(strength)) - h
        np.testing.assert_allclose(found, strength * whole, atol=1e-12)
    for strength in (0.0, -1.0, -np.inf):
        np.testing.assert_array_equal(reference.guard(mode, layer, h, a, runtime_controls=RuntimeControls(strength)), h)
    np.testing.assert_array_equal(
        reference.guard(mode, layer, h, a, runtime_controls=RuntimeControls(9.0)),
        reference.guard(mode, layer, h, a, runtime_controls=RuntimeControls(LARGEST_STRENGTH)),
    )


@pytest.mark.parametrize("mode", modes_where(has_threshold=True))
def test_an_offset_moves_the_threshold(layer: LayerGuard, mode: str) -> None:
    h, a = states()
    moved = reference.guard(mode, replace(layer, threshold=0.625), h, a)
    np.testing.assert_array_equal(
        reference.guard(mode, layer, h, a, runtime_controls=RuntimeControls(threshold_offset=0.5)), moved
    )
    assert (moved != reference.guard(mode, layer, h, a)).any()
    opened = [
        reference.gate(mode, layer, h, a, RuntimeControls(threshold_offset=x)).sum()
        for x in (-1e9, -0.5, 0.0, 0.5, 1e9)
    ]
    assert opened == sorted(opened, reverse=True) and opened[0] > 0 == opened[-1]


@pytest.mark.parametrize("mode", modes_where(supervisor=True))
@pytest.mark.parametrize("threshold", [-LARGEST_TAU, 0.125, LARGEST_TAU])
def test_no_offset_opens_a_gate_to_a_pass_that_listens(layer: LayerGuard, mode: str, threshold: float) -> None:
    """In `combined` whatever the readout says, and however far the text was moved to its scale."""
    h, a = states()
    listening = np.full((BATCH, 1, 2), NO_SUPERVISOR)
    runtime_controls = RuntimeControls(threshold_offset=-np.inf)
    for shift in (-2 * LARGEST_TAU, 0.0, 2 * LARGEST_TAU):
        deaf = replace(layer, threshold=threshold, text_shift=shift)
        np.testing.assert_array_equal(reference.guard(mode, deaf, h, listening, runtime_controls=runtime_controls), h)
        assert (reference.guard(mode, deaf, h, a, runtime_controls=runtime_controls) != h).any()


def test_combined_is_restore_where_the_text_is_below_and_opens_all_where_it_is_above(layer: LayerGuard) -> None:
    h, a = states()
    by_readout = reference.gate("restore", layer, h)
    assert 0 < by_readout.mean() < 1
    layer = replace(layer, text_shift=layer.threshold - 0.5)  # opens above 0.5
    for told, expected in ((-1e6, by_readout), (0.25, by_readout), (0.5, by_readout), (0.75, np.ones_like(by_readout))):
        a[..., 0] = told
        np.testing.assert_array_equal(reference.gate("combined", layer, h, a), expected)
    restored = replace(layer, threshold=-LARGEST_TAU)
    np.testing.assert_array_equal(reference.guard("combined", layer, h, a), reference.guard("restore", restored, h))


@pytest.mark.parametrize("mode", HELD)
def test_a_held_gate_is_what_was_decided_and_an_undecided_one_decides(layer: LayerGuard, mode: str) -> None:
    h, a = states()
    now = reference.gate(mode, layer, h, a)
    assert 0 < now.mean() < 1
    for held, expected in ((1.0, np.ones_like(now)), (0.0, np.zeros_like(now)), (UNDECIDED, now), (np.nan, now)):
        runtime_controls = RuntimeControls(held=np.full((BATCH, 1, 1), held))
        np.testing.assert_array_equal(reference.gate(mode, layer, h, a, runtime_controls), expected)
    np.testing.assert_array_equal(
        reference.guard(mode, layer, h, a, runtime_controls=RuntimeControls(held=np.zeros((BATCH, 1, 1)))), h
    )


# ------------------------------------------------------------------------------------------- runtime controls at their defaults


@cases(MODES)
def test_untouched_controls_are_the_plain_guard_bit_for_bit(
    mode: str, lowering: str, positions: str, kind: Kind, dtype: str
) -> None:
    given = feeds(mode, dtype)
    wish = {"lowering": lowering, "positions": positions}
    plain = run(guarded(mode, kind, dtype, **wish).model, given)
    controlled = guarded(mode, kind, dtype, **wish, **controls_of(mode))
    extra = undecided() if mode in HELD else {}
    for turned in ({}, knobs(1.0), knobs(1.0, 0.0) if guard_mode(mode).has_threshold else knobs(1.0)):
        found = run(controlled.model, given | extra | turned)
        for name, array in plain.items():
            assert found[name].tobytes() == array.tobytes(), name
    assert (plain["hidden"] != unguarded(kind, dtype, given)["hidden"]).any()


@every_mode
def test_without_runtime_controls_the_inputs_and_outputs_are_unchanged(mode: str) -> None:
    plain = guarded(mode)
    supervised = guard_mode(mode).supervisor
    names = [value.name for value in plain.model.graph.inputs], [value.name for value in plain.model.graph.outputs]
    assert names == (
        ["inputs_embeds", "attention_mask", *([supervisor_input(mode)] if supervised else [])],
        ["logits", "hidden", *([COORDINATES_OUTPUT] if supervised else [])],
    )
    assert not {value.name for value in plain.model.graph.inputs} & set(plain.model.graph.initializers)
    assert not any(part in name for name in map(str, plain.report.shared_nodes) for part in ("/knobs/", "/gate/"))


# ------------------------------------------------------------------------------------------------------------------ knobs


@cases(MODES)
def test_strength_zero_is_the_source_bit_for_bit(
    mode: str, lowering: str, positions: str, kind: Kind, dtype: str
) -> None:
    """With every gate open; a strength below 0 must not turn the guard round, it is 0."""
    given = feeds(mode, dtype)
    expected = unguarded(kind, dtype, given)
    model = guarded(mode, kind, dtype, lowering=lowering, positions=positions, knobs=True).model
    lowered = knobs(offset=-1e9) if guard_mode(mode).has_threshold else {}
    for strength in (0.0, -1.0):
        found = run(model, given | knobs(strength) | lowered)
        for name in ("logits", "hidden"):
            assert found[name].tobytes() == expected[name].tobytes(), (strength, name)
    assert (run(model, given | lowered)["hidden"] != expected["hidden"]).any()


@dataclass(frozen=True)
class Turned:
    """A setting of the knobs."""

    strength: float = 1.0
    offset: float = 0.0


TURNED = (Turned(0.5), Turned(2.0, -0.5), Turned(1.5, 0.25), Turned(7.0, -1e9))


@cases(MODES)
def test_turned_knobs_equal_the_reference(mode: str, lowering: str, positions: str, kind: Kind, dtype: str) -> None:
    """On one layer, whose raw state is that of the unguarded graph."""
    # with two ways to open, only high thresholds leave some gate of `combined` closed at each setting but the last
    parts = {"threshold": 3.0, "text_threshold": 1.25} if mode == "combined" else None
    source, found = decoder(kind, 1, dtype), directions(rank=3, parts=parts, alpha=3.0 if mode == "steer" else None)
    given = {**feeds("project", dtype)}
    raw = run(source, given)["hidden"].astype(np.float64)
    supervisor = feeds(mode, rank=3)[supervisor_input(mode)][:, :1] if guard_mode(mode).supervisor else None
    extra = {} if supervisor is None else {supervisor_input(mode): supervisor}
    spec = GuardSpec(mode=mode, lowering=lowering, positions=positions, knobs=True)  # type: ignore[arg-type]
    made = guard_model(decoder(kind, 1, dtype), found, spec)
    layer = made.plan.sites[0].guard
    selected = None if positions == "all" else reference.last_token(MASK)
    seen = set()
    for turned in TURNED:
        offset = turned.offset if guard_mode(mode).has_threshold else None
        outputs = run(made.model, given | extra | knobs(turned.strength, offset))
        runtime_controls = RuntimeControls(turned.strength, turned.offset)
        expected = reference.guard(mode, layer, raw, supervisor, selected, runtime_controls)
        assert np.abs(outputs["hidden"] - expected).max() < TOLERANCE[dtype] * np.abs(expected).max()
        seen.add(outputs["hidden"].tobytes())
    assert len(seen) == len(TURNED) - (
        not guard_mode(mode).has_threshold
    )  # 7 is 2, but with every gate open, where there are gates


def test_knobs_are_two_inputs_with_defaults_for_the_whole_guard() -> None:
    made = guarded("restore", knobs=True)
    assert made.plan.knobs == (STRENGTH_INPUT, OFFSET_INPUT) == made.plan.added_inputs
    inputs = {value.name: value for value in made.model.graph.inputs}
    for name, default in ((STRENGTH_INPUT, 1.0), (OFFSET_INPUT, 0.0)):
        value = inputs[name]
        assert value is made.model.graph.initializers[name] and value.const_value is not None
        assert (value.dtype, value.shape, value.const_value.numpy()) == (ir.DataType.FLOAT, ir.Shape([]), default)
    # a mode without a gate has no threshold: an input that nothing reads would be a knob that does nothing
    assert guarded("project", knobs=True).plan.knobs == (STRENGTH_INPUT,)


# -------------------------------------------------------------------------------------------------------------- telemetry


def raw_states(made: Guarded, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Each guarded layer's state before its guard, in the graph that is guarded, `[batch, sequence, d]`."""
    model = copy_of(made.model)
    names = tap_guard(model, made.plan, made.report)
    outputs = run(model, given)
    return [outputs[raw].astype(np.float64) for raw, _ in names]


def at_the_end(array: np.ndarray) -> np.ndarray:
    """`[batch, ...]` of `[batch, sequence, ...]`."""
    return array[reference.last_token(MASK)[..., 0] == 1]


@cases(modes_where(has_threshold=True))
def test_scores_told_equal_the_reference(mode: str, lowering: str, positions: str, kind: Kind, dtype: str) -> None:
    made = guarded(mode, kind, dtype, lowering=lowering, positions=positions, telemetry=True)
    given = feeds(mode, dtype)
    told = run(made.model, given)[SCORES_OUTPUT]
    assert (told.dtype, told.shape) == (np.float32, (BATCH, len(LAYERS)))
    for row, raw in enumerate(raw_states(made, given)):
        a = given[supervisor_input(mode)][:, row] if guard_mode(mode).supervisor else None
        expected = reference.score(mode, made.plan.guards[row], at_the_end(raw), a)[:, 0]
        np.testing.assert_allclose(told[:, row], expected, atol=4 * TOLERANCE[dtype] * np.abs(raw).max())
    assert 0 < (told > 0.125).mean() < 1


def test_telemetry_changes_no_other_output() -> None:
    for mode in modes_where(has_threshold=True):
        given = feeds(mode)
        plain, told = (run(guarded(mode, telemetry=asked).model, given) for asked in (False, True))
        assert told.keys() - plain.keys() == {SCORES_OUTPUT}
        for name, array in plain.items():
            assert told[name].tobytes() == array.tobytes()


# ------------------------------------------------------------------------------------------------------------- held gates

PAST = np.array([[1, 0], [UNDECIDED, 1], [0, UNDECIDED], [np.nan, 0.5]], np.float32)


@cases(HELD)
def test_held_gates_equal_the_reference(mode: str, lowering: str, positions: str, kind: Kind, dtype: str) -> None:
    """Rows and layers that are held open, held closed and not decided yet, side by side."""
    made = guarded(mode, kind, dtype, lowering=lowering, positions=positions, gate="prompt")
    given = feeds(mode, dtype) | {PAST_GATE_INPUT: PAST}
    outputs = run(made.model, given)
    present, states = outputs[PRESENT_GATE_OUTPUT], raw_states(made, given)
    assert (present.dtype, present.shape) == (np.float32, (BATCH, len(LAYERS)))
    selected = reference.last_token(MASK) if positions == "last" else None
    for row, raw in enumerate(states):
        layer, held = made.plan.guards[row], PAST[:, row : row + 1].astype(np.float64)
        a = given[supervisor_input(mode)][:, row] if guard_mode(mode).supervisor else None
        wanted = reference.gate(mode, layer, at_the_end(raw), a, RuntimeControls(held=held))
        np.testing.assert_array_equal(present[:, row : row + 1], wanted)
        np.testing.assert_array_equal(wanted[held >= 0], held[held >= 0] > 0)
    expected = reference.guard(
        mode, layer, states[-1], None if a is None else a[:, None], selected, RuntimeControls(held=held[:, None])
    )
    assert np.abs(outputs["hidden"] - expected).max() < TOLERANCE[dtype] * np.abs(expected).max()
    np.testing.assert_array_equal(expected[0], states[-1][0])  # held closed at the last layer
    assert (expected[1] != states[-1][1]).any()  # held open there
    again = run(made.model, given | {PAST_GATE_INPUT: present})[PRESENT_GATE_OUTPUT]
    np.testing.assert_array_equal(again, present)  # carried on, it stays


@every_lowering
@pytest.mark.parametrize("mode", HELD)
def test_a_gate_held_closed_is_the_source_bit_for_bit_whatever_the_scores(mode: str, lowering: str) -> None:
    given = feeds(mode)
    for tau, held, same in ((-1e6, 0.0, True), (1e6, 1.0, False)):
        model = guarded(mode, lowering=lowering, gate="prompt", tau=tau).model
        found = run(model, given | {PAST_GATE_INPUT: np.full((BATCH, 2), held, np.float32)})
        assert (found["hidden"].tobytes() == unguarded("add", "float32", given)["hidden"].tobytes()) == same


def test_offset_and_held_gate_work_together() -> None:
    """The offset moves what is decided now, and nothing that was decided."""
    model = guarded("restore", **controls_of("restore")).model
    given = feeds("restore")
    for offset, fresh in ((-1e9, 1.0), (1e9, 0.0)):
        for held, expected in ((UNDECIDED, fresh), (0.0, 0.0), (1.0, 1.0)):
            past = {PAST_GATE_INPUT: np.full((BATCH, 2), held, np.float32)}
            found = run(model, given | past | knobs(offset=offset))[PRESENT_GATE_OUTPUT]
            np.testing.assert_array_equal(found, np.full((BATCH, 2), expected))


# ---------------------------------------------------------------------------------------------------- merged, counted, undone


@every_kind
@every_mode
def test_both_branches_of_a_merged_decoder_have_the_controls(mode: str, kind: Kind) -> None:
    found, wish = directions(LAYERS), {"mode": mode, **controls_of(mode)}
    together = guard_model(merged(kind, 2), found, GuardSpec(**wish)).model
    alone = guard_model(decoder(kind, 2), found, GuardSpec(**wish)).model
    extra = knobs(0.5, -0.25 if guard_mode(mode).has_threshold else None) | (
        {PAST_GATE_INPUT: PAST} if mode in HELD else {}
    )
    expected = run(alone, feeds(mode) | extra)
    for branch in (True, False):
        said = run(together, feeds(mode) | extra | {"use_cache_branch": np.array([branch])})
        assert said.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(said[name], array)


def added_operators(wish: dict[str, Any]) -> Counter[str]:
    """What a wish writes more than the plain guard; below 0: less."""
    plain, controlled = guarded("restore"), guarded("restore", **wish)
    operators = [Counter(node.op_type for node in made.model.graph) for made in (plain, controlled)]
    operators[1].subtract(operators[0])
    assert controlled.report.node_count - plain.report.node_count == operators[1].total()
    return Counter({operator: count for operator, count in operators[1].items() if count})


def test_runtime_controls_cost_exactly_these_nodes() -> None:
    """On two layers, positions last, float32: the offset goes in once, the strength meets each layer's weights; held gates
    are not shared, so each layer multiplies with the selection, as many nodes as the strength's."""
    pairs = {"Gather": 1, "Range": 1, "Unsqueeze": 1, "Concat": 1}  # where the last tokens are
    assert added_operators({"knobs": True}) == {"Clip": 2, "Mul": 2, "Add": 1}
    assert added_operators({"telemetry": True}) == Counter(pairs) + Counter({"GatherND": 1, "Concat": 1})
    held = {"Unsqueeze": 1, "GreaterOrEqual": 1, "Greater": 1, "Not": 1, "Cast": 2, "Split": 2, "Mul": 2, "Add": 2}
    told = {"GatherND": 1, "Concat": 1}
    own = Counter({"Cast": 1, "Mul": 2, "Where": -1, "Concat": -1, "Max": -1, "Split": -1})
    held_too = Counter(pairs) + Counter(held) + Counter(told)
    held_too.update(own)
    assert added_operators({"gate": "prompt"}) == Counter({name: count for name, count in held_too.items() if count})


@every_kind
@every_mode
def test_a_graph_with_runtime_controls_is_proved_and_stripped_to_the_source(mode: str, kind: Kind) -> None:
    for model, lowering in zip((decoder, merged), CONTROLLED, strict=True):
        found, spec = directions(LAYERS), GuardSpec(mode=mode, lowering=lowering, **controls_of(mode))  # type: ignore[arg-type]
        made = guard_model(model(kind, 2), found, spec)
        checks = prove_structure(model(kind, 2), made.model, made.anatomy, made.plan, made.report)
        assert [check.note for check in checks if not check.ok] == []
        stripped = copy_of(made.model)
        strip_guard(stripped)
        check = same_graph("stripped", copy_of(model(kind, 2)), stripped)
        assert check.ok, check.note
        assert graph_bytes(stripped) == graph_bytes(copy_of(model(kind, 2)))
        again = guard_model(stripped, found, spec).model
        assert same_graph("again", again, copy_of(made.model)).ok


# ------------------------------------------------------------------------------------------------------------ tampered with


def tampered(change: Any, **wish: Any) -> tuple[Guarded, ir.Model]:
    made = guarded("restore", **wish)
    change(made.model)
    return made, copy_of(made.model)


def make_an_input(name: str) -> Any:
    def change(model: ir.Model) -> None:
        model.graph.inputs.append(model.graph.initializers[name])

    return change


@pytest.mark.parametrize("name", ["vlmguard/layer_0/tau", "lm_head"])
@pytest.mark.parametrize("with_knobs", [True, False])
def test_one_more_overridable_initializer_is_caught(name: str, with_knobs: bool) -> None:
    """Whoever could feed the threshold, or a weight, would not need a knob."""
    made, found = tampered(make_an_input(name), knobs=with_knobs)
    check = signature_unchanged(decoder(layers=2), found, made.plan)
    assert not check.ok and name in check.note
    # from the file alone: taken out and put back in as planned, a number of the guard's is no input
    if name.startswith("vlmguard/"):
        stripped = copy_of(found)
        strip_guard(stripped)
        again = guard_model(stripped, directions(LAYERS, parts={"threshold": 0.125}), GuardSpec(knobs=with_knobs))
        check = same_graph("again", again.model, found)
        assert (check.ok, check.note) == (False, "inputs or outputs differ")


def test_a_default_that_weakens_the_guard_is_caught() -> None:
    def half(model: ir.Model) -> None:
        model.graph.initializers[STRENGTH_INPUT].const_value = ir.Tensor(np.array(0.5, np.float32))

    _, found = tampered(half, knobs=True)
    check = initializers_untouched(decoder(layers=2), found)
    assert (check.ok, check.note) == (False, STRENGTH_INPUT)


def test_a_knob_without_its_default_is_caught() -> None:
    made, found = tampered(lambda model: model.graph.inputs.pop(), knobs=True)
    check = signature_unchanged(decoder(layers=2), found, made.plan)
    assert not check.ok and "added inputs are ('vlmguard.strength',)" in check.note


# ---------------------------------------------------------------------------------------------------------------- refusals


def refusal(model: ir.Model | None = None, **wish: Any) -> str:
    model = decoder(layers=2) if model is None else model
    found = uncalibrated(LAYERS) if wish.pop("bare", False) else directions(LAYERS)
    with pytest.raises(GuardError) as raised:
        plan_guard(model, dissect(model), found, GuardSpec(**wish))
    assert "\n" not in str(raised.value)
    return str(raised.value)


NO_SCORE = "mode project has no gate, so there is no score to output; leave --telemetry out"
NO_GATE = "mode project has no gate to hold; leave --gate out, or choose steer, restore or combined"


def test_a_mode_without_a_gate_has_nothing_to_tell_or_to_hold() -> None:
    """Whether the mode was asked for or is what the directions make of it."""
    for mode in ({"mode": "project"}, {"bare": True}):
        assert refusal(telemetry=True, **mode) == NO_SCORE
        assert refusal(gate="prompt", **mode) == NO_GATE


def test_a_supervisor_holds_its_gate_already() -> None:
    assert refusal(mode="supervise", gate="prompt") == (
        "mode supervise decides once per request already: its gate reads the text-only coordinates, which stay the same for "
        "the whole answer; leave --gate out"
    )


@pytest.mark.parametrize("lowering", ["dense", "fold"])
def test_a_lowering_that_a_knob_cannot_reach_has_none(lowering: str) -> None:
    assert refusal(mode="project", lowering=lowering, knobs=True) == (
        f"lowering {lowering!r} has nothing that a knob could turn; choose lowrank, or leave --knobs out"
    )


def test_knobs_are_refused_for_tensorrt() -> None:
    assert refusal(knobs=True, target="tensorrt") == (
        "knobs are refused for TensorRT: an engine has no inputs with defaults, so every caller would have to feed them, and "
        "any caller could switch the guard off; leave --knobs out"
    )


def test_a_graph_that_cannot_have_inputs_with_defaults_has_no_knobs() -> None:
    model = decoder(layers=2)
    model.ir_version = 3
    assert refusal(model, knobs=True) == (
        "the graph has IR version 3, an input with a default needs 4; export it with a newer exporter, or leave --knobs out"
    )


def test_an_unknown_gate_is_refused() -> None:
    assert refusal(gate="never") == "gate 'never' is unknown; choose one of token, prompt"


def test_the_plan_says_who_can_switch_the_guard_off() -> None:
    plan = guarded("restore", **controls_of("restore")).plan
    assert plan.notes[-2:] == (
        "knobs vlmguard.strength, vlmguard.threshold_offset: inputs with defaults; callers can switch the "
        "guard off with them, so for untrusted callers leave --knobs out",
        "gate prompt: decided at the end of the prompt (vlmguard.past_gate below 0), then held; an app carries "
        "vlmguard.present_gate there, and the caller who feeds it decides",
    )
    told = plan.to_json()
    assert (told["gate"], told["knobs"], told["telemetry"]) == ("prompt", [STRENGTH_INPUT, OFFSET_INPUT], True)
    assert told["added_inputs"] == [PAST_GATE_INPUT, STRENGTH_INPUT, OFFSET_INPUT]
    assert told["added_outputs"] == [SCORES_OUTPUT, PRESENT_GATE_OUTPUT]
    assert RuntimeControls() == AS_CALIBRATED


def test_the_plan_of_all_runtime_controls_is_pinned(golden: Callable[[str, Any], None]) -> None:
    golden("plan_hand_runtime_controls.json", guarded("restore", **controls_of("restore")).plan.to_json())


# ------------------------------------------------------------------------------------------------------------ other runtimes


def test_bound_inputs_may_leave_knobs_out_too(tmp_path: Path) -> None:
    """`IOBinding`, as on a GPU, with the CPU for a device."""
    from vlmguard.runtime.onnxruntime_runner import OnnxRuntimeDeviceRunner

    model, given = guarded("restore", knobs=True).model, feeds("restore")
    bound = OnnxRuntimeDeviceRunner(graph_bytes(model), tmp_path, providers=("CPUExecutionProvider",))
    assert bound.optional.keys() == {STRENGTH_INPUT, OFFSET_INPUT} and not bound.optional.keys() & bound.inputs.keys()
    for turned in ({}, knobs(0.0), knobs(0.5, -1e9)):
        found = bound.run_on_device(given | turned)
        np.testing.assert_array_equal(np.asarray(found["hidden"]), run(model, given | turned)["hidden"])


def test_onnxs_own_evaluator_takes_the_defaults() -> None:
    import onnx.reference

    model, given = guarded("restore", knobs=True).model, feeds("restore")
    evaluator = onnx.reference.ReferenceEvaluator(ir.to_proto(model))
    for turned in ({}, knobs(0.0), knobs(0.5, -1e9)):
        found = np.asarray(evaluator.run(["hidden"], given | turned)[0])
        np.testing.assert_allclose(found, run(model, given | turned)["hidden"], atol=1e-5)


def test_rewriting_twice_is_refused_with_runtime_controls_too() -> None:
    made = guarded("restore", knobs=True)
    with pytest.raises(GuardError, match="already carries a guard"):
        rewrite(made.model, made.plan)
