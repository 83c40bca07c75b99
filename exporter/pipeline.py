"""`export`: the whole story on one screen, from a model to a guarded, proved folder.

    source ──► package ──► anatomy ──► directions (given, or extracted and calibrated) ──► plan
           ──► rewrite ──► proof ──► folder (decoder, untouched files, directions.safetensors, guard.json)

Everything is written into a hidden sibling of OUT first; OUT appears, complete, only after the proof has passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..graphs.anatomy import DecoderAnatomy, dissect
from ..graphs.directions import Directions, directions_bytes
from ..graphs.errors import GuardError, OutputRefused, ProofFailed
from ..graphs.package import ModelPackage, load_graph, save_graph
from ..graphs.plan import GuardPlan, plan_guard, require_layers, require_unguarded
from ..graphs.rewrite import GuardReport, rewrite
from ..graphs.spec import GuardSpec, Mode
from ..graphs.staging import require_writable, staged, write_file
from ..graphs.static_proof import Check, prove_structure
from ..runtime.onnxruntime_runner import import_onnxruntime
from .calibrate import DEFAULT_BUDGET, Calibration
from .checkpoint import Dtype
from .folder import bring_companions, bring_weights, notes_on_files, write_manifest
from .guide import DIRECTIONS_FILE, EXTRACTED_RANK, Guide
from .prove import ProofInputs, prove_by_running
from .sources import Watch, opened, require_apart, unwatched


@dataclass(frozen=True)
class ExportResult:
    """What `export` did, or with `dry_run` would do.

    Attributes:
        out: the folder; not written with `dry_run`.
        anatomy, plan: always.
        report, proof: empty with `dry_run`.
        calibration: what the calibrator measured, if it ran.
        written: whether `out` was written.
    """

    out: Path
    anatomy: DecoderAnatomy
    plan: GuardPlan
    report: GuardReport | None = None
    proof: tuple[Check, ...] = ()
    calibration: Calibration | None = None
    written: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "written": self.written,
            "plan": self.plan.to_json(),
            "report": self.report.to_json() if self.report is not None else None,
            "proof": [check.to_json() for check in self.proof],
            "calibration": self.calibration.to_json() if self.calibration is not None else None,
        }


def export(
    model: Path | str,
    out: Path | str | None = None,
    *,
    spec: GuardSpec | None = None,
    directions: Path | str | None = None,
    anchors: Path | str | None = None,
    calibration: Path | str | None = None,
    budget: float = DEFAULT_BUDGET,
    variant: str | None = None,
    dtype: Dtype | None = None,
    opset: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    watch: Watch | None = None,
) -> ExportResult:
    """Guard a model, prove the guard, write the guarded folder.

    Args:
        model: a `.onnx` file, a model folder, a Hugging Face checkpoint folder or a hub id.
        out: the folder to write; default `<name>-guarded` beside the model.
        spec: what is wanted; `None` follows the directions, or calibrates `restore`.
        directions: a directions file; without one, it is looked for beside the model, else extracted from anchors.
        anchors: anchor pairs to extract from; found beside the model if not given.
        calibration: labelled prompts to calibrate on; found beside the anchors, or made from a third of them.
        budget: highest share of harmless calibration prompts that may be refused.
        variant: precision variant of an onnx-community folder.
        dtype, opset: of the graphs exported from a checkpoint; refused for a model that is ONNX already.
        dry_run: plan only; nothing is written.
        force: replace OUT, and accept directions extracted from another file.
        watch: told what is going on: `(stage, done, total)`.

    Raises:
        GuardError: anything wrong with the request or its files; nothing was written.
    """
    import_onnxruntime()  # a proof needs a runtime: say so before minutes of work
    spec = spec or GuardSpec()
    tell = watch or unwatched
    with opened(model, variant, tell, dtype, opset) as source:
        package = source.package
        target = Path(out) if out is not None else source.beside / f"{source.name}-guarded"
        require_apart(target, Path(model), package)
        if not dry_run:
            require_writable(target, force)
        graph = package.load_decoder()
        anatomy = dissect(graph, package.expected_layers)
        require_layers(spec, anatomy)  # before minutes of extraction and calibration
        guide = Guide(source, anatomy, spec, budget, force, tell)
        found, calibrated = guide.directions(directions, anchors, calibration)
        plan = plan_guard(graph, anatomy, found, spec)
        if plan.mode == "steer" and any(planned.guard.alpha == 0 for planned in plan.sites):
            raise GuardError("alpha 0 does nothing in mode steer, and would ship as a guard; choose above 0")
        plan = replace(plan, notes=(*guide.notes, *plan.notes, *notes_on_files(package)))
        if dry_run:
            return ExportResult(target.absolute(), anatomy, plan, calibration=calibrated)
        with staged(target, force) as stage:
            decoder = stage / package.decoder.relative_to(package.root)
            decoder.parent.mkdir(parents=True, exist_ok=True)
            report = rewrite(graph, plan)
            bring_weights(package, stage)
            save_graph(graph, decoder)
            proof = prove(package, decoder, anatomy, plan, report, guide.proof_inputs(), tell)
            bring_companions(package, stage)
            (stage / DIRECTIONS_FILE).write_bytes(directions_bytes(found))
            write_manifest(stage, package, decoder, spec, plan, report, proof, calibrated)
        tell("done", 1, 1)
        return ExportResult(target.absolute(), anatomy, plan, report, proof, calibrated, written=True)


def inspect(model: Path | str, variant: str | None = None, watch: Watch | None = None) -> DecoderAnatomy:
    """The residual stream of a model's decoder; a checkpoint is exported to a temporary folder first.

    Raises:
        GuardError: it cannot be opened, or no residual stream was found, with the reason.
    """
    with opened(model, variant, watch or unwatched) as source:
        return dissect(source.package.load_decoder(), source.package.expected_layers)


def prove(
    package: ModelPackage,
    decoder: Path,
    anatomy: DecoderAnatomy,
    plan: GuardPlan,
    report: GuardReport,
    inputs: ProofInputs,
    tell: Watch,
) -> tuple[Check, ...]:
    """Every check, on the file as it will ship.

    Raises:
        ProofFailed: one of them does not hold.
    """
    tell("proving", 0, 2)
    source = package.load_decoder()
    dissect(source)  # inlines functions and infers types exactly as was done to the graph that was rewritten
    checks = prove_structure(source, load_graph(decoder), anatomy, plan, report)
    tell("proving", 1, 2)
    _require_all(checks)
    checks += prove_by_running(package, decoder, plan, report, inputs)
    tell("proving", 2, 2)
    _require_all(checks)
    return checks


def _require_all(checks: Sequence[Check]) -> None:
    for check in checks:
        if not check.ok:
            raise ProofFailed(
                f"the proof failed at {check.name!r}: worst {check.worst:.2e}, limit {check.limit:.2e}, "
                f"{check.compared} compared ({check.note}); nothing was written"
            )


def extract_directions(
    model: Path | str,
    output: Path | str,
    *,
    anchors: Path | str | None = None,
    rank: int = EXTRACTED_RANK,
    calibrate_for: Mode | None = None,
    calibration: Path | str | None = None,
    variant: str | None = None,
    force: bool = False,
    watch: Watch | None = None,
) -> Directions:
    """Extract directions from a model and write the file; with `calibrate_for` choose layers and thresholds too.

    Raises:
        GuardError: anything wrong with the request or its files; nothing was written.
    """
    import_onnxruntime()
    output = Path(output).absolute()
    tell = watch or unwatched
    spec = GuardSpec(mode=calibrate_for, rank=rank)
    if output.exists() and not force:
        raise OutputRefused(f"{output}: exists already; choose another file, or replace it with --force")
    with opened(model, variant, tell) as source:
        graph = source.package.load_decoder()
        require_unguarded(graph)
        anatomy = dissect(graph, source.package.expected_layers)
        guide = Guide(source, anatomy, spec, DEFAULT_BUDGET, force, tell)
        if calibrate_for is None:
            found = guide.extracted(guide.pairs(anchors)[1], rank)
        else:
            found = guide.calibrated(anchors, calibration).directions
        write_file(output, directions_bytes(found))
        return found
