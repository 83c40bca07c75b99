"""Every dynamic check of the proof passes on the file that was made, and FAILS on a file that was tampered with.

The tampering is done to the staged ONNX file, by the names that the guard gives its nodes and numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from random_directions import random_directions
from tiny_vlm_paths import CALIBRATION, DECODER, SOURCE

from vlmguard.exporter.artifact.guarded_folder import GuardedDecoder
from vlmguard.exporter.prompts.labelled import read_prompts
from vlmguard.exporter.proof import prove as module
from vlmguard.exporter.proof import prove_closed
from vlmguard.exporter.proof.compare import Comparison
from vlmguard.exporter.proof.inputs import ProofInputs, proof_inputs, random_inputs
from vlmguard.exporter.proof.prove import prove_by_running
from vlmguard.exporter.proof.prove_decoder import prove_decoder
from vlmguard.graphs.anatomy import DecoderAnatomy, dissect
from vlmguard.graphs.errors import ProofFailed
from vlmguard.graphs.graph_io import save_graph
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.modes import MODES, POSITIONS, guard_mode
from vlmguard.graphs.package import ModelPackage
from vlmguard.graphs.plan import GuardPlan
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.progress import ignore_progress
from vlmguard.graphs.proof.structure import Check
from vlmguard.graphs.reference import NO_SUPERVISOR, LayerGuard
from vlmguard.graphs.rewrite import GuardReport, rewrite
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.decoder import open_decoder
from vlmguard.runtime.vlm import VisionLanguageModel

pytest_plugins = ("zoo_fixtures",)

CLOSED = "closed gate equals the original bit for bit"
REFERENCE = "guarded states equal the numpy reference"
FORCED = "guarded states equal the numpy reference (gates forced open)"
WITHOUT_SUPERVISOR = "guarded states equal the numpy reference (no supervisor)"
UNSUPERVISED = "calls without a supervisor equal the original bit for bit"
UNEDITED = "tokens outside the positions are untouched bit for bit"


@dataclass(frozen=True)
class Staged:
    """A guarded decoder as it lies in the staging folder, and all that the proof needs."""

    package: ModelPackage
    anatomy: DecoderAnatomy
    plan: GuardPlan
    report: GuardReport
    folder: Path
    inputs: ProofInputs

    @property
    def decoder(self) -> Path:
        return self.folder / DECODER

    def run(self) -> dict[str, Check]:
        checks = prove_by_running(self.package, self.decoder, self.plan, self.report, self.inputs)
        assert len({check.name for check in checks}) == len(checks)
        return {check.name: check for check in checks}

    def whole(self) -> tuple[Check, ...]:
        decoder = GuardedDecoder(self.package, self.anatomy, self.plan)
        return prove_decoder(decoder, self.report, self.folder, self.inputs, ignore_progress)


@pytest.fixture(scope="module")
def inputs() -> ProofInputs:
    """Eight prompts in two batches, texts and pictures, of several lengths."""
    model = VisionLanguageModel(open_package(SOURCE))
    rows = read_prompts(CALIBRATION)
    some = [row for setting in ("text", "image") for row in [r for r in rows if r.setting == setting][3:60:16]]
    found = proof_inputs(model, [row.request(model) for row in some])
    assert len(found.batches) == 2 and not all(batch.mask.all() for batch in found.batches)
    return found


# Thresholds for the text of `combined`, in the middle of what the inputs' texts read along row 1 of the random directions.
TEXTS = {2: 0.45, 4: -0.3}


@pytest.fixture
def stage(inputs: ProofInputs, tmp_path: Path) -> Callable[..., Staged]:
    """`stage(mode, positions)`: random directions on two layers, thresholds that some states pass; written to a file."""

    def make(mode: Any, positions: Any = "last") -> Staged:
        package = open_package(SOURCE)
        graph = package.load_decoder()
        anatomy = dissect(graph)
        spec = GuardSpec(
            mode, positions=positions, alpha=1.5 if mode in ("steer", "supervise") else None, layers=(2, 4)
        )
        found = random_directions(anatomy.width, [2, 4])
        for layer, middle in TEXTS.items():
            found.layers[layer] = replace(found.layers[layer], text_threshold=middle)
        plan = plan_guard(graph, anatomy, found, spec)
        report = rewrite(graph, plan)
        staged = Staged(package, anatomy, plan, report, tmp_path, inputs)
        staged.decoder.parent.mkdir(exist_ok=True)
        save_graph(graph, staged.decoder)
        return staged

    return make


def failing(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if not check.ok}


# ----------------------------------------------------------------------------------------------------------- untouched


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mode", MODES)
def test_an_untouched_file_is_proved(stage: Callable[..., Staged], mode: str, positions: str) -> None:
    staged = stage(mode, positions)
    checks = staged.run()
    unsupervised_check = [WITHOUT_SUPERVISOR] if guard_mode(mode).supervisor else []
    others = [UNEDITED] if positions != "all" else []
    unsupervised, forced = ([UNSUPERVISED], []) if mode == "align" else ([], [FORCED] if mode != "project" else [])
    expected = [CLOSED, *unsupervised, REFERENCE, *forced, *unsupervised_check, *others]
    assert list(checks) == expected
    assert not failing(checks)
    assert checks[CLOSED].worst == 0.0 and checks[REFERENCE].worst < 1e-5
    real = sum(int(batch.mask.sum()) + module.DECODE_STEPS * batch.size for batch in staged.inputs.batches)
    told = (
        0 if not guard_mode(mode).supervisor else 2 * 2 * (module.DECODE_STEPS + 1) * 8
    )  # coordinates, rank 2 on 2 layers
    assert checks[REFERENCE].compared == 2 * staged.plan.width * real + told
    if mode != "project":  # thresholds at 0: some states are edited, and some are not
        edited, of = map(int, checks[REFERENCE].note.split(" states edited")[0].split(" of "))
        everything = 2 * (real if positions == "all" else (module.DECODE_STEPS + 1) * 8)
        if mode == "align":  # one token of each prompt, and none of an answer
            assert (edited, of) == (2 * 8, 2 * real)
            return
        assert 0 < edited < everything and of == 2 * real
        assert checks[FORCED].note.startswith(f"{everything} of {2 * real} states edited")


# ------------------------------------------------------------------------------------------------------- tampered with


def named(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == f"vlmguard/{name}")


def numbers(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.ModelProto], None]:
    """Change one of the guard's arrays."""

    def tamper(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == f"vlmguard/{name}")
        array = numpy_helper.to_array(tensor)
        changed = np.asarray(change(array), dtype=array.dtype).reshape(array.shape)
        assert not np.array_equal(changed, array)
        tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))

    return tamper


def operator(name: str, op_type: str) -> Callable[[onnx.ModelProto], None]:
    def tamper(model: onnx.ModelProto) -> None:
        named(model, name).op_type = op_type

    return tamper


def only_when(comparison: str) -> Callable[[onnx.ModelProto], None]:
    """Layer 2 is guarded only in calls of one token (`Equal`), or only in longer ones (`Greater`)."""

    def tamper(model: onnx.ModelProto) -> None:
        add = named(model, "layer_2/guarded")
        one = numpy_helper.from_array(np.array(1, np.int64), "tampered/one")
        model.graph.initializer.append(one)
        nodes = [
            helper.make_node(comparison, ["vlmguard/positions/sequence", one.name], ["tampered/when"]),
            helper.make_node("Cast", ["tampered/when"], ["tampered/factor"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [add.input[1], "tampered/factor"], ["tampered/delta"]),
        ]
        before(model, add, nodes)
        add.input[1] = "tampered/delta"

    return tamper


def first_token(model: onnx.ModelProto) -> None:
    """The first token of a call is taken for the last."""
    named(model, "positions/last_index").input[0] = "vlmguard/positions/one"


def leaking_gate(model: onnx.ModelProto) -> None:
    """The gate of layer 2 is never quite closed."""
    gate = named(model, "layer_2/gate")
    reader = next(node for node in model.graph.node if gate.output[0] in node.input)
    model.graph.initializer.append(numpy_helper.from_array(np.array(1e-3, np.float32), "tampered/leak"))
    before(model, reader, [helper.make_node("Max", [gate.output[0], "tampered/leak"], ["tampered/gate"])])
    reader.input[list(reader.input).index(gate.output[0])] = "tampered/gate"


def quiet_coordinates(model: onnx.ModelProto) -> None:
    """The text-only pass tells half of what it hears in layer 2."""
    layers = named(model, "coordinates/layers")
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "tampered/half"))
    before(model, layers, [helper.make_node("Mul", [layers.input[1], "tampered/half"], ["tampered/own"])])
    layers.input[1] = "tampered/own"


def before(model: onnx.ModelProto, node: onnx.NodeProto, new: list[onnx.NodeProto]) -> None:
    at = list(model.graph.node).index(node)
    for offset, added in enumerate(new):
        model.graph.node.insert(at + offset, added)


def one_weight(model: onnx.ModelProto) -> None:
    """One number of the model's own, far from any guarded layer."""
    tensor = max(
        (t for t in model.graph.initializer if not t.name.startswith("vlmguard/") and len(t.dims) == 2),
        key=lambda t: np.prod(t.dims),
    )
    array = numpy_helper.to_array(tensor).copy()
    array[3, 4] += 0.01
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


BOTH = {REFERENCE, FORCED}
TAMPERINGS = {
    "V written along another direction": ("restore", numbers("layer_2/ssd", lambda a: np.roll(a, 1)), BOTH),
    "V written with the other sign": ("restore", numbers("layer_4/ssd", np.negative), BOTH),
    "V off by a hundredth": ("restore", numbers("layer_2/ssd", lambda a: 1.01 * a), BOTH),
    "V of the projection": ("project", numbers("layer_2/ssd", lambda a: np.roll(a, 1)), {REFERENCE}),
    "readout and V read wrongly": ("restore", numbers("layer_2/rows", lambda a: np.roll(a, 1, axis=1)), BOTH),
    "target": ("restore", numbers("layer_4/target", lambda a: a + 0.1), BOTH),
    # A gate that is forced open no longer has the threshold that was tampered with.
    "tau, so that the gate never opens": ("restore", numbers("layer_2/tau", lambda a: a + 1e6), {REFERENCE}),
    "tau, so that the gate always opens": ("steer", numbers("layer_2/tau", lambda a: a - 1e6), {REFERENCE}),
    "tau of the supervisor": ("supervise", numbers("layer_2/tau", lambda a: a + 1e6), {REFERENCE}),
    "alpha of steer": ("steer", numbers("layer_2/alpha", lambda a: 0.95 * a), BOTH),
    "alpha of supervise": ("supervise", numbers("layer_2/alpha", lambda a: 0.95 * a), BOTH),
    "origin": ("supervise", numbers("layer_2/origin", lambda a: a + 0.5), BOTH),
    "tau of combined": ("combined", numbers("layer_2/tau", lambda a: a + 1e6), {REFERENCE}),
    "text that opens no gate": ("combined", numbers("layer_2/text_shift", lambda a: a - 1e6), {REFERENCE}),
    "text that opens every gate": ("combined", numbers("layer_4/text_shift", lambda a: a + 1e6), {REFERENCE}),
    "a gate that opens without a supervisor": (
        "combined",
        numbers("layer_2/score_cap", lambda a: 1e38 + a),
        {WITHOUT_SUPERVISOR},
    ),
    "coordinates": ("supervise", quiet_coordinates, BOTH | {WITHOUT_SUPERVISOR}),
    "guard bypassed at prefill": ("restore", only_when("Equal"), BOTH),
    "guard bypassed at decode": ("restore", only_when("Greater"), BOTH),
    "projection bypassed at prefill": ("project", only_when("Equal"), {REFERENCE}),
    "gate turned around": ("restore", operator("layer_2/opens", "Less"), BOTH | {CLOSED, UNEDITED}),
    "gate that leaks": ("restore", leaking_gate, BOTH | {CLOSED, UNEDITED}),
    "every token edited": ("restore", operator("positions/is_last", "LessOrEqual"), BOTH | {UNEDITED}),
    "another token edited": ("restore", first_token, BOTH | {UNEDITED}),
    "a weight of the model": ("restore", one_weight, {CLOSED}),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_a_tampered_file_is_not_proved(stage: Callable[..., Staged], what: str) -> None:
    mode, tamper, expected = TAMPERINGS[what]
    staged = stage(mode)
    model = onnx.load(staged.decoder)
    tamper(model)
    onnx.save(model, staged.decoder)
    checks = staged.run()
    assert failing(checks) == expected
    assert all(checks[name].worst > checks[name].limit for name in expected)


def test_every_dynamic_check_can_fail() -> None:
    assert set.union(*(expected for _, _, expected in TAMPERINGS.values())) == {
        CLOSED,
        REFERENCE,
        FORCED,
        WITHOUT_SUPERVISOR,
        UNEDITED,
    }


def test_a_reader_that_goes_round_the_guard_is_seen_without_running(stage: Callable[..., Staged]) -> None:
    """Each guard computes what it should, and the next layer reads what was there before it."""
    staged = stage("restore")
    model = onnx.load(staged.decoder)
    guarded, raw = "vlmguard/layer_2/guarded", staged.report.sites[0].raw
    readers = [node for node in model.graph.node if guarded in node.input]
    assert len(readers) > 1
    readers[0].input[list(readers[0].input).index(guarded)] = raw
    onnx.save(model, staged.decoder)
    with pytest.raises(ProofFailed) as caught:
        staged.whole()
    assert str(caught.value).startswith("the proof failed at 'no path avoids a guard (dominators)'")


def test_a_failed_check_is_told_with_its_figures(stage: Callable[..., Staged]) -> None:
    staged = stage("restore")
    model = onnx.load(staged.decoder)
    numbers("layer_2/tau", lambda a: a + 1e6)(model)
    onnx.save(model, staged.decoder)
    check = staged.run()[REFERENCE]
    with pytest.raises(ProofFailed) as caught:
        staged.whole()
    assert str(caught.value) == (
        f"the proof failed at {REFERENCE!r}: worst {check.worst:.2e}, limit 1.00e-04, {check.compared} compared "
        f"({check.note}); nothing was written"
    )


def test_nothing_compared_is_nothing_proved(stage: Callable[..., Staged]) -> None:
    staged = replace(stage("restore"), inputs=ProofInputs((), (), "no prompts"))
    assert failing(staged.run()) == {CLOSED, REFERENCE, FORCED, UNEDITED}


# ------------------------------------------------------------------------------------------------------- rounding, inputs


@pytest.mark.parametrize(
    ("optimized", "plain", "ok", "words"),
    [
        ((100, 0, 0.0), None, True, "100 numbers in 9 calls, "),
        ((100, 5, 1e-6), (100, 0, 0.0), True, "exact in 100 numbers without the runtime's optimiser (9 calls)"),
        ((100, 5, 1e-3), (100, 0, 0.0), False, "5 of 100 differ by its own rounding"),
        ((100, 5, 1e-6), (100, 1, 1e-7), False, "1 of 100 numbers differ even without the runtime's optimiser"),
    ],
)
def test_the_runtimes_own_rounding_is_told_apart_from_the_guards(
    stage: Callable[..., Staged],
    monkeypatch: pytest.MonkeyPatch,
    optimized: tuple,
    plain: tuple | None,
    ok: bool,
    words: str,
) -> None:
    """Where the optimiser moves bits, the graph must be exact without it, and near with it."""

    def comparison(compared: int, differing: int, worst: float) -> tuple[Comparison, str]:
        return Comparison(compared=compared, differing=differing, worst=worst), "9 calls"

    results = {True: optimized, False: plain}
    monkeypatch.setattr(prove_closed, "_compare_runs", lambda *_, optimize: comparison(*results[optimize]))
    staged = stage("restore")
    check = prove_closed.closed_equals_source(staged.package, staged.decoder, staged.plan, staged.report, staged.inputs)
    assert check.ok == ok and words in check.note and check.compared == 100


@pytest.mark.parametrize(("limit", "few"), [(1e-4, 0.01), (1e-2, 0.05), (5e-2, 0.2)])
def test_gates_too_close_to_call_are_few_whatever_one_channel_does(limit: float, few: float) -> None:
    """Language models have a channel in the hundreds at their first token; a proof must still compare the others."""
    random = np.random.default_rng(0)
    states = random.normal(size=(4, 50, 2048))
    states[:, 0, 7] = 500
    row = random.normal(size=2048)
    row = (row / np.linalg.norm(row)).astype(np.float32)
    layer = LayerGuard(row[None], np.zeros(1), np.zeros(1), row, 0.25, 1.0)
    close = module._close_calls("restore", layer, states, None, limit)
    assert close.mean() < few
    # and those are the ones that rounding could move over the threshold
    states[1, 3] += (0.25 - states[1, 3] @ row) * row.astype(np.float64)
    assert module._close_calls("restore", layer, states, None, limit)[1, 3]
    assert not module._close_calls("supervise", layer, states, None, limit).any()
    # in `combined` none of them is, where the text has opened the gate, or where there is nobody to hear
    told = np.full((4, 1, 1), -9.0)
    np.testing.assert_array_equal(
        module._close_calls("combined", layer, states, told, limit),
        module._close_calls("restore", layer, states, None, limit),
    )
    for decided in (9.0, NO_SUPERVISOR):
        told[1] = decided
        assert not module._close_calls("combined", layer, states, told, limit)[1, 3]


def test_random_inputs_are_seeded_and_padded_only_where_the_graph_can_be(zoo: Callable[[str], Any]) -> None:
    for name, pads, takes_embeds in (("llava-torchscript-fp32", True, True), ("llama-genai-fp32", False, False)):
        session = open_decoder(open_package(zoo(name).path))
        first, again = (random_inputs(session, 64, 300, pads, "no words") for _ in range(2))
        (batch,), (same,) = first.batches, again.batches
        np.testing.assert_array_equal(batch.ids, same.ids)
        assert batch.mask.all() != pads and batch.mask[:, -1].all() and batch.ids.max() < 300
        assert (batch.embeds is not None) == takes_embeds
        assert first.origin == "seeded random inputs (no words)"
