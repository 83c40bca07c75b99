"""`export`: from a model to a guarded, proved folder.

    source -> decoders -> directions (given, or extracted and calibrated) -> plans -> rewrite -> proof -> folder

The folder holds the guarded decoder, the model's other files, `directions.safetensors`, `guard.toml` and `guard.json`. It is
written under a hidden name beside OUT, and gets its own name when every check holds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Unpack

from ..graphs.clock import stamp
from ..graphs.errors import GuardError
from ..graphs.places import is_checkpoint
from ..graphs.progress import ProgressCallback, ignore_progress
from ..graphs.spec import GuardSpec
from ..graphs.staging import require_writable, staged
from ..runtime.onnxruntime_runner import import_onnxruntime
from . import stages
from .artifact.signing import require_key
from .calibration.guard_config import GuardConfig, read_config, require_directions
from .export_job import ExportJob
from .export_result import ExportResult
from .options import ExportOptions, ExportSettings, options_of
from .proof.npz import read_npz
from .requests import require_path
from .sources import opened, require_apart, require_images_for

Stage = Callable[[ExportJob], None]

PLANNING: tuple[Stage, ...] = (
    stages.read_decoders,
    stages.resolve_guard,
    stages.plan_guards,
    stages.choose_proof,
)
# Between these two a dry run ends.
WRITING: tuple[Stage, ...] = (
    stages.ask_unguarded,
    stages.write_guarded,
    stages.ask_guarded,
    stages.ask_variants,
    stages.write_records,
)


def export(
    model: Path | str,
    out: Path | str | None = None,
    options: ExportOptions | None = None,
    *,
    report_progress: ProgressCallback = ignore_progress,
    **settings: Unpack[ExportSettings],
) -> ExportResult:
    """Guard a model, prove the guard, write the guarded folder.

    Args:
        model: a `.onnx` file, a model folder, a Hugging Face checkpoint folder or a hub id.
        out: the folder to write; default `<name>-guarded` beside the model.
        options: how; default `ExportOptions()`.
        report_progress: called with `(stage, done, total)`.
        settings: single attributes of `ExportOptions`, and of `GuardSpec` in place of a whole `spec`: `mode`, `layers` (numbers
            from 0, or text such as `"2-4"`), `rank`, `alpha`, `tau`, `positions` and so on. `mode="auto"` is the default.

    Raises:
        GuardError: anything wrong with the request or its files; nothing was written.
        TypeError: a setting with an unknown name.
    """
    require_path(model, "model")
    options = options_of(options, settings)
    config = _checked(model, options)
    key = require_key(options.sign) if options.sign is not None else None
    stamped = stamp(options.reproducible)
    requested = config.spec if config is not None else options.spec or GuardSpec()
    require_images_for(requested.mode, model)  # before a checkpoint is exported
    with opened(
        model, options.variant, report_progress, options.dtype, options.opset, options.exporter, options.cache
    ) as source:
        target = Path(out) if out is not None else source.beside / f"{source.name}-guarded"
        require_apart(target, Path(model), source.package)
        if not options.dry_run:
            require_writable(target, options.force)
        job = ExportJob(options, requested, config, source, target, stamped, key, report_progress)
        for stage in PLANNING:
            stage(job)
        if options.dry_run:
            return job.result(written=False)
        with staged(target, options.force) as job.folder:
            for stage in WRITING:
                stage(job)
        report_progress("done", 1, 1)
        return job.result(written=True)


def _checked(model: Path | str, options: ExportOptions) -> GuardConfig | None:
    """Refuse what can be refused before a model is opened; returns the given `guard.toml`."""
    if options.data == "reference" and is_checkpoint(model):
        raise GuardError(
            f"{model}: data reference would link to the cached export of this checkpoint; choose link or copy"
        )
    if options.proof != "structure" and not options.dry_run:
        import_onnxruntime()  # a proof needs a runtime
    for path in options.proof_inputs:
        read_npz(Path(path))
    if options.config is None:
        return None
    if any(part is not None for part in (options.spec, options.directions, options.anchors, options.calibration)):
        raise GuardError(
            f"{options.config}: already has the guard and its directions; leave spec, directions, anchors and calibration "
            "out, or edit it"
        )
    config = read_config(options.config)
    require_directions(options.config, config)
    return config
