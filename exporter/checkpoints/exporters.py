"""The exporters of checkpoints, a table of three rows. Each writes a model folder that `open_package` opens.

    transformers   vision encoder, embeddings, decoder (onnx-community layout; a text-only model is one graph), compared with
                   torch; in fp32, fp16 or w16a32 (weights in float16, arithmetic in float32)         extra torch
    genai          onnxruntime-genai's builder: the decoder, fused, in fp32, fp16 or int4; with the graphs around it where
                   genai runs the model with pictures (`genai_around_decoder`)                       extra genai
    optimum        optimum-onnx: the text decoder as one `model.onnx` with a cache                    extra optimum

optimum-onnx needs transformers 4.57, the others need 5: it lives in an environment of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from ...graphs.errors import ExtraMissing, GuardError, ModelUnreadable, first_line
from ...graphs.extras import install_command
from ...graphs.progress import ProgressCallback, ignore_progress
from ...graphs.proof.structure import Check
from ..choices import ExporterName, Precision
from .convert import convert_checkpoint, copy_companions, locate, read_config
from .genai_around_decoder import add_pictures, has_pipeline
from .genai_builder import name_older_tokenizer

DEFAULT_EXPORTER: ExporterName = "transformers"
OPTIMUM_NEEDS = "transformers 4.57"
_BUILDER = "vlmguard.exporter.checkpoints.genai_builder"  # onnxruntime-genai's own, behind what it cannot read


@dataclass(frozen=True)
class Job:
    """One export.

    Attributes:
        checkpoint: a folder, or a hub id.
        out: a new or empty folder; incomplete after an exception.
        dtype: of the weights, supported by the exporter.
        opset: `None`: the exporter's default.
        report_progress: called with `(stage, done, total)`.
    """

    checkpoint: str | Path
    out: Path
    dtype: Precision
    opset: int | None
    report_progress: ProgressCallback


@dataclass(frozen=True)
class Exporter:
    """One row of the table.

    Attributes:
        export: runs the export; returns the comparison with torch, if it makes one.
        dtypes: supported precisions, the default first.
        chooses_opset: whether the exporter always chooses the opset.
    """

    export: Callable[[Job], tuple[Check, ...]]
    dtypes: tuple[Precision, ...]
    chooses_opset: bool = False


def export_checkpoint(
    checkpoint: str | Path,
    out: Path,
    exporter: str | None = None,
    dtype: str | None = None,
    opset: int | None = None,
    report_progress: ProgressCallback = ignore_progress,
) -> tuple[Check, ...]:
    """Export a checkpoint to a model folder.

    Args:
        checkpoint: a folder, or a hub id.
        out: the folder to write.
        exporter: a key of `EXPORTERS`; default `transformers`.
        dtype: precision of the weights; default: the exporter's first.
        opset: ONNX opset; default: the exporter's.
        report_progress: called with `(stage, done, total)`.

    Returns:
        The comparison of the graphs with torch; empty if the exporter makes none.

    Raises:
        GuardError: unknown exporter, or one that does not support this dtype or opset.
        ExtraMissing: the exporter is not installed.
        ModelUnreadable: the exporter cannot export this checkpoint; with its own message.
    """
    name = exporter or DEFAULT_EXPORTER
    if name not in EXPORTERS:
        raise GuardError(f"unknown exporter {name!r}; choose {', '.join(EXPORTERS)}")
    row = EXPORTERS[name]
    precision = row.dtypes[0] if dtype is None else dtype
    if precision not in row.dtypes:
        able = " or ".join(other for other, has in EXPORTERS.items() if dtype in has.dtypes) or "no exporter"
        raise GuardError(f"{name} does not write dtype {dtype!r}, only {_choice(row.dtypes)}; {able} writes {dtype}")
    if opset is not None and row.chooses_opset:
        raise GuardError(f"{name} chooses its own opset, {opset} has no effect; leave --opset out")
    return row.export(Job(checkpoint, out, precision, opset, report_progress))


def _choice(names: Sequence[str]) -> str:
    """`a, b or c`"""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _with_transformers(job: Job) -> tuple[Check, ...]:
    assert job.dtype != "int4"
    done = convert_checkpoint(
        job.checkpoint, job.out, dtype=job.dtype, opset=job.opset, report_progress=job.report_progress
    )
    return done.parity


def _with_genai(job: Job) -> tuple[Check, ...]:
    """onnxruntime-genai's builder (`genai_builder`), in a process of its own: it imports by names like `builders`."""
    for module in ("onnxruntime_genai", "torch", "transformers"):
        if find_spec(module) is None:
            raise ExtraMissing(
                f"exporter genai needs {module}, which is not installed; run: {install_command('genai')}"
            )
    folder = locate(job.checkpoint)
    pictures = has_pipeline(read_config(folder), job.checkpoint)
    job.report_progress(f"building {job.checkpoint} with onnxruntime-genai", 0, 1)
    # Its half precision is for CUDA and named so; a CPU runs the same graph.
    provider = "cuda" if job.dtype == "fp16" else "cpu"
    with tempfile.TemporaryDirectory(prefix="vlmguard-genai-") as cache:
        command = [sys.executable, "-m", _BUILDER, "-i", str(folder), "-o", str(job.out)]
        command += ["-p", job.dtype, "-e", provider, "-c", cache, "--extra_options", "hf_token=false"]
        command += ["exclude_embeds=true"] if pictures else []
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # everything is in the folder
        built = subprocess.run(command, capture_output=True, text=True, errors="replace", env={**os.environ, **offline})
    if built.returncode or not (job.out / "genai_config.json").is_file():
        raise ModelUnreadable(
            f"{job.checkpoint}: onnxruntime-genai's builder cannot export it ({_last_line(built.stderr)}); "
            f"try --exporter {DEFAULT_EXPORTER}"
        )
    name_older_tokenizer(job.out)
    if pictures:
        add_pictures(folder, job.checkpoint, job.out, job.dtype, job.report_progress)
    return ()


def _with_optimum(job: Job) -> tuple[Check, ...]:
    """`optimum.exporters.onnx.main_export`, its public function."""
    main_export = _import_optimum()
    folder = locate(job.checkpoint)
    read_config(folder)
    job.report_progress(f"exporting {job.checkpoint} with optimum", 0, 1)
    try:
        with redirect_stdout(sys.stderr):  # stdout belongs to results
            main_export(
                str(folder),
                output=job.out,
                task="text-generation-with-past",
                opset=job.opset,
                dtype=job.dtype,
                do_validation=False,  # its own comparison; the proof is ours
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as failure:  # whatever torch, transformers and optimum raise is a fact about this checkpoint
        raise ModelUnreadable(
            f"{job.checkpoint}: optimum cannot export it ({first_line(failure)}); try --exporter {DEFAULT_EXPORTER}"
        ) from failure
    copy_companions(folder, job.out)
    return ()


def _import_optimum() -> Callable[..., None]:
    """optimum's function; an old transformers in the way is named, because pip cannot have both."""
    try:
        from optimum.exporters.onnx import main_export  # pyright: ignore[reportMissingImports]
    except ImportError as missing:
        raise ExtraMissing(
            f"exporter optimum needs optimum-onnx with {OPTIMUM_NEEDS}, found {_installed('optimum-onnx')} with "
            f"{_installed('transformers')}; in an environment of its own, run: {install_command('optimum')}"
        ) from missing
    return main_export


def _installed(distribution: str) -> str:
    try:
        return f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        return f"no {distribution}"


def _last_line(text: str) -> str:
    """A traceback's own summary."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else "no output"
    return last if len(last) <= 160 else f"{last[:160]}..."


EXPORTERS: Mapping[str, Exporter] = {
    "transformers": Exporter(_with_transformers, ("fp32", "fp16", "w16a32")),
    "genai": Exporter(_with_genai, ("fp32", "fp16", "int4"), chooses_opset=True),
    "optimum": Exporter(_with_optimum, ("fp32", "fp16")),
}
