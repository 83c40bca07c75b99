"""`export`: the whole story on one screen, from a model to a guarded, proved folder.

    source ──► package ──► anatomy ──► directions (given, or extracted and calibrated) ──► plan
           ──► rewrite ──► proof ──► folder (decoder, untouched files, directions.safetensors, guard.json)

Everything is written into a hidden sibling of OUT first; OUT appears, complete, only after the proof has passed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..graphs.anatomy import DecoderAnatomy, dissect
from ..graphs.clock import stamp
from ..graphs.directions import DIRECTIONS_FILE, Directions, directions_bytes
from ..graphs.errors import AnatomyNotFound, GuardError, ModelUnreadable, ProofFailed
from ..graphs.graph_io import external_files, load_graph, save_graph
from ..graphs.lowerings.fold import FOLD
from ..graphs.modes import Mode, Positions, guard_mode
from ..graphs.new_files import Data, create_file
from ..graphs.operators import hidden_decoder, uncertain_layers
from ..graphs.package import ModelPackage
from ..graphs.places import is_checkpoint
from ..graphs.plan import GuardPlan
from ..graphs.planner import plan_guard, require_layers, require_unguarded
from ..graphs.progress import ProgressCallback, ignore_progress
from ..graphs.proof.fold_proof import prove_fold
from ..graphs.proof.structure import Check, prove_structure
from ..graphs.rewrite import GuardReport, rewrite
from ..graphs.spec import Decided, GuardSpec
from ..graphs.staging import require_writable, require_writable_file, staged, write_file
from ..graphs.tensorrt import require_readable
from ..runtime.decoder_place import DecoderPlace
from ..runtime.onnxruntime_runner import import_onnxruntime
from .artifact.guarded_folder import GuardedDecoder, bring_companions, bring_weights, notes_on_files, record_export
from .artifact.signing import require_key, write_signature
from .calibration.attempts import Choice
from .calibration.calibrate import DEFAULT_BUDGET
from .calibration.guard_config import CONFIG_NAME, GuardConfig, config_of, read_config, require_directions, to_toml
from .calibration.judged import readable_images
from .calibration.refusal_regression import Refusals
from .calibration.results import Calibration
from .choices import ExporterName, Precision, WantedMode, WantedProof
from .cluster import open_executors
from .executors import ExecutorFactory
from .extraction.estimators import DEFAULT_ESTIMATOR
from .prompts.anchors import open_anchors
from .prompts.labelled import BUILTIN, Sources, find_file
from .proof.headroom import NAME as HEADROOM
from .proof.inputs import ProofInputs, given_inputs
from .proof.level import ProofLevel, choose_level, without_inputs
from .proof.npz import read_npz
from .proof.prove import prove_by_running
from .proof.prove_fold import prove_fold_by_running
from .proof.prove_local import prove_locally
from .proof.signature import InputsUnknown
from .requests import Layers, require_path, spec_of
from .resolve import ANCHOR_FILES, EXTRACTED_RANK, Guide
from .sources import above, opened, require_apart, require_images_for


@dataclass(frozen=True)
class ExportResult:
    """What `export` did, or with `dry_run` would do.

    Attributes:
        out: the folder; not written with `dry_run`.
        decoders: every decoder graph of the folder, the one that runs first.
        proved: how much was proved, and why that much.
        calibration: what the calibrator measured, if it ran.
        refusals: harmful prompts refused without and with the guard, where prompts were at hand.
        choice: of the mode, where it was left open.
        written: whether `out` was written.
        parity: how far a checkpoint's exported graphs are from torch; empty for a model that was ONNX already.
        found: what was found beside the model and used -> its absolute path. Not in the manifest, which others read.
    """

    out: Path
    decoders: tuple[GuardedDecoder, ...]
    proved: ProofLevel
    calibration: Calibration | None = None
    refusals: Refusals | None = None
    choice: Choice | None = None
    written: bool = False
    found: Mapping[str, Path] = field(default_factory=dict)
    parity: tuple[Check, ...] = ()

    def __repr__(self) -> str:
        written = "" if self.written else ", not written"
        guard = f"{self.plan.mode} on layers {self.plan.layers}"
        return f"ExportResult({str(self.out)!r}, {guard}, proved {self.proved.level}{written})"

    @property
    def anatomy(self) -> DecoderAnatomy:
        """Of the decoder that runs."""
        return self.decoders[0].anatomy

    @property
    def plan(self) -> GuardPlan:
        """Of the decoder that runs."""
        return self.decoders[0].plan

    @property
    def report(self) -> GuardReport | None:
        """Of the decoder that runs; `None` with `dry_run`."""
        return self.decoders[0].report

    @property
    def proof(self) -> tuple[Check, ...]:
        """Of the decoder that runs; empty with `dry_run`."""
        return self.decoders[0].proof

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "out": str(self.out),
            "written": self.written,
            "decoders": [decoder.to_json() for decoder in self.decoders],
            "proved": self.proved.level,
            "proved_because": self.proved.why,
            "calibration": self.calibration.to_json() if self.calibration is not None else None,
            "refusals": self.refusals.to_json() if self.refusals is not None else None,
            "choice": self.choice.to_json() if self.choice is not None else None,
            "found": {what: str(path) for what, path in self.found.items()},
            "export_parity": [check.to_json() for check in self.parity] or None,
        }


def export(
    model: Path | str,
    out: Path | str | None = None,
    *,
    mode: WantedMode | None = None,
    layers: Layers | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    tau: float | None = None,
    positions: Positions | None = None,
    gate: Decided | None = None,
    spec: GuardSpec | None = None,
    config: Path | str | None = None,
    directions: Path | str | None = None,
    anchors: Sources | None = None,
    calibration: Sources | None = None,
    estimator: str = DEFAULT_ESTIMATOR,
    readout: str | None = None,
    budget: float = DEFAULT_BUDGET,
    variant: str | None = None,
    dtype: Precision | None = None,
    opset: int | None = None,
    exporter: ExporterName | None = None,
    data: Data = "link",
    digests: bool = True,
    proof: WantedProof = "auto",
    proof_inputs: Sequence[Path | str] = (),
    dry_run: bool = False,
    force: bool = False,
    allow_no_effect: bool = False,
    sign: Path | str | None = None,
    sbom: bool = False,
    reproducible: bool = False,
    calibration_images: Sequence[Path | str] = (),
    calibration_seconds: float | None = None,
    cache: bool = True,
    report_progress: ProgressCallback = ignore_progress,
) -> ExportResult:
    """Guard a model, prove the guard, write the guarded folder.

    Args:
        model: a `.onnx` file, a model folder, a Hugging Face checkpoint folder or a hub id.
        out: the folder to write; default `<name>-guarded` beside the model.
        mode: intervention: `project`, `steer`, `supervise`, `restore`, `combined` or `align`. Without, or with `auto`, that of
            the directions; without directions the one that works best on the model's answers (`calibration.choice`).
        layers: decoder layers from 0: numbers, or text such as `"2-4"`; default: those of the directions, or calibrated.
        rank: rows of each direction to use, 1 to 64.
        alpha: strength of `steer` and `supervise`.
        tau: gate threshold.
        positions: tokens to edit: `last`, `all` or `prompt`.
        gate: decided at every `token`, or at the end of the `prompt` and held for the answer.
        spec: a whole `GuardSpec` instead of these, with knobs, telemetry, lowering and target.
        config: a `guard.toml` instead, which also names its directions and has the layers' numbers.
        directions: a directions file; without one, it is looked for beside the model, else extracted from anchors.
        anchors: anchor pairs to extract from (`prompts.Sources`); default: found beside the model, else the built-in ones.
        calibration: labelled prompts to calibrate on; default: found beside the anchors, else anchors that are kept back.
        estimator: of the directions, where they are extracted (`estimators.ESTIMATORS`).
        readout: of the gate of `restore`, where it is calibrated (`estimators.READOUTS`); `None` chooses.
        budget: highest share of harmless calibration prompts that may be refused.
        variant: precision variant of an onnx-community folder; `None` guards all that are there.
        dtype: precision of the graphs exported from a checkpoint; refused for a model that is ONNX already.
        opset: ONNX opset of these graphs; refused likewise.
        exporter: exporter of a checkpoint (`exporters.EXPORTERS`); `None` is transformers. Refused likewise.
        data: how big files get into OUT: `link`, `copy` or `reference` (`graphs.staging.bring`).
        digests: hash big weights too; without it the manifest says that they were not.
        proof: `full` runs the model. `local` runs each guard by itself, cut out of the file, so the model's size does not
            matter. `structure` runs nothing, and `GuardedVLM` opens such a folder only after `verify --run`. `auto` takes
            `full` if the model fits into the memory that is free and inputs can be made for it, else `local`.
        proof_inputs: `.npz` files of the decoder's inputs by name, one per call, to prove it on: for decoders that want
            more than tokens, which nobody here can make. Without, prompts or seeded random tokens.
        dry_run: plan only; nothing is written.
        force: replace OUT, and accept directions extracted from another file.
        allow_no_effect: export a guard that changes nothing on any harmful prompt that is asked (`calibration.effect`).
        sign: private key (elliptic curve, PEM) to sign the folder with (`signing`).
        sbom: write `sbom.cdx.json` too, a CycloneDX bill of materials.
        reproducible: the same input gives the same bytes, the manifest included: its time is that of `SOURCE_DATE_EPOCH`, or
            1970, and no file's time of change is kept, so that big files are hashed at each opening.
        calibration_images: pictures of the user, to calibrate with besides blank ones and noise.
        calibration_seconds: how long candidates are tried, if one was found by then; `None` tries all.
        cache: take a checkpoint's export from the user's cache, and keep it there (`checkpoints.cache`).
        report_progress: called with `(stage, done, total)`.

    Raises:
        GuardError: anything wrong with the request or its files; nothing was written.
    """
    require_path(model, "model")
    spec = spec_of(spec, layers, mode=mode, rank=rank, alpha=alpha, tau=tau, positions=positions, gate=gate)
    if data == "reference" and is_checkpoint(model):
        raise GuardError(
            f"{model}: data reference would link to the cached export of this checkpoint; choose link or copy"
        )
    if proof != "structure" and not dry_run:
        import_onnxruntime()  # a proof needs a runtime: say so before minutes of work
    for path in proof_inputs:
        read_npz(Path(path))  # damaged files are refused before a model is opened
    key = require_key(sign) if sign is not None else None
    stamped = stamp(reproducible)
    wished = _config(config, spec, directions, anchors, calibration)
    spec = wished.spec if wished is not None else spec or GuardSpec()
    directions = wished.directions if wished is not None else directions
    require_images_for(spec.mode, model)  # before a checkpoint is exported
    with opened(model, variant, report_progress, dtype, opset, exporter, cache) as source:
        target = Path(out) if out is not None else source.beside / f"{source.name}-guarded"
        require_apart(target, Path(model), source.package)
        if not dry_run:
            require_writable(target, force)
        opened_graphs = [_open(view) for view in source.package.views()]
        if spec.target == "tensorrt":
            for one in opened_graphs:
                require_readable(one.graph, str(one.view.decoder))
        _require_alike(opened_graphs)
        if proof_inputs:
            given_inputs(tuple(map(Path, proof_inputs)), source.package.roles)  # unfit ones before minutes of work
        anatomy = opened_graphs[0].anatomy
        require_layers(spec, anatomy)  # before minutes of extraction and calibration
        guide = Guide(
            source,
            anatomy,
            spec,
            budget,
            force,
            report_progress,
            tuple(map(Path, proof_inputs)),
            estimator,
            readout,
            output=None if dry_run else target,
            images=readable_images(calibration_images),
            seconds=calibration_seconds,
        )
        found, measured = guide.directions(directions, anchors, calibration)
        choice = measured if isinstance(measured, Choice) else None
        calibrated = measured.calibration if isinstance(measured, Choice) else measured
        if choice is not None:
            spec = replace(spec, gate=choice.chosen.gate)
        if wished is not None:
            found = wished.applied(found)
        planned = [GuardedDecoder(one.view, one.anatomy, _plan(one, found, spec, guide.notes)) for one in opened_graphs]
        chosen = choose_level(proof, [(one.view, one.graph) for one in opened_graphs], planned[0].plan.lowering)
        if dry_run:
            return ExportResult(
                target.absolute(),
                tuple(planned),
                chosen,
                calibrated,
                choice=choice,
                found=guide.found | above(source.package),
                parity=source.parity,
            )
        made: dict[Path, ProofInputs] = {}
        if chosen.level == "full":
            try:
                made = {one.view.decoder: guide.proof_inputs(one.view) for one in opened_graphs}
            except InputsUnknown as unknown:
                instead = without_inputs(proof, unknown.reason, planned[0].plan.lowering)
                if instead is None:
                    raise
                chosen = instead
        unguarded = guide.unguarded(planned[0].plan.mode, runs=chosen.level == "full") if measured is None else None
        plans = [guide.separated(decoder.plan, unguarded) for decoder in planned]
        if guide.not_asked is not None:
            plans = [replace(plan, notes=(guide.not_asked, *plan.notes)) for plan in plans]
        planned = [replace(decoder, plan=plan) for decoder, plan in zip(planned, plans, strict=True)]
        with staged(target, force) as stage:
            done = []
            for one, decoder in zip(opened_graphs, planned, strict=True):
                report = _write(one, decoder.plan, stage, data)
                inputs = made.get(one.view.decoder)
                checks = prove(decoder, report, stage, inputs, report_progress, chosen.level == "local", guide.place)
                done.append(replace(decoder, report=report, proof=checks))
            bring_companions(source.package, stage, data)
            create_file(stage / DIRECTIONS_FILE, directions_bytes(found))
            refusals = measured.refusals if measured is not None else None
            if unguarded is not None:
                refusals = guide.refusals(unguarded, stage, planned[0].plan, allow_no_effect)
            record_export(
                stage, done, spec, measured, refusals, chosen, digests, report_progress, stamped, sbom, source.parity
            )
            _write_config(
                stage, calibrated, wished, found, spec, planned[0].plan, choice.notes() if choice is not None else ()
            )
            if key is not None:
                write_signature(stage, key)
        report_progress("done", 1, 1)
        beside = guide.found | above(source.package)
        return ExportResult(
            target.absolute(), tuple(done), chosen, calibrated, refusals, choice, True, beside, source.parity
        )


def _config(path: Path | str | None, *others: object) -> GuardConfig | None:
    """A `guard.toml`, which must be the only one who says what is wanted."""
    if path is None:
        return None
    if any(other is not None for other in others):
        raise GuardError(
            f"{path}: says what is wanted and from which directions; leave spec, directions, anchors and calibration out, "
            "or edit it"
        )
    config = read_config(path)
    require_directions(path, config)
    return config


def _write_config(
    stage: Path,
    calibrated: Calibration | None,
    wished: GuardConfig | None,
    found: Directions,
    spec: GuardSpec,
    plan: GuardPlan,
    comments: Sequence[str],
) -> None:
    """The guard as a person reads and edits it. Not among the manifest's files: editing it changes no guard by itself."""
    if calibrated is not None:
        create_file(stage / CONFIG_NAME, config_of(calibrated, DIRECTIONS_FILE).encode())
    elif wished is not None:
        create_file(stage / CONFIG_NAME, to_toml(wished.spec, DIRECTIONS_FILE, found).encode())
    elif not guard_mode(plan.mode).is_calibrated:
        spec = replace(
            spec, mode=guard_mode(plan.mode).name, layers=plan.layers, rank=plan.guards[0].rank, positions="prompt"
        )
        create_file(stage / CONFIG_NAME, to_toml(spec, DIRECTIONS_FILE, found, comments).encode())


@dataclass(frozen=True)
class _Opened:
    """A decoder graph in memory, not changed yet."""

    view: ModelPackage
    graph: ir.Model
    anatomy: DecoderAnatomy


def _open(view: ModelPackage) -> _Opened:
    graph = view.load_decoder()
    require_unguarded(graph)  # before its directions are looked for: a guarded folder has some beside it
    return _Opened(view, graph, dissect_decoder(view, graph))


def dissect_decoder(package: ModelPackage, graph: ir.Model) -> DecoderAnatomy:
    """The anatomy of a package's decoder; a failure names the file.

    Raises:
        AnatomyNotFound: no residual stream, not the config's, or one whose layers an unknown operator makes uncertain.
        ModelUnreadable: the graph has a cycle, or functions that cannot be inlined.
    """
    try:
        anatomy = dissect(graph, package.declared_layers)
    except AnatomyNotFound as error:
        raise AnatomyNotFound(f"{package.decoder}: {hidden_decoder(graph, str(error)) or error}") from None
    except ModelUnreadable as error:
        raise ModelUnreadable(f"{package.decoder}: {error}") from None
    if package.expected_layers is None and (why := uncertain_layers(graph, anatomy.layer_count)) is not None:
        raise AnatomyNotFound(f"{package.decoder}: {why}")
    return anatomy


def _require_alike(graphs: Sequence[_Opened]) -> None:
    """All decoder graphs of one folder hold the same decoder: what guards one guards the others."""
    first = graphs[0]
    for other in graphs[1:]:
        shapes = [(one.anatomy.layer_count, one.anatomy.width) for one in (first, other)]
        if shapes[0] != shapes[1]:
            raise AnatomyNotFound(
                f"{other.view.decoder}: has {shapes[1][0]} layers of width {shapes[1][1]}, {first.view.decoder.name} in "
                f"the same folder {shapes[0][0]} of width {shapes[0][1]}; move it to a folder of its own"
            )


def _plan(one: _Opened, found: Directions, spec: GuardSpec, notes: Sequence[str]) -> GuardPlan:
    plan = plan_guard(one.graph, one.anatomy, found, spec)
    if plan.mode == "steer" and any(planned.guard.alpha == 0 for planned in plan.sites):
        raise GuardError("alpha 0 does nothing in mode steer, and would ship as a guard; choose above 0")
    return replace(plan, notes=(*notes, *plan.notes, *notes_on_files(one.view)))


def _write(one: _Opened, plan: GuardPlan, stage: Path, data: Data) -> GuardReport:
    """The guarded graph and the weights that it refers to, in the stage."""
    path = stage / one.view.decoder.relative_to(one.view.root)
    path.parent.mkdir(parents=True, exist_ok=True)
    report = rewrite(one.graph, plan)
    bring_weights(one.view, stage, data)
    # A model with its weights outside gets a file for the guard's; whatever links out of the folder cannot have one.
    outside = bool(external_files(one.view.decoder)) and data != "reference"
    save_graph(one.graph, path, report.initializers if outside else ())
    return report


def inspect(
    model: Path | str,
    variant: str | None = None,
    report_progress: ProgressCallback = ignore_progress,
    cache: bool = True,
) -> DecoderAnatomy:
    """The residual stream of a model's decoder; a checkpoint is exported first.

    Args:
        model: a `.onnx` file, a model folder, a Hugging Face checkpoint folder or a hub id.
        variant: precision variant of an onnx-community folder; `None` takes the one that runs.
        report_progress: called with `(stage, done, total)`.
        cache: take a checkpoint's export from the user's cache, and keep it there.

    Raises:
        GuardError: it cannot be opened, or no residual stream was found, with the reason.
    """
    require_path(model, "model")
    with opened(model, variant, report_progress, cache=cache) as source:
        return dissect_decoder(source.package, source.package.load_decoder())


def prove(
    decoder: GuardedDecoder,
    report: GuardReport,
    folder: Path,
    inputs: ProofInputs | None,
    report_progress: ProgressCallback,
    locally: bool = False,
    place: DecoderPlace | None = None,
) -> tuple[Check, ...]:
    """Every check, on the file as it will ship.

    Args:
        decoder: what was planned, and the unguarded model.
        report: what was done.
        folder: where the guarded copy is.
        inputs: what to run it on; `None` does not run the model.
        locally: run each guard by itself.
        place: where decoders are opened, one at a time.

    Raises:
        ProofFailed: one of them does not hold.
    """
    label = f"proving {decoder.package.decoder.name}"
    report_progress(label, 0, 2)
    path = folder / decoder.path
    source = decoder.package.load_decoder()
    dissect(source)  # inlines functions and infers types exactly as was done to the graph that was rewritten
    structure = prove_fold if decoder.plan.lowering == FOLD else prove_structure
    checks = structure(source, load_graph(path, trust_links=True), decoder.anatomy, decoder.plan, report)
    report_progress(label, 1, 2)
    _require_all(checks)
    if locally:
        checks += prove_locally(path, decoder.plan, report)
    if inputs is not None:
        running = prove_fold_by_running if decoder.plan.lowering == FOLD else prove_by_running
        checks += running(decoder.package, path, decoder.plan, report, inputs, place)
    report_progress(label, 2, 2)
    _require_all(checks)
    return checks


def _require_all(checks: Sequence[Check]) -> None:
    # The headroom first: where float16 overflows, every other check fails too, and says less.
    for check in sorted(checks, key=lambda check: check.name != HEADROOM):
        if not check.ok:
            raise ProofFailed(
                f"the proof failed at {check.name!r}: worst {check.worst:.2e}, limit {check.limit:.2e}, "
                f"{check.compared} compared ({check.note}); nothing was written"
            )


def extract_directions(
    model: Path | str,
    output: Path | str,
    *,
    anchors: Sources | None = None,
    rank: int = EXTRACTED_RANK,
    calibrate_for: Mode | None = None,
    calibration: Sources | None = None,
    estimator: str = DEFAULT_ESTIMATOR,
    readout: str | None = None,
    variant: str | None = None,
    ray: str | None = None,
    ray_workers: int | None = None,
    force: bool = False,
    cache: bool = True,
    report_progress: ProgressCallback = ignore_progress,
    report_found: Callable[[Mapping[str, Path]], None] = lambda found: None,
) -> Directions:
    """Extract directions from a model and write the file; with `calibrate_for` choose layers and thresholds too.

    A checkpoint's are read in torch; to calibrate, it is exported first, because a guard is calibrated on the graph that
    will carry it. A calibration is also written as `guard.toml` has it, beside the file and under its name.

    Args:
        model: a `.onnx` file, a model folder, a Hugging Face checkpoint folder or a hub id.
        output: the file to write.
        anchors: anchor pairs to extract from; default: found beside the model, else the built-in ones.
        rank: rows to keep per layer, 1 to 64.
        calibrate_for: mode to choose layers, thresholds and targets for; `None` calibrates nothing.
        calibration: labelled prompts to calibrate on; default: found beside the anchors, else anchors that are kept back.
        estimator: estimator of the directions (`estimators.ESTIMATORS`).
        readout: readout of the gate of `restore` (`estimators.READOUTS`); `None` chooses.
        variant: precision variant of an onnx-community folder; `None` takes the one that runs.
        ray: address of the Ray cluster that reads the states (`cluster.cluster`); default: this process.
        ray_workers: processes of it; default: one per GPU, else per machine.
        force: replace the file, and the config beside it.
        cache: take a checkpoint's export from the user's cache, and keep it there.
        report_progress: called with `(stage, done, total)`.
        report_found: called at the end with what was found beside the model and used -> its absolute path.

    Raises:
        GuardError: anything wrong with the request or its files; nothing was written.
    """
    require_path(model, "model")
    require_path(output, "output")
    output = Path(output).absolute()
    spec = GuardSpec(mode=calibrate_for, rank=rank)
    config = output.with_suffix(".toml")
    for path in (output, config) if calibrate_for is not None else (output,):
        require_writable_file(path, force)
    if is_checkpoint(model) and calibrate_for is None:
        with open_executors(ray, ray_workers) as executors:
            return _extract_in_torch(model, output, anchors, rank, estimator, report_progress, executors, report_found)
    import_onnxruntime()
    with open_executors(ray, ray_workers) as executors, opened(model, variant, report_progress, cache=cache) as source:
        anatomy = _open(source.package).anatomy
        guide = Guide(
            source,
            anatomy,
            spec,
            DEFAULT_BUDGET,
            force,
            report_progress,
            estimator=estimator,
            readout=readout,
            output=output,
            executors=executors,
        )
        if calibrate_for is None:
            found, calibrated = guide.extracted(guide.anchors(anchors), rank), None
        else:
            calibrated = guide.calibrated(anchors, calibration)
            found = calibrated.directions
        write_file(output, directions_bytes(found))
        if calibrated is not None:
            write_file(config, config_of(calibrated, output.name).encode())
        report_found(guide.found | above(source.package))
        return found


def _extract_in_torch(
    checkpoint: Path | str,
    output: Path,
    given: Sources | None,
    rank: int,
    estimator: str,
    report_progress: ProgressCallback,
    executors: ExecutorFactory,
    report_found: Callable[[Mapping[str, Path]], None],
) -> Directions:
    from .extraction.extract_torch import extract_from_checkpoint

    beside = None
    if given is None and Path(checkpoint).is_dir():  # of a hub id there is no folder here
        beside = find_file(Path(checkpoint), ANCHOR_FILES)
    anchors = open_anchors(given if given is not None else beside or BUILTIN)
    found = extract_from_checkpoint(
        checkpoint,
        anchors.pairs,
        output,
        rank,
        estimator=estimator,
        report_count=lambda done, total: report_progress("extracting directions", done, total),
        executors=executors,
    )
    found = replace(found, anchors=anchors.record())
    write_file(output, directions_bytes(found))
    report_found({"anchors": beside} if beside is not None else {})
    return found
