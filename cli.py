"""The command line: parse, call one function, print, return a code. Results go to stdout, talk to stderr.

Exit codes: 0 done, 1 refused (one line says why and what to do next), 2 wrong usage. A bug of ours keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.markup import escape

from .exporter.budget import (
    DEFAULT_SECONDS,
    MOST_MEMORY,
    MOST_SECONDS,
    free_memory,
    inside,
    kept,
    memory_of,
    run_within,
)
from .exporter.terminal import SafeConsole, show_found, to_json
from .exporter.usage import App, Interrupted, require_effect
from .graphs.errors import GuardError
from .graphs.places import (
    CONFIG,
    DIRECTIONS,
    KEY,
    PROOF_INPUTS,
    is_checkpoint,
    require_file,
    require_guarded_folder,
    require_model,
)
from .graphs.spec import GuardSpec, parse_layers

if TYPE_CHECKING:
    from .exporter.engines.engine_folder import EngineResult
    from .runtime.telemetry import ScoredAnswer

# No emoji: ":cat:" in somebody's path is not a cat.
out, err = SafeConsole(emoji=False), SafeConsole(stderr=True, emoji=False)
app = App(
    name="vlmguard",
    help="Bake VLM-Guard's safety steering into an exported vision-language model, and prove that it is there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class ModeChoice(StrEnum):
    """Interventions, as docs/method.md has them."""

    project = "project"
    steer = "steer"
    supervise = "supervise"
    restore = "restore"
    combined = "combined"
    align = "align"


class WantedMode(StrEnum):
    """An intervention, or the one that works best."""

    auto = "auto"
    project = "project"
    steer = "steer"
    supervise = "supervise"
    restore = "restore"
    combined = "combined"
    align = "align"


class PositionsChoice(StrEnum):
    """Which tokens are edited."""

    last = "last"
    all = "all"
    prompt = "prompt"


class DataChoice(StrEnum):
    """How big files get into the guarded folder."""

    link = "link"
    copy = "copy"
    reference = "reference"


class ProofChoice(StrEnum):
    """How much is proved at export."""

    auto = "auto"
    full = "full"
    local = "local"
    structure = "structure"


class ExporterChoice(StrEnum):
    """Who exports a checkpoint."""

    transformers = "transformers"
    genai = "genai"
    optimum = "optimum"


class TargetChoice(StrEnum):
    """Who will run the guarded graph."""

    onnxruntime = "onnxruntime"
    tensorrt = "tensorrt"


class GateChoice(StrEnum):
    """When a gate is decided."""

    token = "token"
    prompt = "prompt"


class SupervisorChoice(StrEnum):
    """Where `align` reads the text-only coordinates."""

    input = "input"
    rows = "rows"


class BackendChoice(StrEnum):
    """Who builds and runs engines."""

    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt_rtx"


class EstimatorChoice(StrEnum):
    """What row 1 of a direction is estimated with."""

    svd = "svd"
    mean = "mean"
    lda = "lda"
    logistic = "logistic"


class ReadoutChoice(StrEnum):
    """What the gate of `restore` reads."""

    lda = "lda"
    logistic = "logistic"
    mean = "mean"


class PrecisionChoice(StrEnum):
    """Precision of graphs exported from a checkpoint."""

    fp32 = "fp32"
    fp16 = "fp16"
    w16a32 = "w16a32"
    int4 = "int4"


Model = Annotated[
    str,
    typer.Argument(help="model.onnx, a model folder, a Hugging Face checkpoint folder or a hub id", metavar="MODEL"),
]
Guarded = Annotated[Path, typer.Argument(help="a folder that `vlmguard-export` wrote", metavar="GUARDED")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT; accept directions made from another decoder file.")]
Variant = Annotated[
    str | None,
    typer.Option(
        help="Precision variant of an onnx-community folder: fp16, q4, ... (default: all; the plain one runs)"
    ),
]

Estimator = Annotated[
    EstimatorChoice,
    typer.Option(help="Of the directions: svd (the paper's), mean (difference of means), lda or logistic."),
]
Readout = Annotated[
    ReadoutChoice | None,
    typer.Option(help="What the gate of restore reads: lda, logistic or mean. (default: calibrated)"),
]

ProofInputs = Annotated[
    list[Path] | None,
    typer.Option(help=".npz of the decoder's inputs by name, to prove on; may be repeated. (default: prompts)"),
]

SigningKey = Annotated[
    Path | None,
    typer.Option("--sign", metavar="KEY", help="Sign the folder: elliptic-curve private key, PEM. (extra: sign)"),
]

Anchors = Annotated[
    list[str] | None,
    typer.Option(
        help="Pairs to extract from: FILE, FORMAT:FILE (see `vlmguard prompts`) or builtin; may be repeated. "
        "(default: found beside the model, else builtin)"
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster that does the batches: auto (this machine's), HOST:PORT, or local (one is started). "
        "(default: this process alone; needs vlmguard\\[ray])",
        metavar="ADDRESS",
    ),
]
RayWorkers = Annotated[
    int | None,
    typer.Option(
        help="Processes of --ray, each with the models open. (default: one per GPU of the cluster, else per machine)"
    ),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        help="Labelled prompts to calibrate on: FILE or FORMAT:FILE; may be repeated. "
        "(default: found beside the anchors, else anchors that are kept back)"
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"vlmguard {version('vlmguard')}")
        raise typer.Exit


@app.callback()
def budgeted(
    context: typer.Context,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            envvar=MOST_SECONDS,
            min=0,
            help="Time limit in seconds, 0 for none. (default: inspect 600, verify 14400, export 86400, others none)",
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            envvar=MOST_MEMORY,
            help="Memory limit, e.g. 4G, 0 for none. (default: for inspect, verify and export the free memory)",
            metavar="SIZE",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    arguments = context.obj
    if inside() or arguments is None or {"-h", "--help"} & {*arguments}:
        return
    seconds, memory = _budget(context.invoked_subcommand or "", max_seconds, max_memory)
    if seconds is not None or memory is not None:
        raise typer.Exit(run_within(arguments, seconds, memory))


def _budget(command: str, max_seconds: float | None, max_memory: str | None) -> tuple[float | None, int | None]:
    """Seconds and bytes that a command may take; `None` for no limit."""
    if max_seconds is not None and not max_seconds < 1e9:  # NaN too
        raise typer.BadParameter(f"--max-seconds {max_seconds}: is no time; write 600, or 0 for no limit")
    try:
        memory = None if max_memory is None else memory_of(max_memory)
    except GuardError as error:
        raise typer.BadParameter(str(error)) from None
    if command in DEFAULT_SECONDS and os.name == "posix":
        max_seconds = DEFAULT_SECONDS[command] if max_seconds is None else max_seconds
        memory = free_memory() if memory is None else memory
    return max_seconds or None, memory or None


@app.command("export")
def export_command(
    context: typer.Context,
    model: Model,
    out_folder: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="folder to write (default: NAME-guarded beside the model)")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A guard.toml, as a calibration writes it: the guard with its numbers, read and edited by you."
        ),
    ] = None,
    directions: Annotated[
        Path | None, typer.Option(help="Directions file. (default: found beside the model, else extracted)")
    ] = None,
    anchors: Anchors = None,
    calibration: Calibration = None,
    calibration_image: Annotated[
        list[Path] | None,
        typer.Option(
            help="Picture to calibrate with, besides a blank one and noise; may be repeated. (default: those of the prompts)"
        ),
    ] = None,
    calibration_seconds: Annotated[
        float | None,
        typer.Option(
            min=0, help="How long to try candidates, if one was found by then. (default: until all are tried)"
        ),
    ] = None,
    mode: Annotated[
        WantedMode,
        typer.Option(
            help="Intervention. auto: that of the directions, where some are given or found; else the first of align, "
            "supervise, restore and combined that brings refusals back."
        ),
    ] = WantedMode.auto,
    layers: Annotated[str, typer.Option(help="Decoder layers, from 0: 3,4 or 2-4 or auto.")] = "auto",
    rank: Annotated[int | None, typer.Option(help="Rows of the direction, 1 to 64. (default: calibrated)")] = None,
    alpha: Annotated[float | None, typer.Option(help="Strength of steer and supervise. (default: 1)")] = None,
    tau: Annotated[float | None, typer.Option(help="Gate threshold. (default: calibrated)")] = None,
    positions: Annotated[
        PositionsChoice,
        typer.Option(
            help="last: the last token of each call; all: every token; prompt: the end of the prompt, and no token of the "
            "answer (supervise; always so in align)."
        ),
    ] = PositionsChoice.last,
    lowering: Annotated[
        str,
        typer.Option(help="How the guard is written: auto, lowrank, rank1 (for TensorRT), dense, fold (into weights)."),
    ] = "auto",
    gate: Annotated[
        GateChoice,
        typer.Option(
            help="token: decided at every token; prompt: at the prompt's end, then held for the whole answer."
        ),
    ] = GateChoice.token,
    supervisor: Annotated[
        SupervisorChoice,
        typer.Option(
            help="Where align reads the text-only coordinates: input (a graph input, fed at the prompt's call) or rows "
            "(row 2i of a batch is the text-only prompt, row 2i + 1 the prompt with its image; no extra inputs)."
        ),
    ] = SupervisorChoice.input,
    knobs: Annotated[
        bool,
        typer.Option(
            "--knobs", help="Strength and threshold offset become inputs with defaults, to be set per request."
        ),
    ] = False,
    telemetry: Annotated[
        bool, typer.Option("--telemetry", help="One output more: what each guarded layer's gate compares.")
    ] = False,
    direction_of: Annotated[
        int | None,
        typer.Option(
            "--direction-of", help="Use this layer's direction in every guarded layer (project; fold needs it)."
        ),
    ] = None,
    budget: Annotated[
        float, typer.Option(help="Calibration: highest share of harmless prompts refused, in any setting.")
    ] = 0.01,
    estimator: Estimator = EstimatorChoice.svd,
    readout: Readout = None,
    variant: Variant = None,
    dtype: Annotated[
        PrecisionChoice | None,
        typer.Option(
            help="From a checkpoint: precision of the graphs; w16a32 has weights in float16 and computes in float32, int4 "
            "needs --exporter genai. (default: fp32)"
        ),
    ] = None,
    opset: Annotated[
        int | None, typer.Option(help="From a checkpoint: ONNX opset of the graphs. (default: 18)")
    ] = None,
    exporter: Annotated[
        ExporterChoice | None,
        typer.Option(
            help="From a checkpoint: who exports it. genai and optimum write the text decoder only. "
            "(default: transformers)"
        ),
    ] = None,
    target: Annotated[
        TargetChoice | None,
        typer.Option(help="Who will run it: auto takes the lowering that is cheapest there. (default: onnxruntime)"),
    ] = None,
    engine: Annotated[
        bool,
        typer.Option(
            "--engine", help="Also build TensorRT engines, into OUT-engine; `vlmguard engine OUT` has the settings."
        ),
    ] = False,
    data: Annotated[
        DataChoice,
        typer.Option(help="Big weights: link (reflink or hard link, else a copy), copy, or reference (symbolic link)."),
    ] = DataChoice.link,
    no_digest: Annotated[
        bool, typer.Option("--no-digest", help="Do not hash big weights; the manifest says that they were not.")
    ] = False,
    proof: Annotated[
        ProofChoice,
        typer.Option(
            help="full: run the model. local: run each guard by itself, at any size of the model. structure: run nothing; "
            "complete it with `vlmguard verify --run`. auto: full if the model fits into the free memory, else local."
        ),
    ] = ProofChoice.auto,
    proof_inputs: ProofInputs = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")] = False,
    force: Force = False,
    allow_no_effect: Annotated[
        bool,
        typer.Option(
            "--allow-no-effect", help="Export a guard that changes nothing on any harmful prompt it is tried on."
        ),
    ] = False,
    sign: SigningKey = None,
    sbom: Annotated[
        bool, typer.Option("--sbom", help="Write a CycloneDX bill of materials too, sbom.cdx.json. (extra: sbom)")
    ] = False,
    reproducible: Annotated[
        bool,
        typer.Option("--reproducible", help="The same input gives the same bytes: time of SOURCE_DATE_EPOCH, or 1970."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Guard a model: plan, rewrite, prove, write a folder with the same layout.

    Without directions they are extracted from anchor pairs (your own, or the built-in English ones), and the mode is chosen by
    the answers that the model gives with it. Nothing is written unless every check of the proof holds.
    """
    if proof is ProofChoice.structure:
        require_effect(context, ("proof_inputs",), "with --proof structure, which runs nothing")
    if engine and (dry_run or proof is ProofChoice.structure or target is TargetChoice.onnxruntime):
        raise typer.BadParameter("--engine needs a proved guard for TensorRT: no --dry-run, --proof or other --target")
    if config is not None:
        _require_alone(context)
    require_model(model)
    for path, missing in ((config, CONFIG), (directions, DIRECTIONS), (sign, KEY)):
        if path is not None:
            require_file(path, missing)
    for path in proof_inputs or ():
        require_file(path, PROOF_INPUTS)
    from .exporter import render
    from .exporter.pipeline import export

    if engine:
        from .runtime.tensorrt.backend import find_backend

        find_backend()  # before minutes of work
    spec = GuardSpec(
        mode=mode.value if mode is not WantedMode.auto else None,
        layers=parse_layers(layers),
        rank=rank,
        alpha=alpha,
        tau=tau,
        positions=positions.value,
        lowering=lowering,
        direction_of=direction_of,
        target="tensorrt" if engine or target is TargetChoice.tensorrt else "onnxruntime",
        knobs=knobs,
        telemetry=telemetry,
        gate=gate.value,
        supervisor=supervisor.value,
    )
    with render.bars(err) as watch:
        result = export(
            model,
            out_folder,
            spec=spec if config is None else None,
            config=config,
            directions=directions,
            anchors=anchors or None,
            calibration=calibration or None,
            estimator=estimator.value,
            readout=readout.value if readout is not None else None,
            budget=budget,
            variant=variant,
            dtype=dtype.value if dtype is not None else None,
            opset=opset,
            exporter=exporter.value if exporter is not None else None,
            data=data.value,
            digests=not no_digest,
            proof=proof.value,
            proof_inputs=proof_inputs or (),
            dry_run=dry_run,
            force=force,
            allow_no_effect=allow_no_effect,
            sign=sign,
            sbom=sbom,
            reproducible=reproducible,
            calibration_images=calibration_image or (),
            calibration_seconds=calibration_seconds,
            watch=watch,
        )
    try:
        built = _engines(result.out, force) if engine else None
    except KeyboardInterrupt as stop:
        stop.add_note(f"{result.out} is complete; `vlmguard engine {result.out}` builds its engines")
        raise
    if as_json:
        print_json(result.to_json() | ({"engine": built.to_json()} if built is not None else {}))
        return
    render.show_export(out, result)
    if built is not None:
        render.show_engines(out, built)


# What a config does not say: which model, where to, and how it is checked. Any other option beside it is refused.
_BESIDE_CONFIG = frozenset(
    [
        "model",
        "out_folder",
        "config",
        "variant",
        "dtype",
        "opset",
        "exporter",
        "data",
        "no_digest",
        "proof",
        "proof_inputs",
        "dry_run",
        "force",
        "allow_no_effect",
        "sign",
        "sbom",
        "reproducible",
        "as_json",
    ]
)


def _require_alone(context: typer.Context) -> None:
    """Nothing that a config decides was given besides it."""
    for name in context.params.keys() - _BESIDE_CONFIG:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise typer.BadParameter(f"--config says what is wanted; edit it, or leave --{name.replace('_', '-')} out")


def _engines(guarded: Path, force: bool) -> EngineResult:
    from .exporter import render
    from .exporter.engines.engine_folder import build_engines

    with render.bars(err) as watch:
        return build_engines(guarded, force=force, watch=watch)


@app.command("engine")
def engine_command(
    context: typer.Context,
    guarded: Guarded,
    out_folder: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="folder to write (default: GUARDED-engine)")
    ] = None,
    backend: Annotated[
        BackendChoice | None, typer.Option(help="Who builds. (default: tensorrt if installed, else tensorrt_rtx)")
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="How the decoder is called, as prefill:batch=1:4,sequence=1:256:2048 or "
            "decode:batch=1:4,sequence=1,past=1:512:4096 (smallest:typical:largest); may be repeated. "
            "(default: these two, as far as the model goes)"
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Shapes of an input that no profile tells: pixel_values=1x3x224x224; may be repeated."),
    ] = None,
    target_capability: Annotated[
        list[str] | None,
        typer.Option(
            "--target-capability",
            help="Compute capability to build for, such as 8.9; may be repeated (tensorrt_rtx). (default: its own choice)",
        ),
    ] = None,
    workspace: Annotated[int | None, typer.Option(min=1, help="Most scratch memory of a layer, MiB.")] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of measured tactics: read if there, then updated (tensorrt).")
    ] = None,
    print_command: Annotated[
        bool,
        typer.Option("--print-command", help="Print the trtexec or tensorrt_rtx command lines instead; build nothing."),
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Build TensorRT engines of a guarded folder, and show that the guard is in them."""
    if print_command:
        require_effect(context, ("out_folder", "force"), "with --print-command, which writes nothing")
    if backend is BackendChoice.tensorrt_rtx:
        require_effect(context, ("timing_cache",), "with --backend tensorrt_rtx, which keeps none")
    if backend is BackendChoice.tensorrt:
        require_effect(context, ("target_capability",), "with --backend tensorrt, which builds for this machine's GPU")
    require_guarded_folder(guarded.absolute())
    from .exporter import render
    from .exporter.engines.build_engine import BuildOptions
    from .exporter.engines.commands import commands_for
    from .exporter.engines.engine_folder import build_engines
    from .exporter.engines.profile import EngineProfile

    profiles = [EngineProfile.parse(text) for text in profile or ()]
    options = BuildOptions(tuple(target_capability or ()), workspace, timing_cache)
    name = backend.value if backend is not None else None
    if print_command:
        commands = commands_for(guarded, name, profiles, shape or (), options)
        if as_json:
            print_json({"commands": commands})
        else:
            for command in commands:
                out.print(command, markup=False, highlight=False, soft_wrap=True)
        return
    with render.bars(err) as watch:
        result = build_engines(
            guarded,
            out_folder,
            backend=name,
            profiles=profiles,
            shapes=shape or (),
            options=options,
            force=force,
            watch=watch,
        )
    if as_json:
        print_json(result.to_json())
    else:
        render.show_engines(out, result)


@app.command("package")
def package_command(
    context: typer.Context,
    guarded: Guarded,
    triton: Annotated[
        Path | None, typer.Option("--triton", metavar="DIR", help="Write a Triton Inference Server model repository.")
    ] = None,
    genai: Annotated[
        Path | None,
        typer.Option("--genai", metavar="DIR", help="Write a folder for onnxruntime-genai (text decoders)."),
    ] = None,
    onnx_community: Annotated[
        Path | None,
        typer.Option(
            "--onnx-community", metavar="DIR", help="Write the names and configs that transformers.js looks for."
        ),
    ] = None,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Triton: run the graphs on every GPU it sees. (default: CPU)")
    ] = False,
    instances: Annotated[int, typer.Option(help="Triton: copies of each graph, per GPU or on the CPU.")] = 1,
    requests: Annotated[int, typer.Option(help="Triton: answers that are made at the same time.")] = 4,
    max_batch: Annotated[
        int, typer.Option(help="Triton: most requests put together for the vision encoder and the embeddings; 0: none.")
    ] = 8,
    data: Annotated[
        DataChoice,
        typer.Option(help="Big weights: link (reflink or hard link, else a copy), copy, or reference (symbolic link)."),
    ] = DataChoice.link,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR.")] = False,
    as_json: AsJson = False,
) -> None:
    """Lay a guarded folder out for another runtime: proved before and after, graphs unchanged, `verify` works on the result."""
    if sum(target is not None for target in (triton, genai, onnx_community)) != 1:
        raise typer.BadParameter("name one of --triton DIR, --genai DIR and --onnx-community DIR")
    if triton is None:
        require_effect(context, ("gpu", "instances", "requests", "max_batch"), "without --triton")
    require_guarded_folder(guarded.absolute())
    from .exporter import render
    from .exporter.packaging.genai import package_genai
    from .exporter.packaging.onnx_community import package_onnx_community
    from .exporter.packaging.triton_config import TritonOptions
    from .exporter.packaging.triton_repository import package_triton

    with render.bars(err) as watch:
        if triton is not None:
            options = TritonOptions("gpu" if gpu else "cpu", instances, requests, max_batch)
            result = package_triton(guarded, triton, options, data=data.value, force=force, watch=watch)
        elif genai is not None:
            result = package_genai(guarded, genai, data=data.value, force=force, watch=watch)
        else:
            assert onnx_community is not None
            result = package_onnx_community(guarded, onnx_community, data=data.value, force=force, watch=watch)
    for note in result.notes:
        err.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
    if as_json:
        print_json(result.to_json())
    else:
        render.show_packaged(out, result)


@app.command("convert")
def convert_command(
    checkpoint: Annotated[str, typer.Argument(help="Hugging Face checkpoint folder or hub id", metavar="CHECKPOINT")],
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write")],
    dtype: Annotated[
        PrecisionChoice | None,
        typer.Option(
            help="Precision of the graphs; w16a32 has weights in float16 and computes in float32, int4 needs --exporter genai. "
            "(default: fp32)"
        ),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset of the graphs.")] = None,
    exporter: Annotated[
        ExporterChoice, typer.Option(help="Who exports; transformers alone is compared with torch here.")
    ] = ExporterChoice.transformers,
    force: Force = False,
) -> None:
    """Export a checkpoint WITHOUT a guard, the base to compare with: the onnx-community layout, or that of --exporter."""
    from .exporter import render
    from .exporter.checkpoints.exporters import export_checkpoint
    from .graphs.new_files import create_file
    from .graphs.replaceable import WRITTEN_NAME, foreign_file, written_record
    from .graphs.staging import staged

    with render.bars(err) as watch, staged(out_folder, force) as stage:
        parity = export_checkpoint(
            checkpoint,
            stage,
            exporter.value,
            dtype.value if dtype is not None else None,
            opset,
            say=lambda stage_name: watch(stage_name, 0, 1),
        )
        graphs = len(list(stage.rglob("*.onnx")))
        if (
            foreign_file(stage) is not None
        ):  # files that no layout has: recorded, or --force would not replace the folder
            create_file(stage / WRITTEN_NAME, written_record(stage))
    out.print(f"{escape(str(out_folder))}: {graphs} graphs, [bold]unguarded[/bold]")
    if parity:
        render.show_checks(out, parity, "parity with torch")


@app.command("inspect")
def inspect_command(
    model: Model,
    variant: Variant = None,
    full: Annotated[
        bool, typer.Option("--full", help="A row for every layer; long runs that are alike are folded.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the decoder's residual stream: layers, width, dtype, and which value carries each layer's output."""
    require_model(model)
    from .exporter import render
    from .exporter.pipeline import inspect

    with render.bars(err) as watch:
        anatomy = inspect(model, variant, watch)
    if as_json:
        print_json({"model": model, **anatomy.to_json()})
    else:
        render.show_anatomy(out, anatomy, model, full)


@app.command("directions")
def directions_command(
    context: typer.Context,
    model: Model,
    anchors: Anchors = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("directions.safetensors"),
    rank: Annotated[int, typer.Option(help="Rows to keep per layer, 1 to 64.")] = 4,
    calibrated_for: Annotated[
        ModeChoice | None, typer.Option("--calibrate", help="Also choose layers, thresholds and targets for this mode.")
    ] = None,
    calibration: Calibration = None,
    estimator: Estimator = EstimatorChoice.svd,
    readout: Readout = None,
    variant: Variant = None,
    ray: Ray = None,
    ray_workers: RayWorkers = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Extract safety steering directions from the model itself: one pass over the anchors, an estimate per layer.

    An ONNX model is read as it is, int4 too; a checkpoint in torch. With --calibrate the guard is also written as a
    guard.toml beside the directions, to be read and edited. A killed extraction goes on where it was.
    """
    if calibrated_for is None:
        require_effect(context, ("calibration", "readout"), "without --calibrate")
        if is_checkpoint(model):
            require_effect(context, ("variant",), "on a checkpoint, which is read in torch")
    require_model(model)
    from .exporter import render
    from .exporter.pipeline import extract_directions

    beside: dict[str, Path] = {}
    with render.bars(err) as watch:
        found = extract_directions(
            model,
            output,
            anchors=anchors or None,
            rank=rank,
            calibrate_for=calibrated_for.value if calibrated_for is not None else None,
            calibration=calibration or None,
            estimator=estimator.value,
            readout=readout.value if readout is not None else None,
            variant=variant,
            ray=ray,
            ray_workers=ray_workers,
            force=force,
            watch=watch,
            report_found=beside.update,
        )
    if as_json:
        shown = {"output": str(output), "layers": list(found.layers), "pairs": found.pairs}
        shown["found"] = {what: str(path) for what, path in beside.items()}
        print_json(shown | {"estimator": found.estimator, "evidence": found.evidence})
        return
    show_found(out, beside)
    render.show_directions(out, found, str(output))


@app.command("verify")
def verify_command(
    context: typer.Context,
    guarded: Guarded,
    source: Annotated[Path | None, typer.Option(help="The unguarded model, to compare with.")] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Run both models too: the numerical proof. Needs --source.")
    ] = False,
    proof_inputs: ProofInputs = None,
    verify_signature: Annotated[
        Path | None,
        typer.Option("--verify-signature", metavar="PUBLIC_KEY", help="Check who signed it too: PEM. (extra: sign)"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Redo the structural proof of a guarded folder from its files alone; with --source against the unguarded model too."""
    if not run:
        require_effect(context, ("proof_inputs",), "without --run, which runs the models on them")
    require_guarded_folder(guarded.absolute())
    if source is not None:
        require_model(source)
    for path in proof_inputs or ():
        require_file(path, PROOF_INPUTS)
    if verify_signature is not None:
        require_file(verify_signature, KEY)
    from .exporter import render
    from .exporter.proof.verify import verify

    with render.bars(err) as watch:
        result = verify(guarded, source, run, proof_inputs or (), watch, public_key=verify_signature)
    if as_json:
        print_json(result.to_json())
    else:
        render.show_checks(
            out, result.checks, f"{guarded}: {result.manifest.plan['mode']} on layers {result.manifest.plan['layers']}"
        )
    if not result.ok:
        failed = next((check for check in result.checks if not check.ok), None)
        if result.state == "not verified":
            raise GuardError(f"{guarded}: not verified: {result.missing}")
        raise GuardError(f"{guarded}: {failed.name if failed else 'nothing was checked'} does not hold; export again")


@app.command("sign")
def sign_command(
    guarded: Guarded,
    key: Annotated[
        Path, typer.Option("--key", metavar="KEY", help="Elliptic-curve private key, PEM, without a password.")
    ],
) -> None:
    """Sign a guarded folder: model.sig, which `vlmguard verify --verify-signature` checks. Offline. (extra: sign)

    A proof says what a folder is, a signature whose it is. Whoever holds the files can take the guard out, and make all
    digests fit; without the private key nobody can sign the result.
    """
    require_guarded_folder(guarded.absolute())
    require_file(key, KEY)
    from .exporter.artifact.signing import sign

    path = sign(guarded, key)
    out.print(f"[bold]signed[/bold]: {escape(str(path))}", highlight=False, soft_wrap=True)


@app.command("generate")
def generate_command(
    model: Annotated[
        Path, typer.Argument(help="a guarded folder; --unguarded opens any model folder", metavar="GUARDED")
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to ask.")],
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Picture to show. (default: none)")] = None,
    blank: Annotated[bool, typer.Option("--blank", help="Show a blank white picture.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    strength: Annotated[
        float | None,
        typer.Option(help="Of the guard, where it has knobs: 0 only watches, 1 is as calibrated, at most 2."),
    ] = None,
    threshold_offset: Annotated[
        float | None,
        typer.Option(help="Added to the gates' thresholds, where the guard has knobs: above 0 they open more rarely."),
    ] = None,
    scores: Annotated[
        bool, typer.Option("--scores", help="Then show what the gates compared (exported with --telemetry).")
    ] = False,
    unguarded: Annotated[bool, typer.Option("--unguarded", help="Run a model that has no guard.")] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the answer as JSON, and what the gates compared if the model tells."),
    ] = False,
) -> None:
    """Ask a guarded model; the answer streams to stdout."""
    if blank and image is not None:
        raise typer.BadParameter("--blank and --image exclude each other")
    if unguarded and scores:
        raise typer.BadParameter("--unguarded has no gates: leave --scores out")
    if unguarded:
        require_model(model)
    else:
        require_guarded_folder(model.absolute())
    from .exporter.sources import open_model, require_unmarked
    from .runtime.generation import Request, Sampling
    from .runtime.guarded import GuardedVLM
    from .runtime.knobs import Knobs

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    if unguarded:
        require_unmarked(model)
    vlm = open_model(model) if unguarded else GuardedVLM.open(model)
    shown = vlm.blank_image() if blank else image
    knobs = Knobs(strength, threshold_offset)
    if as_json and not (scores or vlm.decoder.tells_scores):
        print_json({"answer": vlm.answer([Request(prompt, shown)], sampling, knobs=knobs)[0], "scores": None})
        return
    if isinstance(vlm, GuardedVLM) and (scores or as_json):
        answer = vlm.generate_scored(
            prompt, shown, max_new_tokens, temperature, top_p, seed, strength, threshold_offset
        )
        _show_scored(answer, as_json)
        return
    for piece in vlm.stream(Request(prompt, shown), sampling, knobs):
        out.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    out.print()


def _show_scored(answer: ScoredAnswer, as_json: bool) -> None:
    from .exporter import render

    if as_json:
        print_json(answer.to_json())
        return
    out.print(answer.text, markup=False, highlight=False, soft_wrap=True)
    render.show_scores(out, answer)


@app.command("serve")
def serve_command(
    guarded: Guarded,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the key that requests must bear. (default: the variable VLMGUARD_API_KEY, else none)"
        ),
    ] = None,
    without_key: Annotated[
        bool, typer.Option("--without-key", help="Let anybody ask who can reach a --host of other machines.")
    ] = False,
    model_name: Annotated[
        str | None, typer.Option(help="What requests call the model. (default: the folder's name)")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Answers made at the same time. (default: 4; 1 for engines)")
    ] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait; one more gets 429 and Retry-After.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="Longest answer that a request may ask for.")] = 512,
    max_prompt_tokens: Annotated[int, typer.Option(help="Longest conversation, its image included.")] = 4096,
    max_context: Annotated[
        int | None,
        typer.Option(help="Longest conversation and answer together, tokens. (default: as the model's configs say)"),
    ] = None,
    max_image_mib: Annotated[int, typer.Option(help="Largest image file, MiB.")] = 10,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take, waiting included.")] = 120.0,
    grace: Annotated[float, typer.Option(help="Seconds that running answers get after SIGTERM.")] = 30.0,
) -> None:
    """Serve a guarded folder over an OpenAI-compatible HTTP API, until SIGTERM or Ctrl-C. (extra: serve)

    /v1/chat/completions (images as data: URLs, streaming), /v1/models, /healthz, /metrics for Prometheus. A folder that is
    not what was proved is not served, and nothing in a request changes the guard. See docs/serving.md.
    """
    if without_key and api_key_file is not None:
        raise typer.BadParameter("--without-key and --api-key-file exclude each other")
    require_guarded_folder(guarded.absolute())
    from .apps.serving.server import log_to_stderr, require_extra, serve
    from .apps.serving.settings import MIB, ServeSettings, read_api_key, require_key_or_loopback

    require_extra()
    api_key = read_api_key(api_key_file, os.environ)
    require_key_or_loopback(host, api_key, without_key)
    settings = ServeSettings(
        name=model_name or guarded.absolute().name,
        host=host,
        port=port,
        api_key=api_key,
        concurrency=concurrency,
        queue=queue,
        max_tokens=max_tokens,
        max_prompt_tokens=max_prompt_tokens,
        max_context=max_context,
        max_image=max_image_mib * MIB,
        timeout=timeout,
        grace=grace,
    )

    def listening(plan: dict[str, Any], address: str) -> None:
        guard = f"{plan['mode']} on layers {', '.join(map(str, plan['layers']))}"
        asked = "with an API key" if api_key is not None else "without an API key"
        err.print(f"serving {escape(settings.name)} ({guard}), {asked}; Ctrl-C stops", highlight=False, soft_wrap=True)
        out.print(address, markup=False, highlight=False, soft_wrap=True)
        out.file.flush()

    log_to_stderr()
    serve(guarded, settings, listening)


@app.command("evaluate")
def evaluate_command(
    base: Annotated[Path, typer.Argument(help="the unguarded model", metavar="BASE")],
    guarded: Guarded,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="Labelled prompts: FILE, FORMAT:FILE (see `vlmguard prompts`) or builtin; may be repeated. "
            "(default: evaluation.jsonl found beside BASE, else builtin)"
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image", "-i", help="Picture, or folder of them, for prompts whose file names none; may be repeated."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer; refusals can come late.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Prompts that run together.")] = 32,
    judge_model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint folder of a LlamaGuard-style model, as a second judge. (needs torch)"),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File of JSON lines, one per prompt; a killed run goes on with it."),
    ] = None,
    answers: Annotated[
        bool,
        typer.Option("--answers", help="Keep the answers in --out too; those to harmful prompts can be harmful."),
    ] = False,
    no_gates: Annotated[
        bool, typer.Option("--no-gates", help="Do not read the gates, which opens the decoder once more.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the bootstrap intervals.")] = 0,
    ray: Ray = None,
    ray_workers: RayWorkers = None,
    as_json: AsJson = False,
) -> None:
    """Measure the safety gap closed: refusals of both models against the text-only model, attacks, open gates, drift."""
    if answers and record is None:
        raise typer.BadParameter("--answers keeps them in the file of --out; name one")
    require_model(base)
    require_guarded_folder(guarded.absolute())
    from .exporter import render
    from .exporter.evaluation.evaluate import compare
    from .exporter.evaluation.tables import show_evaluation

    with render.bars(err) as watch:
        result = compare(
            base,
            guarded,
            prompts or None,
            max_new_tokens,
            batch_size,
            watch,
            images=image or (),
            judge_model=judge_model,
            out=record,
            keep_answers=answers,
            read_gates=not no_gates,
            seed=seed,
            ray=ray,
            ray_workers=ray_workers,
        )
    if as_json:
        print_json(result.to_json())
    else:
        show_evaluation(out, result)


@app.command("prompts")
def prompts_command(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE]...", help="FILE, FORMAT:FILE or builtin:PART (default: the built-in prompts)"),
    ] = None,
    disjoint: Annotated[bool, typer.Option("--disjoint", help="Refuse sets that share a prompt.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what prompt files hold, and which prompts they share. Without FILE: the known formats, the built-in prompts."""
    from .exporter.prompts.holdings import look_at, require_disjoint, show_formats, show_prompts

    report = look_at(sources or ())
    if as_json:
        print_json(report.to_json())
    else:
        if not sources:
            show_formats(out)
        show_prompts(out, report)
    if disjoint:
        require_disjoint(report)


@app.command("report")
def report_command(
    guarded: Guarded,
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write.")] = Path("report.html"),
    prompts: Annotated[
        Path | None, typer.Option(help="Labelled prompts. (default: evaluation.jsonl found beside SOURCE or GUARDED)")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(help="The unguarded model. (default: the guard is taken out of GUARDED's graph, in memory)"),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Picture to show with every text prompt. (default: those the prompts name)")
    ] = None,
    max_prompts: Annotated[int, typer.Option(help="Prompts of each setting and label.")] = 40,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer; refusals can come late.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Prompts that run together.")] = 16,
    engine: Annotated[
        Path | None, typer.Option(help="Folder of TensorRT engines built from GUARDED, for the cost table.")
    ] = None,
    benchmark: Annotated[
        Path | None, typer.Option(help="Result of benchmarks/inference.py, for the cost table.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the page.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the data behind the figures as JSON on stdout.")
    ] = False,
) -> None:
    """Write one page about a guarded folder: states, separation, gates, refusals, strength, cost, proof. Works offline."""
    require_guarded_folder(guarded.absolute())
    if source is not None:
        require_model(source)
    from .apps.report.build_report import report
    from .apps.report.report_summary import show_report
    from .exporter import render

    with render.bars(err) as watch:
        data = report(
            guarded,
            output,
            prompts=prompts,
            source=source,
            image=image,
            max_prompts=max_prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            engine=engine,
            benchmark=benchmark,
            force=force,
            watch=watch,
        )
    if as_json:
        found = {what: str(path) for what, path in data.found.items()}
        print_json({"output": str(output), **data.to_json(), **({"found": found} if found else {})})
    else:
        show_report(out, data, str(output))


@app.command("playground")
def playground_command(
    guarded: Guarded,
    base: Annotated[
        Path | None,
        typer.Option(help="The unguarded model. (default: the guard is taken out of GUARDED's graph, in memory)"),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Precision variant of the decoder: fp16, q4, ... (default: the one that runs)")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Labelled prompts to pick from: FILE or FORMAT:FILE. (default: found beside the model, else builtin)"
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes any that is free.")] = 8365,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in your browser.")] = True,
    assets: Annotated[
        Path | None,
        typer.Option(
            help="A node_modules folder with the page's libraries. (default: fetched once from the npm registry)"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the address as JSON on stdout.")] = False,
) -> None:
    """Serve a page that asks the model in your browser, without and with its guard, and shows its gates live.

    Both run in the browser (onnxruntime-web); nothing leaves this machine. Ctrl+C ends it. For a browser elsewhere forward the
    port: ssh -L 8365:127.0.0.1:8365 HOST.
    """
    require_guarded_folder(guarded.absolute())
    if base is not None:
        require_model(base)
    from .apps.playground.open import playground
    from .exporter import render

    with render.bars(err) as watch:
        server = playground(guarded, base=base, variant=variant, prompts=prompts, assets=assets, port=port, watch=watch)
    if as_json:
        print_json({"url": server.url})
    else:
        out.print(
            f"{escape(str(guarded))}: [bold]{server.url}[/bold] (Ctrl+C ends it)", highlight=False, soft_wrap=True
        )
    sys.stdout.flush()
    server.run(open_page)


def print_json(content: dict[str, Any]) -> None:
    sys.stdout.write(to_json(content) + "\n")


# Entry points

# What a full disk or a reader who left says, where stdout is a file or a pipe.
_NOWHERE_TO_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)


# Reasons for which the system refuses a path; wherever they happen, they are no bug of ours.
_OUT_OF_REACH = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS)


def main() -> NoReturn:
    """`vlmguard ...`"""
    _run(sys.argv[1:])


def main_export() -> NoReturn:
    """`vlmguard-export ...`, which is `vlmguard export ...`."""
    _run(["export", *sys.argv[1:]])


def _run(arguments: list[str]) -> NoReturn:
    # What libraries say about odd files and odd numbers: our own checks find it, and tell it in one line.
    logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    try:
        with kept():
            app(arguments, prog_name="vlmguard", obj=arguments)
    except GuardError as error:
        line = " ".join(str(error).split())
        err.print(f"[red]error:[/red] {escape(line)}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except (Interrupted, KeyboardInterrupt) as stop:
        kept_so_far = str(stop) or "nothing was kept; run the same command again"
        err.print(f"interrupted: {escape(kept_so_far)}", highlight=False, soft_wrap=True)
        sys.exit(130)
    except OSError as error:
        if error.filename is not None and error.errno in _OUT_OF_REACH:
            line = f"{error.filename}: cannot be used ({error.strerror}); check the path and its permissions"
            err.print(f"[red]error:[/red] {escape(line)}", highlight=False, soft_wrap=True)
            sys.exit(1)
        if error.filename is not None or error.errno not in _NOWHERE_TO_WRITE:
            raise
        line = f"the result cannot be written ({error.strerror}); choose another place for it"
        err.print(f"[red]error:[/red] {line}", highlight=False, soft_wrap=True)
        with contextlib.suppress(OSError, ValueError):  # what waits there is not tried again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)
