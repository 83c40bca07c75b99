"""A folded model from end to end: exported, proved, opened, verified from its files alone and against its source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from hand_graphs import orthonormal, uncalibrated
from text_decoder import IDS, decoder

from vlmguard.exporter.pipeline import export
from vlmguard.exporter.proof.inputs import ProofInputs
from vlmguard.exporter.proof.prove_fold import prove_fold_by_running
from vlmguard.exporter.proof.verify import verify
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.directions import directions_bytes
from vlmguard.graphs.graph_io import save_graph
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.lowerings.fold import SCOPE, fold
from vlmguard.graphs.planner import last_sites, plan_guard
from vlmguard.graphs.proof.structure import Check
from vlmguard.graphs.rewrite import GuardReport, rewrite
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.decoder_inputs import PromptBatch
from vlmguard.runtime.guarded import GuardedVLM, open_guarded_package

pytest.importorskip("onnxruntime")

SPEC = GuardSpec(mode="project", positions="all", lowering="fold", direction_of=0)
ORTHOGONAL = "every weight that writes the stream is orthogonal to the direction"
SAME = "outputs equal the source's with every writer projected"
NONE = "no state has a coordinate along the direction"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    save_graph(decoder(), folder / "model.onnx")
    (folder / "directions.safetensors").write_bytes(directions_bytes(uncalibrated((0,), 1)))
    return folder / "model.onnx"


@pytest.fixture
def guarded(source: Path, tmp_path: Path) -> Path:
    result = export(source, tmp_path / "out", spec=SPEC)
    names = [check.name for check in result.proof]
    assert {ORTHOGONAL, SAME, NONE} <= set(names) and all(check.ok for check in result.proof)
    return tmp_path / "out"


def test_it_is_verified_from_its_files_and_against_its_source(guarded: Path, source: Path) -> None:
    alone = verify(guarded)
    assert alone.ok and ORTHOGONAL in [check.name for check in alone.checks]
    against = verify(guarded, source, run=True)
    assert against.ok
    assert {ORTHOGONAL, SAME, NONE, "the source folded again is the shipped graph, bit for bit"} <= {
        check.name for check in against.checks
    }


def test_half_precision_weights_of_a_float32_stream(tmp_path: Path) -> None:
    """As optimum writes float16 models: the weights are rounded again, so the limit is theirs."""
    model = decoder(
        mlp="w{n} = Cast <to = 1> (h{n}) b{n} = MatMul(f{n}, w{n})", weights="float16[24, 16] h0, float16[24, 16] h1"
    )
    save_graph(model, tmp_path / "model.onnx")
    (tmp_path / "directions.safetensors").write_bytes(directions_bytes(uncalibrated((0,), 1)))
    result = export(tmp_path / "model.onnx", tmp_path / "out", spec=SPEC)
    (check,) = (check for check in result.proof if check.name == SAME)
    assert check.ok and check.limit == 1e-2 and check.worst < 2e-3


def test_an_app_opens_only_a_graph_that_reads_its_folded_weights(guarded: Path) -> None:
    from vlmguard.graphs.errors import ManifestMismatch
    from vlmguard.graphs.manifest import read_manifest

    manifest = read_manifest(guarded)
    package = open_guarded_package(guarded, manifest)
    graph = onnx.load(package.decoder)
    reader = next(node for node in graph.graph.node if f"{SCOPE}d1" in node.input)
    reader.input[list(reader.input).index(f"{SCOPE}d1")] = "spare"
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((24, 16), np.float32), "spare"))
    onnx.save(graph, package.decoder)
    with pytest.raises(ManifestMismatch, match="carries a guard on layers"):
        GuardedVLM(package, manifest)


def tampered(source: Path, folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> dict[str, Check]:
    """The dynamic checks of a folded file whose numbers were changed after the fold."""
    package = open_package(source)
    model = package.load_decoder()
    plan = plan_guard(model, dissect(model), uncalibrated((0,), 1), SPEC)
    report = rewrite(model, plan)
    staged = folder / "staged.onnx"
    save_graph(model, staged)
    proto = onnx.load(staged)
    arrays = {one.name: onnx.numpy_helper.to_array(one).copy() for one in proto.graph.initializer}
    change(arrays)
    for one in proto.graph.initializer:
        one.CopyFrom(onnx.numpy_helper.from_array(arrays[one.name], one.name))
    onnx.save(proto, staged)
    batch = PromptBatch(IDS, np.ones_like(IDS), None)
    checks = prove_fold_by_running(package, staged, plan, report, ProofInputs((batch,), (batch,), "fixed tokens"))
    return {check.name: check for check in checks}


def unfold_one(arrays: dict[str, np.ndarray]) -> None:
    arrays[f"{SCOPE}d1"] += np.outer(np.ones(24), orthonormal(1)[0]).astype(np.float32)


def halve_another(arrays: dict[str, np.ndarray]) -> None:
    arrays["up0"] *= 0.5


def not_a_number(arrays: dict[str, np.ndarray]) -> None:
    arrays[f"{SCOPE}o0"][0, 0] = np.nan


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (lambda arrays: None, set()),
        (unfold_one, {SAME, NONE}),
        (halve_another, {SAME}),
        (not_a_number, {SAME, NONE}),
    ],
    ids=["honest", "one writer not folded", "another weight", "not a number"],
)
def test_running_sees_what_was_changed(
    source: Path, tmp_path: Path, change: Callable[[dict[str, np.ndarray]], None], failing: set[str]
) -> None:
    checks = tampered(source, tmp_path, change)
    assert {name for name, check in checks.items() if not check.ok} == failing


def test_a_fold_along_another_direction_is_seen(source: Path, tmp_path: Path) -> None:
    package = open_package(source)
    model = package.load_decoder()
    anatomy = dissect(model)
    plan = plan_guard(model, anatomy, uncalibrated((0,), 1), SPEC)
    report = GuardReport((), (), fold(model, last_sites(anatomy), orthonormal(1, seed=9)))
    save_graph(model, tmp_path / "staged.onnx")
    batch = PromptBatch(IDS, np.ones_like(IDS), None)
    inputs = ProofInputs((batch,), (batch,), "fixed tokens")
    checks = prove_fold_by_running(package, tmp_path / "staged.onnx", plan, report, inputs)
    assert not any(check.ok for check in checks)
