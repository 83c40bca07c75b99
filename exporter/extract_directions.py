"""`extract_directions`: directions from the model itself, as a file, calibrated on request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ..graphs.directions import Directions, directions_bytes
from ..graphs.modes import Mode
from ..graphs.places import is_checkpoint
from ..graphs.progress import ProgressCallback, ignore_progress
from ..graphs.spec import GuardSpec
from ..graphs.staging import require_writable_file, write_file
from ..runtime.onnxruntime_runner import import_onnxruntime
from .calibration.guard_config import config_of
from .cluster import open_executors
from .executors import ExecutorFactory
from .extraction.estimators import DEFAULT_ESTIMATOR
from .opened_decoder import open_decoder_graph
from .prompts.anchors import open_anchors
from .prompts.labelled import BUILTIN, Sources, find_file
from .requests import require_path
from .resolve import EXTRACTED_RANK, DirectionsRequest, calibrated_directions, extracted_directions, open_anchor_pairs
from .session import ANCHOR_FILES, Session
from .sources import above, opened


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
    config = output.with_suffix(".toml")
    for path in (output, config) if calibrate_for is not None else (output,):
        require_writable_file(path, force)
    if is_checkpoint(model) and calibrate_for is None:
        with open_executors(ray, ray_workers) as executors:
            return _extract_in_torch(model, output, anchors, rank, estimator, report_progress, executors, report_found)
    import_onnxruntime()
    with open_executors(ray, ray_workers) as executors, opened(model, variant, report_progress, cache=cache) as source:
        session = Session(source, open_decoder_graph(source.package).anatomy, report_progress)
        request = DirectionsRequest(
            GuardSpec(mode=calibrate_for, rank=rank),
            anchors=anchors,
            calibration=calibration,
            readout=readout,
            estimator=estimator,
            keep_beside=output,
            executors=executors,
        )
        if calibrate_for is None:
            pairs = open_anchor_pairs(session, anchors)
            directions, calibrated = extracted_directions(session, request, pairs, rank), None
        else:
            calibrated = calibrated_directions(session, request)
            directions = calibrated.directions
        write_file(output, directions_bytes(directions))
        if calibrated is not None:
            write_file(config, config_of(calibrated, output.name).encode())
        report_found(session.found | above(source.package))
        return directions


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
    directions = extract_from_checkpoint(
        checkpoint,
        anchors.pairs,
        output,
        rank,
        estimator=estimator,
        report_count=lambda done, total: report_progress("extracting directions", done, total),
        executors=executors,
    )
    directions = replace(directions, anchors=anchors.record())
    write_file(output, directions_bytes(directions))
    report_found({"anchors": beside} if beside is not None else {})
    return directions
