"""Each guard by itself: an untouched one passes, in every mode, dtype and spelling; each kind of damage fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hand_graphs import WIDTH, copy_of, decoder, directions, guard_model, layer_directions, merged
from onnx import helper, numpy_helper

from vlmguard.exporter.proof.local_findings import BITS, GUARD_OUTPUTS, READS, STATES
from vlmguard.exporter.proof.prove_local import prove_locally
from vlmguard.graphs.directions import Directions
from vlmguard.graphs.graph_io import save_graph
from vlmguard.graphs.modes import MODES, guard_mode
from vlmguard.graphs.proof.structure import Check
from vlmguard.graphs.spec import GuardSpec

pytest.importorskip("onnxruntime")

ALL_CONTROLS = {"knobs": True, "telemetry": True, "gate": "prompt"}
Tamper = Callable[[onnx.ModelProto], None]


def prove(
    folder: Path,
    spec: GuardSpec,
    tamper: Tamper | None = None,
    make: Callable[..., Any] = decoder,
    found: Directions | None = None,
    **options: Any,
) -> dict[str, Check]:
    """Guard layers 0 and 1, write the file, change it, and prove each guard by itself."""
    found = directions((0, 1), alpha=2.0) if found is None else found
    done = guard_model(make(layers=2, **options), found, spec)
    staged = folder / "guarded.onnx"
    save_graph(done.model, staged)
    if tamper is not None:
        model = onnx.load(staged)
        tamper(model)
        onnx.save(model, staged)
    checks = prove_locally(staged, done.plan, done.report)
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def failing(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if not check.ok}


def wishes() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    for mode, positions, lowering in product(MODES, ("last", "all"), ("lowrank", "rank1")):
        if (mode, positions) != ("align", "all"):
            yield mode, positions, lowering, {}
    yield from (("project", positions, "dense", {}) for positions in ("last", "all"))
    yield from ((mode, "last", "lowrank", {"knobs": True}) for mode in ("project", "align"))
    yield "supervise", "prompt", "lowrank", {}
    yield "supervise", "last", "rank1", {"knobs": True, "telemetry": True}
    yield from ((mode, "last", "lowrank", ALL_CONTROLS) for mode in ("steer", "restore", "combined"))
    yield "combined", "all", "rank1", ALL_CONTROLS


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wish", wishes(), ids=str)
def test_an_untouched_guard_is_proved(tmp_path: Path, wish: tuple, dtype: str) -> None:
    mode, positions, lowering, more = wish
    checks = prove(tmp_path, GuardSpec(mode, positions=positions, lowering=lowering, **more), dtype=dtype)
    assert not failing(checks), {name: check.note for name, check in checks.items() if not check.ok}
    bits = [] if (mode, positions, more) == ("project", "all", {}) else [BITS]
    told = [GUARD_OUTPUTS] if guard_mode(mode).supervisor or "telemetry" in more else []
    assert list(checks) == [READS, STATES, *bits, *told]
    assert checks[STATES].note.startswith(f"{checks[STATES].compared // WIDTH} states of 2 guards in ")


@pytest.mark.parametrize("make", [decoder, merged], ids=["one body", "two branches"])
@pytest.mark.parametrize("kind", ["add", "skip_norm", "skip_norm_bias"])
@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_site_in_every_body_is_proved(
    tmp_path: Path, make: Callable[..., Any], kind: str, mode: str
) -> None:
    checks = prove(tmp_path, GuardSpec(mode), make=make, kind=kind)
    assert not failing(checks), {name: check.note for name, check in checks.items() if not check.ok}
    guards = 4 if make is merged else 2
    assert f"states of {guards} guards in " in checks[STATES].note
    assert checks[READS].note == f"{guards} guards in {'2 bodies' if make is merged else '1 body'}"


@pytest.mark.parametrize("kind", ["skip_norm", "skip_norm_bias"])
def test_two_shares_of_a_state_at_the_limit_of_float16_add_up_to_a_finite_one(tmp_path: Path, kind: str) -> None:
    """Rounded to the nearest, they can exceed it by half a unit, and the sum is infinite."""
    checks = prove(tmp_path, GuardSpec("project", positions="all"), kind=kind, dtype="float16")
    assert not failing(checks), {name: check.note for name, check in checks.items() if not check.ok}


def test_a_graph_without_a_mask_is_proved(tmp_path: Path) -> None:
    assert not failing(prove(tmp_path, GuardSpec("restore"), mask=False))


# ---------------------------------------------------------------------------------------------------------- tampered with


def named(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == f"vlmguard/{name}")


def numbers(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Tamper:
    def tamper(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == f"vlmguard/{name}")
        array = numpy_helper.to_array(tensor)
        changed = np.asarray(change(array), dtype=array.dtype).reshape(array.shape)
        assert not np.array_equal(changed, array)
        tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))

    return tamper


def operator(name: str, op_type: str) -> Tamper:
    def tamper(model: onnx.ModelProto) -> None:
        named(model, name).op_type = op_type

    return tamper


def reads(name: str, at: int, source: str) -> Tamper:
    def tamper(model: onnx.ModelProto) -> None:
        named(model, name).input[at] = source

    return tamper


def only_in_short_calls(model: onnx.ModelProto) -> None:
    """Nodes that no report names decide whether layer 1 is edited."""
    add = named(model, "layer_1/guarded")
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "tampered/one"))
    new = [
        helper.make_node("Equal", ["vlmguard/positions/sequence", "tampered/one"], ["tampered/when"]),
        helper.make_node("Cast", ["tampered/when"], ["tampered/factor"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", [add.input[1], "tampered/factor"], ["tampered/delta"]),
    ]
    at = list(model.graph.node).index(add)
    for offset, node in enumerate(new):
        model.graph.node.insert(at + offset, node)
    next(node for node in model.graph.node if node.name == add.name).input[1] = "tampered/delta"


DAMAGES: dict[str, tuple[str, Tamper, set[str]]] = {
    "V along another direction": ("restore", numbers("layer_1/ssd", lambda a: np.roll(a, 1)), {STATES}),
    "V with the other sign": ("restore", numbers("layer_0/ssd", np.negative), {STATES}),
    "V off by a hundredth": ("restore", numbers("layer_0/ssd", lambda a: 1.01 * a), {STATES}),
    "V of the projection": ("project", numbers("layer_1/ssd", lambda a: 0.99 * a), {STATES}),
    "the rows that are read": (
        "restore",
        numbers("layer_0/rows", lambda a: np.roll(a, 1, axis=1)),
        {STATES, GUARD_OUTPUTS},
    ),
    "target": ("restore", numbers("layer_1/target", lambda a: a + 0.1), {STATES}),
    "tau raised by a hundredth": ("restore", numbers("layer_1/tau", lambda a: a + 0.01), {STATES, GUARD_OUTPUTS}),
    "tau lowered by a hundredth": (
        "restore",
        numbers("layer_1/tau", lambda a: a - 0.01),
        {STATES, BITS, GUARD_OUTPUTS},
    ),
    "tau of steer": ("steer", numbers("layer_0/tau", lambda a: a - 0.01), {STATES, BITS, GUARD_OUTPUTS}),
    "tau of supervise, one step": (
        "supervise",
        numbers("layer_0/tau", lambda a: np.nextafter(a, np.float32(1))),
        {STATES},
    ),
    "alpha of steer": ("steer", numbers("layer_0/alpha", lambda a: 0.99 * a), {STATES}),
    "alpha of supervise": ("supervise", numbers("layer_0/alpha", lambda a: 0.99 * a), {STATES}),
    "origin": ("supervise", numbers("layer_0/origin", lambda a: a + 0.1), {STATES}),
    "text that opens no gate": ("combined", numbers("layer_0/text_shift", lambda a: a - 1e6), {STATES, GUARD_OUTPUTS}),
    "text that opens every gate": (
        "combined",
        numbers("layer_1/text_shift", lambda a: a + 1e6),
        {STATES, BITS, GUARD_OUTPUTS},
    ),
    "a gate that opens in a listening pass": (
        "combined",
        numbers("layer_1/score_cap", lambda a: 1e38 + a),
        {STATES, BITS, GUARD_OUTPUTS},
    ),
    "a gate turned round": ("restore", operator("layer_0/opens", "Less"), {STATES, BITS, GUARD_OUTPUTS}),
    "a gate that is not strict": ("supervise", operator("gates/opens", "GreaterOrEqual"), {STATES, BITS}),
    "another token": (
        "restore",
        reads("positions/last", 1, "vlmguard/positions/here_int"),
        {STATES, BITS, GUARD_OUTPUTS},
    ),
    "every token": ("restore", operator("positions/is_last", "LessOrEqual"), {STATES, BITS}),
    "a missing edit": ("restore", reads("layer_1/guarded", 1, "vlmguard/layer_0/delta"), {STATES, BITS}),
    "an edit of the wrong sign": ("steer", operator("layer_0/guarded", "Sub"), {STATES}),
    "another stream": ("restore", reads("layer_1/read", 0, "layer_0_branch"), {READS}),
    "nodes that no report names": ("restore", only_in_short_calls, {READS}),
    "a strength that a layer does not obey": (
        "restore",
        reads("layer_0/weights_selected", 1, "vlmguard/positions/selected_float32"),
        {STATES, BITS},
    ),
    "a strength that may be negative": (
        "restore",
        reads("knobs/strength", 1, "vlmguard/knobs/threshold_offset_lowest"),
        {STATES, BITS},
    ),
    "a strength that may be 3": ("restore", numbers("knobs/strength_highest", lambda a: a + 1), {STATES}),
    "an offset turned round": ("restore", operator("layer_0/threshold", "Sub"), {STATES, BITS, GUARD_OUTPUTS}),
    "a held gate that is decided again": (
        "restore",
        reads("layer_1/gate_now", 1, "vlmguard/knobs/strength"),
        {STATES, BITS, GUARD_OUTPUTS},
    ),
    "a held gate that is not kept open": (
        "restore",
        reads("layer_1/gate_held", 1, "vlmguard/gate/zero"),
        {STATES, GUARD_OUTPUTS},
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_guard_is_not_proved(tmp_path: Path, what: str) -> None:
    mode, tamper, expected = DAMAGES[what]
    gate = {"gate": "prompt"} if mode not in ("project", "supervise") else {}
    telemetry = {"telemetry": True} if mode != "project" else {}
    checks = prove(tmp_path, GuardSpec(mode, knobs=True, **telemetry, **gate), tamper)
    failed = failing(checks)
    if READS in expected:  # what reads something else is not run
        assert READS in failed and "which is neither its stream nor one of its inputs" in checks[READS].note
    else:
        assert failed == expected, {name: check.note for name, check in checks.items()}


SHARED_DAMAGES = {
    "thresholds in another order": ("restore", {}, reads("gates/thresholds", 0, "vlmguard/layer_1/tau")),
    "the level of another layer": ("restore", {}, reads("layer_1/opens", 1, "vlmguard/gates/level_of_layer_0")),
    "tokens that are edited nowhere": ("steer", {}, reads("gates/floor", 1, "vlmguard/gates/beyond")),
    "tokens that are edited everywhere": ("combined", {}, reads("gates/floor", 2, "vlmguard/gates/below")),
    "an offset that no gate obeys": (
        "restore",
        {"knobs": True},
        reads("gates/levels_selected", 0, "vlmguard/gates/thresholds"),
    ),
    "the decision of another layer": ("supervise", {}, reads("layer_1/weights", 0, "vlmguard/gates/gate_of_layer_0")),
    "a decision at every token": ("supervise", {}, reads("gates/gates_selected", 1, "vlmguard/gates/gates")),
    "the text of another layer": (
        "supervise",
        {},
        reads("layer_1/supervisor_centred", 0, "vlmguard/supervisor/layer_0"),
    ),
}


@pytest.mark.parametrize("what", SHARED_DAMAGES)
def test_damage_to_what_all_layers_share_is_not_proved(tmp_path: Path, what: str) -> None:
    mode, controls, tamper = SHARED_DAMAGES[what]
    apart = {number: layer_directions(seed=number, threshold=0.125 - 0.5 * number) for number in (0, 1)}
    checks = prove(tmp_path, GuardSpec(mode, **controls), tamper, found=Directions(width=WIDTH, layers=apart))  # type: ignore[arg-type]
    assert STATES in failing(checks), {name: check.note for name, check in checks.items()}


def test_every_check_can_fail() -> None:
    assert set.union(*(expected for _, _, expected in DAMAGES.values())) == {READS, STATES, BITS, GUARD_OUTPUTS}


def every_part(model: onnx.ModelProto) -> Iterator[tuple[str, Tamper]]:
    """Damage to each number of the guard, one at a time."""
    for tensor in model.graph.initializer:
        if tensor.name.startswith("vlmguard/layer_"):
            name = tensor.name.removeprefix("vlmguard/")
            # `score_cap` is a limit far beyond every score: half as much again is still one
            changed = (lambda array: array * 0) if name.endswith("/score_cap") else (lambda array: array * 1.5 + 0.25)
            yield name, numbers(name, changed)


@pytest.mark.parametrize("lowering", ["lowrank", "rank1"])
@pytest.mark.parametrize("mode", MODES)
def test_each_number_of_each_guard_matters(tmp_path: Path, mode: str, lowering: str) -> None:
    """No initializer of a site can be changed without a check that fails."""
    spec = GuardSpec(mode, lowering=lowering)  # type: ignore[arg-type]
    done = guard_model(decoder(layers=2), directions((0, 1), alpha=2.0), spec)
    names = [name for name, _ in every_part(onnx.load_from_string(_bytes(done.model)))]
    assert len(names) >= 2
    for number, (name, tamper) in enumerate(every_part(onnx.load_from_string(_bytes(done.model)))):
        (tmp_path / str(number)).mkdir()
        assert failing(prove(tmp_path / str(number), spec, tamper)), name


def _bytes(model: Any) -> bytes:
    from vlmguard.graphs.graph_io import graph_bytes

    return graph_bytes(copy_of(model))
