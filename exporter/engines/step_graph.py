"""The graph of a decode engine: derived from a guarded folder's decoder, and proved like it.

`decode_step_plan` says what differs. The graph is written by the rewrite that wrote the guarded decoder, into the same
unguarded decoder; the proof shows that nothing else differs, and that each guard computes the reference's states.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from ...graphs.anatomy import DecoderAnatomy, dissect
from ...graphs.decode_step import decode_step_plan
from ...graphs.graph_io import in_memory
from ...graphs.lowerings.fold import FOLD
from ...graphs.manifest import Manifest
from ...graphs.package import ModelPackage
from ...graphs.plan import GuardPlan
from ...graphs.proof.strip import strip_guard
from ...graphs.proof.structure import Check, exact, prove_structure, same_graph
from ...graphs.rewrite import GuardReport, rewrite
from ...graphs.tensorrt import settle_sizes
from ..proof.prove_local import prove_graph_locally
from ..proof.recorded_plan import plan_again

DERIVED = "derived_sha256"  # key of an engine's source: the digest of the graph that was derived and built


@dataclass(frozen=True)
class StepGraph:
    """A decoder graph for calls of one token per row.

    Attributes:
        model: the graph as TensorRT gets it.
        unguarded: the guarded folder's decoder without its guard.
        anatomy: of `unguarded`.
        plan, report: of the guard in `model`.
        sha256: hexadecimal digest of the serialized graph; big weights are in it as references to their files.
        proof: of the graph; empty before it.
    """

    model: ir.Model
    unguarded: ir.Model
    anatomy: DecoderAnatomy
    plan: GuardPlan
    report: GuardReport
    sha256: str
    proof: tuple[Check, ...] = ()


def derive_step_graph(folder: Path, manifest: Manifest, package: ModelPackage) -> StepGraph | None:
    """The graph for decode steps; `None` where the guarded decoder itself serves as well.

    Args:
        folder: the guarded folder.
        manifest: of the folder.
        package: the model in it.

    Raises:
        ManifestMismatch: the folder's spec and directions do not give the recorded plan.
    """
    if manifest.plan.get("lowering") == FOLD:
        return None
    unguarded = _stripped(package)
    anatomy = dissect(unguarded, package.declared_layers)
    plan = decode_step_plan(plan_again(folder, manifest, manifest.decoders[0], unguarded, anatomy))
    if plan is None:
        return None
    model = _stripped(package)
    dissect(
        model, package.declared_layers
    )  # infers what it needs in place, as it did before the guarded decoder was written
    report = rewrite(model, plan)
    for graph in (model, unguarded):
        settle_sizes(graph)
    content, _ = in_memory(model, package.decoder.parent, maps=False)
    return StepGraph(model, unguarded, anatomy, plan, report, hashlib.sha256(content).hexdigest())


def _stripped(package: ModelPackage) -> ir.Model:
    model = package.load_decoder()
    strip_guard(model)
    return model


def prove_step_graph(step: StepGraph) -> tuple[Check, ...]:
    """The proof of a derived graph: its structure, and each guard run on its own."""
    again = step.model.clone()
    strip_guard(again)
    checks = (
        same_graph("without its guard it is the guarded decoder without its guard", step.unguarded, again),
        *prove_structure(step.unguarded, step.model, step.anatomy, step.plan, step.report),
        *prove_graph_locally(step.model, step.plan, step.report),
    )
    return tuple(replace(check, name=f"decode graph: {check.name}") for check in checks)


def check_step_engine(manifest: Manifest, step: StepGraph | None) -> list[Check]:
    """Prove the decode engine's graph again; none if the folder has no such engine.

    Args:
        manifest: of the folder of engines.
        step: the graph that the guarded folder gives.
    """
    records = [engine for engine in manifest.engines if engine.role == "decode_step"]
    if not records:
        return []
    wrong = [record.path for record in records if step is None or record.source.get(DERIVED) != step.sha256]
    checks = [exact("the decode engine was built from the graph that the guarded folder gives", len(records), wrong)]
    return checks if step is None else [*checks, *prove_step_graph(step)]
