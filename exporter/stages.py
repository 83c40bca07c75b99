"""The stages of an export. Each one sets its own fields of the `ExportJob`; `pipeline` has their order."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ..graphs.directions import DIRECTIONS_FILE, Directions, directions_bytes
from ..graphs.errors import GuardError
from ..graphs.graph_io import GUARD_DATA, external_files, save_graph
from ..graphs.modes import guard_mode
from ..graphs.new_files import create_file
from ..graphs.package import ModelPackage
from ..graphs.plan import GuardPlan
from ..graphs.planner import plan_guard, require_layers
from ..graphs.reference import LayerGuard, weights
from ..graphs.rewrite import GuardReport, rewrite
from ..graphs.tensorrt import require_readable
from .artifact.guarded_folder import (
    GuardedDecoder,
    bring_companions,
    bring_weights,
    notes_on_files,
    notes_on_runtime,
    record_export,
)
from .artifact.signing import write_signature
from .calibration.guard_config import CONFIG_NAME, config_of, to_toml
from .calibration.judged import readable_images
from .calibration.results import Calibration
from .effect_check import ask_after, ask_before, with_separation
from .export_job import ExportJob
from .opened_decoder import OpenedDecoder, open_decoder_graph, require_alike
from .proof.inputs import ProofInputs, given_inputs
from .proof.level import choose_level, without_inputs
from .proof.make_inputs import make_proof_inputs
from .proof.prove_decoder import prove_decoder
from .proof.signature import InputsUnknown
from .resolve import DirectionsRequest, calibrated_directions, resolve_directions
from .session import CALIBRATION_FILES, Session
from .variants import measure_variants


def read_decoders(job: ExportJob) -> None:
    """Every decoder graph of the model, dissected; what cannot be guarded is refused before minutes of work."""
    package = job.source.package
    job.graphs = tuple(open_decoder_graph(view) for view in package.views())
    if job.requested.target == "tensorrt":
        for decoder in job.graphs:
            require_readable(decoder.graph, str(decoder.view.decoder))
    require_alike(job.graphs)
    if job.options.proof_inputs:
        given_inputs(_proof_files(job), package.roles)
    require_layers(job.requested, job.graphs[0].anatomy)
    job.session = Session(job.source, job.graphs[0].anatomy, job.report_progress)


def resolve_guard(job: ExportJob) -> None:
    """Directions: given, found, or extracted and calibrated; and the mode, where it was open."""
    options = job.options
    given = options.directions if job.config is None else job.config.directions
    request = _request(job)
    request = replace(
        request,
        given=None if given is None else Path(given),
        estimator=options.estimator,
        accepts_foreign=options.force,
        keep_beside=None if options.dry_run else job.target,
    )
    job.resolved = resolve_directions(job.session, request)
    directions, choice = job.resolved.directions, job.resolved.choice
    job.directions = directions if job.config is None else job.config.applied(directions)
    job.spec = job.requested if choice is None else replace(job.requested, gate=choice.chosen.gate)


def plan_guards(job: ExportJob) -> None:
    """Plan the changes of each decoder graph, with the reasons."""
    job.planned = tuple(
        GuardedDecoder(graph.view, graph.anatomy, _plan(job, graph, job.directions)) for graph in job.graphs
    )


def choose_proof(job: ExportJob) -> None:
    """Choose the level of the proof and its inputs."""
    wanted, lowering = job.options.proof, job.planned[0].plan.lowering
    job.proved = choose_level(wanted, [(graph.view, graph.graph) for graph in job.graphs], lowering)
    job.inputs = {}
    if job.options.dry_run or job.proved.level != "full":
        return
    try:
        job.inputs = {view.decoder: _inputs(job, view) for view in (graph.view for graph in job.graphs)}
    except InputsUnknown as unknown:
        instead = without_inputs(wanted, unknown.reason, lowering)
        if instead is None:
            raise
        job.proved = instead


def ask_unguarded(job: ExportJob) -> None:
    """Run the unguarded model on harmful prompts, unless a calibration already did."""
    job.baseline = None
    if job.resolved.measured is not None:
        return
    job.baseline = ask_before(job.session, job.planned[0].plan.mode, runs=job.proved.level == "full")
    note = (job.baseline.note,) if job.baseline.note else ()
    plans = [with_separation(job.session, decoder.plan, job.baseline.unguarded) for decoder in job.planned]
    job.planned = tuple(
        replace(decoder, plan=replace(plan, notes=(*note, *plan.notes)))
        for decoder, plan in zip(job.planned, plans, strict=True)
    )


def write_guarded(job: ExportJob) -> None:
    """Each guarded graph with its weights, proved on the file as it will ship; then the other files of the model."""
    done = []
    for graph, decoder in zip(job.graphs, job.planned, strict=True):
        done.append(_write_proved(job, graph, decoder))
    job.decoders = tuple(done)
    bring_companions(job.source.package, job.folder, job.options.data)
    create_file(job.folder / DIRECTIONS_FILE, directions_bytes(job.directions))


def ask_guarded(job: ExportJob) -> None:
    """Run the guarded model on the same prompts; a guard without an effect is rejected."""
    measured = job.resolved.measured
    job.refusals = measured.refusals if measured is not None else None
    if job.baseline is not None and job.baseline.unguarded is not None:
        plan = job.planned[0].plan
        job.refusals = ask_after(job.session, job.baseline.unguarded, job.folder, plan, job.options.allow_no_effect)


def ask_variants(job: ExportJob) -> None:
    """What every precision variant refuses, where the folder has several; the guard must protect each of them."""
    decoders = [(decoder.package, decoder.plan) for decoder in job.decoders]
    allowed = job.options.allow_no_effect
    runs = job.proved.level == "full"
    refit = partial(_refit, job)
    job.variants = measure_variants(job.session, decoders, job.folder, allowed, refit) if runs else ()


def write_records(job: ExportJob) -> None:
    """The manifest, the guard as an editable `guard.toml`, and the signature."""
    record_export(
        job.folder,
        job.decoders,
        job.spec,
        job.resolved.measured,
        job.refusals,
        job.proved,
        job.options.digests,
        job.report_progress,
        job.stamp,
        job.options.sbom,
        job.source.parity,
        job.variants,
    )
    text = _config_text(job)
    if text is not None:  # not among the manifest's files: editing it changes no guard by itself
        create_file(job.folder / CONFIG_NAME, text.encode())
    if job.key is not None:
        write_signature(job.folder, job.key)


def _proof_files(job: ExportJob) -> tuple[Path, ...]:
    return tuple(map(Path, job.options.proof_inputs))


def _request(job: ExportJob) -> DirectionsRequest:
    """The prompts of a calibration, and how to calibrate on them."""
    options = job.options
    return DirectionsRequest(
        job.requested,
        anchors=options.anchors,
        calibration=options.calibration,
        images=readable_images(options.calibration_images),
        budget=options.budget,
        readout=options.readout,
        seconds=options.calibration_seconds,
    )


def _refit(job: ExportJob, number: int, error: GuardError) -> tuple[GuardPlan, Calibration]:
    """Fit the numbers of a decoder to its own states; write and prove it again.

    Args:
        job: its decoders are written.
        number: of the decoder.
        error: why it falls short.

    Raises:
        GuardError: `error`, with the reason why there are no such numbers.
    """
    before = job.decoders[number]
    plan = before.plan
    if not number or not guard_mode(plan.mode).has_threshold or job.spec.tau is not None:  # nothing may be fitted
        raise error
    spec = replace(job.spec, mode=plan.mode, layers=plan.layers, rank=plan.guards[0].rank, positions=plan.positions)
    source = replace(job.source, package=before.package)
    session = Session(source, before.anatomy, job.report_progress, job.session.place)
    request = replace(_request(job), spec=spec)
    if request.anchors is None and request.calibration is None:
        request = replace(request, calibration=session.find("calibration", CALIBRATION_FILES))
    try:
        calibration = calibrated_directions(session, request, job.directions)
    except GuardError as reason:
        raise type(error)(f"{error}; numbers of its own were not found: {reason}") from None
    job.session.found |= session.found
    graph = open_decoder_graph(before.package)
    notes = ("the numbers of this variant were fitted to its own states", *session.notes)
    again = _plan(job, graph, calibration.directions)
    decoder = GuardedDecoder(
        before.package, graph.anatomy, replace(again, notes=(*notes, *again.notes)), directions=calibration.directions
    )
    written = job.folder / decoder.path
    for path in (written, written.with_name(written.name + GUARD_DATA)):
        path.unlink(missing_ok=True)
    decoder = _write_proved(job, graph, decoder)
    assert decoder.directions_file is not None
    create_file(job.folder / decoder.directions_file, directions_bytes(calibration.directions))
    job.decoders = (*job.decoders[:number], decoder, *job.decoders[number + 1 :])
    return decoder.plan, calibration


def _write_proved(job: ExportJob, graph: OpenedDecoder, decoder: GuardedDecoder) -> GuardedDecoder:
    """A decoder in the hidden folder, with its report and its proof."""
    report = _write(job, graph, decoder.plan)
    checks = prove_decoder(
        decoder,
        report,
        job.folder,
        job.inputs.get(graph.view.decoder),
        job.report_progress,
        locally=job.proved.level == "local",
        place=job.session.place,
    )
    return replace(decoder, report=report, proof=checks)


def _plan(job: ExportJob, decoder: OpenedDecoder, directions: Directions) -> GuardPlan:
    plan = plan_guard(decoder.graph, decoder.anatomy, directions, job.spec)
    if any(site.guard.alpha == 0 and not _moves(plan.mode, site.guard) for site in plan.sites):
        raise GuardError(f"alpha 0 does nothing in mode {plan.mode}, and would ship as a guard; choose above 0")
    of_folder = (*notes_on_files(decoder.view), *notes_on_runtime(decoder.view, plan))
    return replace(plan, notes=(*job.session.notes, *plan.notes, *of_folder))


def _moves(mode: str, guard: LayerGuard) -> bool:
    """Whether an open gate moves a state whose coordinates are all 1."""
    state, supervisor = guard.ssd.sum(axis=0, keepdims=True), np.ones((1, guard.rank), np.float32)
    return bool(weights(mode, replace(guard, threshold=-np.inf), state, supervisor).any())


def _inputs(job: ExportJob, view: ModelPackage) -> ProofInputs:
    return make_proof_inputs(job.session, view, _proof_files(job))


def _write(job: ExportJob, decoder: OpenedDecoder, plan: GuardPlan) -> GuardReport:
    """The guarded graph and the weights that it refers to, in the hidden folder."""
    view, data = decoder.view, job.options.data
    path = job.folder / view.decoder.relative_to(view.root)
    path.parent.mkdir(parents=True, exist_ok=True)
    report = rewrite(decoder.graph, plan)
    bring_weights(view, job.folder, data)
    # A model with its weights outside gets a file for the guard's; a link that leads out of the folder cannot have one.
    outside = bool(external_files(view.decoder)) and data != "reference"
    save_graph(decoder.graph, path, report.initializers if outside else ())
    return report


def _config_text(job: ExportJob) -> str | None:
    """The guard as a `guard.toml`; `None` where only a directions file was given."""
    plan, choice = job.planned[0].plan, job.resolved.choice
    if job.resolved.calibration is not None:
        return config_of(job.resolved.calibration, DIRECTIONS_FILE)
    if job.config is not None:
        return to_toml(job.config.spec, DIRECTIONS_FILE, job.directions, edited=job.config.text)
    row = guard_mode(plan.mode)
    if row.is_calibrated:
        return None
    spec = replace(job.spec, mode=row.name, layers=plan.layers, rank=plan.guards[0].rank, positions=row.positions[0])
    return to_toml(spec, DIRECTIONS_FILE, job.directions, choice.notes() if choice is not None else ())
