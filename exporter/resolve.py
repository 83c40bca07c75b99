"""Finds the directions of a guard: given, beside the model, or extracted from anchor pairs and calibrated."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..graphs.digests import sha256_file
from ..graphs.directions import DIRECTIONS_FILE, Directions, read_directions
from ..graphs.errors import DirectionMismatch, GuardError
from ..graphs.modes import guard_mode
from ..graphs.planner import require_fitting
from ..graphs.spec import GuardSpec
from ..runtime.images.vision import unknown_processor
from .calibration.align_layers import ALIGNED_RANK, MORE_ROWS
from .calibration.attempts import Choice
from .calibration.calibrate import DEFAULT_BUDGET, calibrate
from .calibration.choice import Wish, choose
from .calibration.deadline import Deadline
from .calibration.judged import beside_images
from .calibration.results import Calibration
from .executors import ExecutorFactory, local_executors
from .extraction.estimators import DEFAULT_ESTIMATOR
from .extraction.extract import extract_all_layers
from .extraction.kept_states import kept_beside, model_digest
from .prompts.anchors import Anchors, open_anchors
from .prompts.labelled import (
    BUILTIN,
    LabelledPrompt,
    Sources,
    fingerprint,
    full_names,
    is_builtin,
    prompts_from_anchors,
    read_anchors,
    read_prompts,
    short_names,
)
from .prompts.overlaps import require_held_out
from .session import ANCHOR_FILES, CALIBRATION_FILES, Session

EXTRACTED_RANK = 4


@dataclass(frozen=True)
class DirectionsRequest:
    """Source and calibration of directions.

    Attributes:
        spec: the guard that they are for; mode `None` is open.
        given: a directions file.
        anchors: anchor pairs to extract from; default: found beside the model, else the built-in ones.
        calibration: labelled prompts to calibrate on.
        images: pictures to calibrate with besides blank ones and noise.
        budget: largest share of harmless prompts that the guard may make the model refuse.
        readout: readout of the gate of `restore`; `None` lets the calibration choose.
        seconds: time limit of a calibration.
        estimator: estimator of extracted directions.
        accepts_foreign: whether directions extracted from another decoder file are accepted.
        keep_beside: the output beside which states are kept while they are read; `None`: nowhere.
        executors: what reads the states of the anchors.
    """

    spec: GuardSpec = field(default_factory=GuardSpec)
    given: Path | None = None
    anchors: Sources | None = None
    calibration: Sources | None = None
    images: tuple[Path, ...] = ()
    budget: float = DEFAULT_BUDGET
    readout: str | None = None
    seconds: float | None = None
    estimator: str = DEFAULT_ESTIMATOR
    accepts_foreign: bool = False
    keep_beside: Path | None = None
    executors: ExecutorFactory = local_executors

    @property
    def calibration_option(self) -> str | None:
        """The name of an option that only a calibration reads, if one was given."""
        options = {
            "--readout": self.readout is not None,
            "--budget": self.budget != DEFAULT_BUDGET,
            "--calibration-image": bool(self.images),
            "--calibration-seconds": self.seconds is not None,
        }
        return next((name for name, is_set in options.items() if is_set), None)


@dataclass(frozen=True)
class ResolvedDirections:
    """The directions of a guard.

    Attributes:
        directions: what the guard reads and writes along.
        measured: what was measured on the way: a calibration, the choice of a mode, or nothing.
    """

    directions: Directions
    measured: Calibration | Choice | None = None

    @property
    def choice(self) -> Choice | None:
        """How the mode was chosen, if it was open."""
        return self.measured if isinstance(self.measured, Choice) else None

    @property
    def calibration(self) -> Calibration | None:
        """Measurements of the calibration; `None` if it did not run."""
        return self.measured.calibration if isinstance(self.measured, Choice) else self.measured


def resolve_directions(session: Session, request: DirectionsRequest) -> ResolvedDirections:
    """Directions that are given, found beside the model, or extracted and calibrated.

    Args:
        session: the opened model; notes and found files are recorded in it.
        request: source and settings of the directions.

    Raises:
        DirectionMismatch: the directions belong to another model.
        GuardError: an option that has no effect, unusable prompts, or a calibration that finds no guard.
    """
    package = session.package
    if package.vision_encoder is not None and (unknown := unknown_processor(package.root)) is not None:
        session.notes.append(f"images are left out: what {unknown} makes of them cannot be made here")
    path, mode = request.given, request.spec.mode
    if path is None and request.anchors is None and request.calibration is None:
        path = session.find("directions", (DIRECTIONS_FILE,))
    if mode is not None and not guard_mode(mode).is_calibrated:
        _require_no_calibration(request, mode)
        if path is None:
            return ResolvedDirections(_uncalibrated(session, request, mode))
        if request.anchors is not None:
            raise GuardError(
                f"{path}: mode {mode} copies along these directions as they are, so --anchors has no effect; leave one of "
                "the two out"
            )
    if path is not None:
        return _from_file(session, request, path)
    if mode is not None:
        calibrated = calibrated_directions(session, request)
        return ResolvedDirections(calibrated.directions, calibrated)
    chosen = choose_mode(session, request)
    session.notes += chosen.notes()
    return ResolvedDirections(chosen.directions, chosen)


def calibrated_directions(session: Session, request: DirectionsRequest, given: Directions | None = None) -> Calibration:
    """Directions that are given, or extracted from the anchors, calibrated on labelled prompts.

    The prompts are those of the request, or those beside the anchors, or made of anchor pairs that nothing is extracted from
    (`Anchors.divided`).

    Args:
        session: the opened model.
        request: the anchors and prompts, and how to calibrate.
        given: directions to calibrate; `None` extracts them.
    """
    if given is not None and request.calibration is not None:
        session.notes.append(f"calibrated on {short_names(request.calibration)}")
        prompts = read_prompts(request.calibration, "calibration")
        return _calibrate(session, request, given, prompts, full_names(request.calibration))
    material = _material(session, request, given)
    return _calibrate(session, request, material.directions, material.prompts, material.title)


def choose_mode(session: Session, request: DirectionsRequest) -> Choice:
    """The mode that `--mode auto` chooses, with directions extracted from the anchors; prompts as for a calibration."""
    material = _material(session, request, None, MORE_ROWS, "judged")
    prompts = _usable(session, material.directions, material.prompts, material.title)
    matched = request.calibration is None and "calibration" not in session.found
    further = _further_prompts(session, material) if matched else ()
    wish = Wish(request.spec, request.budget, request.readout, request.images, request.seconds, matched, further)
    return choose(
        session.model(),
        session.anatomy,
        material.directions,
        prompts,
        wish,
        material.source,
        session.report_progress,
    )


def open_anchor_pairs(session: Session, given: Sources | None) -> Anchors:
    """The anchor pairs that are given, or those found beside the model, or the built-in ones."""
    return open_anchors(given if given is not None else session.find("anchors", ANCHOR_FILES) or BUILTIN)


def extracted_directions(
    session: Session, request: DirectionsRequest, anchors: Anchors, rank: int | None = None
) -> Directions:
    """The SSD of every layer.

    Args:
        session: the opened model.
        request: how to extract.
        anchors: the pairs.
        rank: rows per layer; `None`: as many as a calibration may try.
    """
    with contextlib.ExitStack() as stack:
        kept = None
        if request.keep_beside is not None:
            kept = stack.enter_context(kept_beside(request.keep_beside, model_digest(session.package)))
        directions = extract_all_layers(
            session.model(),
            session.anatomy,
            anchors.pairs,
            rank=rank or max(EXTRACTED_RANK, request.spec.rank or 0),
            report_count=lambda done, total: session.report_progress("extracting directions", done, total),
            estimator=request.estimator,
            kept=kept,
            executors=request.executors,
        )
    blind = [str(site.layer_index) for site in session.anatomy.sites if site.layer_index not in directions.layers]
    if blind:
        layers = "layer" if len(blind) == 1 else "layers"
        session.notes.append(
            f"no direction in {layers} {', '.join(blind)}: at the prompt's end the state is the same for harmful and "
            "harmless anchors"
        )
    return replace(directions, anchors=anchors.record())


def _uncalibrated(session: Session, request: DirectionsRequest, mode: str) -> Directions:
    """Directions for a mode without numbers to calibrate: those of the anchors, of every layer."""
    anchors = open_anchor_pairs(session, request.anchors)
    session.notes.append(f"directions extracted from {anchors.title}; nothing is calibrated in mode {mode}")
    return replace(extracted_directions(session, request, anchors, request.spec.rank or ALIGNED_RANK), mode=mode)


def _from_file(session: Session, request: DirectionsRequest, path: Path) -> ResolvedDirections:
    directions = read_directions(path)
    if request.given is None and directions.model_sha256 is None:
        session.notes.append(f"{path.name} does not record the decoder that it was extracted from")
    session.notes.append(f"directions {'given' if request.given is not None else 'found'}: {path.name}")
    _require_own(session, path, directions, request.accepts_foreign and request.given is not None)
    if request.anchors is None and request.calibration is None:
        _require_nothing_to_calibrate(request, path)
        return ResolvedDirections(directions)
    calibrated = calibrated_directions(session, request, directions)
    return ResolvedDirections(calibrated.directions, calibrated)


def _require_no_calibration(request: DirectionsRequest, mode: str) -> None:
    """Options of a calibration have no effect on a mode that has none."""
    idle = "--calibration" if request.calibration is not None else request.calibration_option
    if idle is not None:
        raise GuardError(f"mode {mode} calibrates nothing, so {idle} has no effect; leave it out")


def _require_nothing_to_calibrate(request: DirectionsRequest, path: Path) -> None:
    """Directions that are used as they are leave no room for the options of an extraction or a calibration."""
    idle = "--estimator" if request.estimator != DEFAULT_ESTIMATOR else request.calibration_option
    if idle is not None:
        raise GuardError(
            f"{path}: these directions are used as they are, so {idle} has no effect; leave it out, or give --anchors to "
            "extract and calibrate"
        )


@dataclass(frozen=True)
class _Material:
    """Inputs of a calibration.

    Attributes:
        directions: of every layer.
        prompts: labelled prompts.
        title: the prompts' name in errors.
        source: the prompts' name for the record.
    """

    directions: Directions
    prompts: Sequence[LabelledPrompt]
    title: str
    source: str


def _material(
    session: Session,
    request: DirectionsRequest,
    given: Directions | None,
    rank: int | None = None,
    used: str = "calibrated",
) -> _Material:
    """Directions, given or extracted, and the prompts to calibrate them on."""
    anchors, calibration = open_anchor_pairs(session, request.anchors), request.calibration
    if calibration is None and anchors.folder is not None:
        calibration = next((p for name in CALIBRATION_FILES if (p := anchors.folder / name).is_file()), None)
        if calibration is not None:
            session.found["calibration"] = calibration.absolute()
    if given is None:
        session.notes.append(f"directions extracted from {anchors.title}")
    if calibration is not None:
        prompts, title = read_prompts(calibration, "calibration"), full_names(calibration)
    else:
        anchors, kept = anchors.divided(extracts=given is None)
        prompts, title = prompts_from_anchors(kept, session.model().sees), anchors.name
    source = anchors.title.replace(f"{BUILTIN}:extraction", f"{BUILTIN}:calibration")
    source = source if calibration is None else short_names(calibration)
    session.notes.append(f"{used} on {source}")
    directions = given if given is not None else extracted_directions(session, request, anchors, rank)
    return _Material(directions, prompts, title, source)


def _further_prompts(session: Session, material: _Material) -> tuple[LabelledPrompt, ...]:
    """The prompts of a built-in part that the sample leaves out."""
    if not is_builtin(material.title):
        return ()
    taken = {fingerprint(prompt) for prompt in material.prompts}
    part = prompts_from_anchors(read_anchors(f"{BUILTIN}:calibration", None), session.model().sees)
    usable = _usable(session, material.directions, part, material.title)
    return tuple(prompt for prompt in usable if fingerprint(prompt) not in taken)


def _calibrate(
    session: Session,
    request: DirectionsRequest,
    directions: Directions,
    prompts: Sequence[LabelledPrompt],
    title: str,
) -> Calibration:
    model, usable = session.model(), _usable(session, directions, prompts, title)
    if model.sees:
        usable = beside_images(usable, request.images)
    return calibrate(
        model,
        session.anatomy,
        directions,
        usable,
        request.spec,
        request.budget,
        readout=request.readout,
        report_progress=session.report_progress,
        is_late=Deadline(request.seconds),
    )


def _usable(
    session: Session, directions: Directions, prompts: Sequence[LabelledPrompt], title: str
) -> list[LabelledPrompt]:
    """The prompts that the model takes, none of which the directions were extracted from."""
    anchored = (directions.anchors or {}).get("fingerprints", ())
    require_held_out(title, prompts, anchored, "are anchors that the directions were extracted from", "calibrate")
    return [prompt for prompt in prompts if session.model().sees or prompt.setting == "text"]


def _require_own(session: Session, path: Path, directions: Directions, accepts_foreign: bool) -> None:
    """Directions of this decoder: its width, its layers and, where the file records it, its digest."""
    require_fitting(directions, session.anatomy)
    package, recorded = session.package, directions.model_sha256
    digest = sha256_file(package.decoder)
    if recorded in (None, digest):
        return
    left_out = [package.root / name for name in package.left_out if name.endswith(".onnx")]
    for variant in (*package.others, *left_out):
        if sha256_file(variant) == recorded:
            session.notes.append(f"directions of {variant.name}, another graph of the same model")
            return
    if not accepts_foreign:
        raise DirectionMismatch(
            f"{path}: was extracted from another decoder file (its SHA-256 begins {recorded[:12]}, this "
            f"one's {digest[:12]}); extract them again, or give them with --directions and --force"
        )
    session.notes.append(f"directions of another decoder file ({recorded[:12]}), accepted by --force")
