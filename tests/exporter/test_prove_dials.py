"""The proof of a graph with dials: every check passes on the file that was made, and FAILS on one that was tampered with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from random_directions import random_directions
from tiny_vlm_paths import CALIBRATION, DECODER, SOURCE, Guarded

import vlmguard
from vlmguard.exporter.prompts import read_prompts
from vlmguard.exporter.prove import ProofInputs, proof_inputs, prove_by_running
from vlmguard.exporter.prove_gate import DECIDED, SCORES
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.dials import STRENGTH_INPUT
from vlmguard.graphs.errors import ManifestMismatch
from vlmguard.graphs.package import open_package, save_graph
from vlmguard.graphs.plan import plan_guard
from vlmguard.graphs.rewrite import rewrite
from vlmguard.graphs.spec import GuardSpec
from vlmguard.graphs.static_proof import Check
from vlmguard.runtime.vlm import VisionLanguageModel

pytest_plugins = ("tiny_vlm_fixtures",)

CLOSED = "closed gate equals the original bit for bit"
OFF, BELOW = "strength 0 equals the original bit for bit", "strength -1 equals the original bit for bit"
REFERENCE = "guarded states equal the numpy reference"
FORCED, TURNED = f"{REFERENCE} (gates forced open)", f"{REFERENCE} (knobs turned)"
HELD_CLOSED, HELD_OPEN = f"{REFERENCE} (held closed)", f"{REFERENCE} (held open)"
UNEDITED = "tokens outside the positions are untouched bit for bit"
ALL_DIALS = {"knobs": True, "telemetry": True, "gate": "prompt"}
Prove = Callable[..., dict[str, Check]]


@pytest.fixture(scope="module")
def inputs() -> ProofInputs:
    """Four prompts in two batches, texts and pictures."""
    model = VisionLanguageModel(open_package(SOURCE))
    rows = read_prompts(CALIBRATION)
    some = [row for setting in ("text", "image") for row in [r for r in rows if r.setting == setting][3:40:32]]
    return proof_inputs(model, [row.request(model) for row in some])


@pytest.fixture
def prove(inputs: ProofInputs, tmp_path: Path) -> Prove:
    """Random directions on two layers, thresholds at 0, written to a file, tampered with, and proved by running."""

    def checked(spec: GuardSpec, tamper: Callable[[onnx.ModelProto], None] | None = None) -> dict[str, Check]:
        package = open_package(SOURCE)
        graph = package.load_decoder()
        anatomy = dissect(graph)
        plan = plan_guard(graph, anatomy, random_directions(anatomy.width, [2, 4]), spec)
        report = rewrite(graph, plan)
        path = tmp_path / DECODER
        path.parent.mkdir(exist_ok=True)
        save_graph(graph, path)
        if tamper is not None:
            model = onnx.load(path)
            tamper(model)
            onnx.save(model, path)
        return {check.name: check for check in prove_by_running(package, path, plan, report, inputs)}

    return checked


def failing(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if not check.ok}


@pytest.mark.parametrize(
    ("mode", "wish", "expected"),
    [
        ("project", {"knobs": True}, [CLOSED, OFF, BELOW, REFERENCE, TURNED, UNEDITED]),
        (
            "supervise",
            {"knobs": True, "telemetry": True},
            [CLOSED, OFF, BELOW, REFERENCE, FORCED, TURNED, SCORES, UNEDITED],
        ),
        ("steer", {"gate": "prompt"}, [CLOSED, REFERENCE, FORCED, HELD_CLOSED, HELD_OPEN, DECIDED, UNEDITED]),
        (
            "restore",
            ALL_DIALS,
            [CLOSED, OFF, BELOW, REFERENCE, FORCED, TURNED, HELD_CLOSED, HELD_OPEN, SCORES, DECIDED, UNEDITED],
        ),
    ],
)
def test_an_untouched_file_is_proved(prove: Prove, mode: Any, wish: dict[str, Any], expected: list[str]) -> None:
    lowering = "rank1" if mode == "steer" else "auto"
    checks = prove(GuardSpec(mode, lowering=lowering, **wish))
    assert list(checks) == expected and not failing(checks)
    for name in {CLOSED, OFF, BELOW} & checks.keys():
        assert checks[name].worst == 0 and checks[name].compared > 1000
    if SCORES in checks:
        assert checks[SCORES].compared > 20 and checks[SCORES].worst < 1e-5
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
    told = node(model, "gate_scores/all_layers")
    told.input[:] = list(reversed(told.input))


def always_closed(model: onnx.ModelProto) -> None:
    """What is told to be carried on is that every gate is closed: the guard would end with the prompt."""
    told = node(model, "present_gate/all_layers")
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "nothing"))
    told.output[0], name = "told", told.output[0]
    model.graph.node.append(helper.make_node("Mul", ["told", "nothing"], [name], name="muted"))


SELECTED = "vlmguard/positions/selected_float32"
RAISED = {REFERENCE, FORCED, TURNED, HELD_OPEN}
TAMPERINGS = {
    "a default below 1": (default(0.5), RAISED - {TURNED}),
    "a strength that a layer does not obey": (reads("layer_2/weights_selected", 1, SELECTED), {OFF, BELOW, TURNED}),
    "a strength that may be negative": (reads("knobs/strength", 1, "vlmguard/knobs/threshold_offset_lowest"), {BELOW}),
    "an offset that a layer does not obey": (reads("layer_2/opens", 1, "vlmguard/layer_2/tau"), {TURNED}),
    "scores of other layers": (swapped_scores, {SCORES}),
    "a decision that is not carried on": (always_closed, {DECIDED}),
    "a held gate that is decided again": (reads("layer_4/gate_now", 1, "vlmguard/knobs/strength"), {HELD_CLOSED}),
    "a held gate that is not kept open": (reads("layer_4/gate_held", 1, "vlmguard/gate/zero"), {HELD_OPEN}),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_a_tampered_file_is_not_proved(prove: Prove, what: str) -> None:
    tamper, expected = TAMPERINGS[what]
    found = failing(prove(GuardSpec("restore", **ALL_DIALS), tamper))
    assert expected <= found, found


# ------------------------------------------------------------------------------------------------------- the whole folder


@pytest.fixture(scope="module")
def folder(guarded: Guarded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained tiny VLM with its calibrated directions and all dials."""
    out = tmp_path_factory.mktemp("dials") / "guarded"
    directions = guarded("restore") / "directions.safetensors"
    vlmguard.export(SOURCE, out, spec=GuardSpec(**ALL_DIALS), directions=directions)
    return out


def test_a_folder_with_dials_is_verified_from_its_files_and_against_its_source(folder: Path) -> None:
    for source in (None, SOURCE):
        result = vlmguard.verify(folder, source)
        assert result.ok and all(check.compared > 0 for check in result.checks)
    assert result.manifest.spec | ALL_DIALS == result.manifest.spec
    assert {OFF, BELOW, TURNED, SCORES, DECIDED} <= {check["name"] for check in result.manifest.decoders[0].proof}


def make_it_fit(folder: Path) -> None:
    import hashlib

    path = folder / "guard.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    record, file = content["files"][DECODER], folder / DECODER
    record.update(sha256=hashlib.sha256(file.read_bytes()).hexdigest(), size=file.stat().st_size)
    path.write_text(json.dumps(content), encoding="utf-8")


def an_input_more(model: onnx.ModelProto) -> None:
    """The threshold itself becomes an input with a default."""
    tensor = next(t for t in model.graph.initializer if t.name.endswith("/tau"))
    model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


@pytest.mark.parametrize("change", [an_input_more, default(0.5)], ids=["an input more", "a default"])
def test_a_changed_knob_is_caught_though_the_manifest_was_made_to_fit(
    folder: Path, tmp_path: Path, change: Callable[[onnx.ModelProto], None]
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    model = onnx.load(copy / DECODER)
    change(model)
    onnx.save(model, copy / DECODER)
    make_it_fit(copy)
    failed = {check.name for check in vlmguard.verify(copy).checks if not check.ok}
    assert failed == {"the guard is what the manifest's plan and directions make"}
    beside = {check.name for check in vlmguard.verify(copy, SOURCE).checks if not check.ok}
    assert len(beside - failed) == 1  # the signature, or the initializers


def test_a_plan_that_hides_its_knobs_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "guard.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["decoders"][0]["plan"].update(knobs=[], added_inputs=["vlmguard.past_gate"])
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ManifestMismatch) as caught:
        vlmguard.verify(copy)
    assert str(caught.value) == (
        f"{copy}: the manifest's plan is not what its spec and directions give (knobs, added_inputs differ); export again"
    )


def test_no_engine_is_built_of_a_graph_with_knobs(folder: Path) -> None:
    from vlmguard.exporter.engines.folder import open_buildable

    with pytest.raises(ManifestMismatch) as caught:
        open_buildable(folder)
    assert str(caught.value) == (
        f"{folder}: its graph has knobs, and an engine has no inputs with defaults, so whoever feeds it could switch the guard "
        "off; export it again without --knobs"
    )
