"""The proof of a graph with runtime controls: each check passes on the written file and FAILS on a tampered one.

On a decoder of two layers written by hand, so that a whole proof takes a moment; the trained tiny VLM's folder at the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hand_graphs import WIDTH, decoder, directions
from onnx import helper, numpy_helper
from tiny_vlm_paths import DECODER, SOURCE, Guarded, digests

import vlmguard
from vlmguard.exporter.engines.engine_folder import open_buildable
from vlmguard.exporter.proof.inputs import ProofInputs
from vlmguard.exporter.proof.prove import prove_by_running
from vlmguard.exporter.proof.prove_gate import DECIDED, SCORES
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.dtypes import NUMPY_DTYPES
from vlmguard.graphs.errors import ManifestMismatch
from vlmguard.graphs.graph_io import save_graph
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.proof.structure import Check
from vlmguard.graphs.rewrite import rewrite
from vlmguard.graphs.runtime_controls import STRENGTH_INPUT
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.decoder_inputs import PromptBatch

pytest_plugins = ("tiny_vlm_fixtures",)
pytest.importorskip("onnxruntime")

CLOSED = "closed gate equals the original bit for bit"
OFF = "strength 0, and below, equals the original bit for bit"
REFERENCE = "guarded states equal the numpy reference"
FORCED, TURNED = f"{REFERENCE} (gates forced open)", f"{REFERENCE} (knobs turned)"
WITHOUT_SUPERVISOR = f"{REFERENCE} (no supervisor)"
HELD_CLOSED, HELD_OPEN = f"{REFERENCE} (held closed)", f"{REFERENCE} (held open)"
UNEDITED = "tokens outside the positions are untouched bit for bit"
HEADROOM = "float16 headroom: the largest state against 65504"
ALL_CONTROLS = {"knobs": True, "telemetry": True, "gate": "prompt"}
EVERY_CHECK = [CLOSED, OFF, REFERENCE, FORCED, TURNED, HELD_CLOSED, HELD_OPEN, SCORES, DECIDED, UNEDITED]
Prove = Callable[..., dict[str, Check]]


@pytest.fixture
def prove(tmp_path: Path) -> Prove:
    """Guard layers 0 and 1, thresholds in the middle of the scores; write it, tamper with the file, prove it by running."""

    def checked(
        spec: GuardSpec, tamper: Callable[[onnx.ModelProto], None] | None = None, dtype: str = "float32"
    ) -> dict[str, Check]:
        kind = "add" if dtype == "float32" else "skip_norm"
        save_graph(decoder(kind, layers=2, dtype=dtype), tmp_path / "model.onnx")
        package = open_package(tmp_path / "model.onnx")
        graph = package.load_decoder()
        anatomy = dissect(graph)
        plan = plan_guard(graph, anatomy, directions((0, 1), alpha=2.0), spec)
        report = rewrite(graph, plan)
        staged = tmp_path / "guarded.onnx"
        save_graph(graph, staged)
        if tamper is not None:
            model = onnx.load(staged)
            tamper(model)
            onnx.save(model, staged)
        return {check.name: check for check in prove_by_running(package, staged, plan, report, inputs(dtype))}

    return checked


def inputs(dtype: str) -> ProofInputs:
    """Two batches of three prompts, padded on the left."""
    random = np.random.default_rng(0)
    batches = []
    for length in (4, 6):
        mask = np.ones((3, length), np.int64)
        mask[0, :2] = 0
        embeds = random.normal(size=(3, length, WIDTH)).astype(NUMPY_DTYPES[dtype])
        batches.append(PromptBatch(np.zeros((3, length), np.int64), mask, embeds))
    return ProofInputs(tuple(batches), tuple(batches), "six prompts of nothing")


def failing(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if not check.ok}


@pytest.mark.parametrize(("lowering", "dtype"), [("lowrank", "float32"), ("rank1", "float16")])
@pytest.mark.parametrize(
    ("mode", "wish", "expected"),
    [
        ("project", {"knobs": True}, [CLOSED, OFF, REFERENCE, TURNED, UNEDITED]),
        (
            "supervise",
            {"knobs": True, "telemetry": True},
            [CLOSED, OFF, REFERENCE, FORCED, WITHOUT_SUPERVISOR, TURNED, SCORES, UNEDITED],
        ),
        ("steer", {"gate": "prompt"}, [CLOSED, REFERENCE, FORCED, HELD_CLOSED, HELD_OPEN, DECIDED, UNEDITED]),
        ("restore", ALL_CONTROLS, EVERY_CHECK),
        ("combined", ALL_CONTROLS, [*EVERY_CHECK[:4], WITHOUT_SUPERVISOR, *EVERY_CHECK[4:]]),
    ],
)
def test_an_untouched_file_is_proved(
    prove: Prove, mode: Any, wish: dict[str, Any], expected: list[str], dtype: str, lowering: str
) -> None:
    checks = prove(GuardSpec(mode, lowering=lowering, **wish), dtype=dtype)
    wanted = expected if dtype == "float32" else [*expected[:-1], HEADROOM, expected[-1]]
    assert list(checks) == wanted and not failing(checks)
    for name in {CLOSED, OFF} & checks.keys():
        assert checks[name].worst == 0 and checks[name].compared > 1000
    if SCORES in checks:
        assert checks[SCORES].compared > 20 and checks[SCORES].worst < (1e-6 if dtype == "float32" else 2e-3)
    if DECIDED in checks:
        opened, of = map(int, checks[DECIDED].note.split(" open")[0].split(" of "))
        assert 0 < opened < of
    if HELD_CLOSED in checks:
        assert checks[HELD_CLOSED].note.startswith("0 of ") and not checks[HELD_OPEN].note.startswith("0 of ")


# ----------------------------------------------------------------------------------------------------------- tampered with


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == f"vlmguard/{name}")


def default(value: float) -> Callable[[onnx.ModelProto], None]:
    def tamper(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == STRENGTH_INPUT)
        tensor.CopyFrom(numpy_helper.from_array(np.array(value, np.float32), STRENGTH_INPUT))

    return tamper


def reads(name: str, at: int, source: str) -> Callable[[onnx.ModelProto], None]:
    """A node of the guard reads something else."""

    def tamper(model: onnx.ModelProto) -> None:
        node(model, name).input[at] = source

    return tamper


def swapped_scores(model: onnx.ModelProto) -> None:
    told = node(model, "gate_scores/layers")
    told.input[:] = list(reversed(told.input))


def always_closed(model: onnx.ModelProto) -> None:
    """What is told to be carried on is that every gate is closed: the guard would end with the prompt."""
    told = node(model, "present_gate/last")
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "nothing"))
    told.output[0], name = "told", told.output[0]
    model.graph.node.append(helper.make_node("Mul", ["told", "nothing"], [name], name="muted"))


def turned_offset(model: onnx.ModelProto) -> None:
    node(model, "layer_0/threshold").op_type = "Sub"


SELECTED = "vlmguard/positions/selected_float32"
IN_DECODING = (REFERENCE, FORCED, TURNED)  # each of them decodes with what the prompt decided
TAMPERINGS = {
    "a default below 1": (default(0.5), {REFERENCE, FORCED, HELD_OPEN}),
    "a strength that a layer does not obey": (reads("layer_0/weights_selected", 1, SELECTED), {OFF, TURNED}),
    "a strength that may be negative": (reads("knobs/strength", 1, "vlmguard/knobs/threshold_offset_lowest"), {OFF}),
    "an offset that a layer does not obey": (reads("layer_0/opens", 1, "vlmguard/layer_0/tau"), {TURNED, DECIDED}),
    "an offset turned round": (turned_offset, {TURNED, DECIDED}),
    "scores of other layers": (swapped_scores, {SCORES}),
    "a decision that is not carried on": (always_closed, {DECIDED}),
    "a held gate that is decided again": (
        reads("layer_1/gate_now", 1, "vlmguard/knobs/strength"),
        {*IN_DECODING, HELD_CLOSED, DECIDED},
    ),
    "a held gate that is not kept open": (
        reads("layer_1/gate_held", 1, "vlmguard/gate/zero"),
        {*IN_DECODING, HELD_OPEN, DECIDED},
    ),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_a_tampered_file_is_not_proved(prove: Prove, what: str) -> None:
    tamper, expected = TAMPERINGS[what]
    assert failing(prove(GuardSpec("restore", **ALL_CONTROLS), tamper)) == expected


def test_every_check_of_the_runtime_controls_can_fail() -> None:
    failed = set.union(*(expected for _, expected in TAMPERINGS.values()))
    assert {OFF, TURNED, HELD_CLOSED, HELD_OPEN, SCORES, DECIDED} <= failed


# ------------------------------------------------------------------------------------------------------- the whole folder


def test_a_folder_with_runtime_controls_is_verified_from_its_files_and_against_its_source(guarded: Guarded) -> None:
    for source in (None, SOURCE):
        result = vlmguard.verify(guarded("runtime_controls"), source)
        assert result.ok and all(check.compared > 0 for check in result.checks)
    assert result.manifest.spec | ALL_CONTROLS == result.manifest.spec
    assert {OFF, TURNED, SCORES, DECIDED} <= {check["name"] for check in result.manifest.decoders[0].proof}


@pytest.fixture
def copy(guarded: Guarded, tmp_path: Path) -> Path:
    """The folder, to be tampered with."""
    return shutil.copytree(guarded("runtime_controls"), tmp_path / "copy")


def make_it_fit(folder: Path) -> None:
    path = folder / "guard.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    record, file = content["files"][DECODER], folder / DECODER
    record.update(sha256=digests(folder)[DECODER], size=file.stat().st_size)
    path.write_text(json.dumps(content), encoding="utf-8")


def an_input_more(model: onnx.ModelProto) -> None:
    """The threshold itself becomes an input with a default."""
    tensor = next(t for t in model.graph.initializer if t.name.endswith("/tau"))
    model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


@pytest.mark.parametrize("change", [an_input_more, default(0.5)], ids=["an input more", "a default"])
def test_a_changed_knob_is_caught_though_the_manifest_was_made_to_fit(
    copy: Path, change: Callable[[onnx.ModelProto], None]
) -> None:
    model = onnx.load(copy / DECODER)
    change(model)
    onnx.save(model, copy / DECODER)
    make_it_fit(copy)
    failed = {check.name for check in vlmguard.verify(copy).checks if not check.ok}
    assert failed == {"the guard is what the manifest's plan and directions make"}
    beside = {check.name for check in vlmguard.verify(copy, SOURCE).checks if not check.ok}
    assert len(beside - failed) == 1  # the signature, or the initializers


def test_a_plan_that_hides_its_knobs_is_refused(copy: Path) -> None:
    path = copy / "guard.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["decoders"][0]["plan"].update(knobs=[], added_inputs=["vlmguard.past_gate"])
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ManifestMismatch) as caught:
        vlmguard.verify(copy)
    assert str(caught.value) == (
        f"{copy}: the manifest's plan is not what its spec and directions give (knobs, added_inputs differ); export again"
    )


def test_no_engine_is_built_of_a_graph_with_knobs(guarded: Guarded) -> None:
    folder = guarded("runtime_controls")
    with pytest.raises(ManifestMismatch) as caught:
        open_buildable(folder)
    assert str(caught.value) == (
        f"{folder}: its graph has knobs, and an engine has no inputs with defaults, so the caller could switch the guard "
        "off; export it again without --knobs"
    )
