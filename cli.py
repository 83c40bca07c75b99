"""The command line: parse, call one function, print, return a code. Results go to stdout, progress and notes to stderr.

Exit codes: 0 done, 1 refused (one line with the reason and what to do next), 2 wrong usage, 130 interrupted, 141 the reader of
a pipe has gone. An error of vlmguard itself keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, NoReturn

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
from .exporter.choices import (
    EstimatorName,
    ExporterName,
    Precision,
    ReadoutName,
    WantedMode,
    WantedProof,
    one_of,
)
from .exporter.terminal import SafeConsole, show_found, to_json
from .exporter.usage import App, Group, Interrupted, end_quietly, require_effect
from .graphs.errors import GuardError
from .graphs.modes import Mode, Positions
from .graphs.new_files import Data
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
from .graphs.spec import Decided, GuardSpec, Supervisor, Target, parse_layers
from .runtime.defaults import MAX_NEW_TOKENS
from .runtime.tensorrt.backend import BackendName

if TYPE_CHECKING:
    from .exporter.engines.engine_folder import EngineResult
    from .runtime.telemetry import ScoredAnswer

# No emoji: ":cat:" in a path is not a cat.
out, err = SafeConsole(emoji=False), SafeConsole(stderr=True, emoji=False)

# Headings of `vlmguard --help`.
GUARD, CHECK, RUN, SHIP = "Guard a model", "Check a guarded folder", "Run a guarded folder", "Ship a guarded folder"

# A run from the model to a look at the result.
EXAMPLES = (
    "vlmguard-export model-folder",
    "vlmguard evaluate model-folder model-folder-guarded",
    "vlmguard playground model-folder-guarded",
)

app = App(
    name="vlmguard",
    cls=Group,
    help="Bake VLM-Guard's safety steering into an exported vision-language model, and prove that it is there.",
    epilog="\n".join(EXAMPLES),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Headings of a command's help: `what(...)` is an option below "What", and so on.
what = partial(typer.Option, rich_help_panel="What")
data_option = partial(typer.Option, rich_help_panel="Data")
precision = partial(typer.Option, rich_help_panel="Precision")
output_option = partial(typer.Option, rich_help_panel="Output")
proof_option = partial(typer.Option, rich_help_panel="Proof")
controls = partial(typer.Option, rich_help_panel="Runtime controls")
limits = partial(typer.Option, rich_help_panel="Limits")
engines_option = partial(typer.Option, rich_help_panel="Engines")
cluster = partial(typer.Option, rich_help_panel="Cluster")

Model = Annotated[
    str,
    typer.Argument(help="model.onnx, a model folder, a Hugging Face checkpoint folder or a hub id.", metavar="MODEL"),
]
Guarded = Annotated[Path, typer.Argument(help="Folder that `vlmguard-export` wrote.", metavar="GUARDED")]
AsJson = Annotated[bool, output_option("--json", help="Print the result as JSON on stdout.")]
Force = Annotated[bool, output_option("--force", help="Replace OUT; accept directions made from another decoder file.")]
Variant = Annotated[
    str | None,
    precision(
        "--variant",
        help="Precision variant of an onnx-community folder: fp16, q4, ... (default: all; the plain one runs)",
        metavar="NAME",
    ),
]
Estimator = Annotated[
    EstimatorName,
    data_option(
        "--estimator",
        help="Estimator of the directions: svd (the paper's), mean (difference of means), lda or logistic.",
        metavar=one_of(EstimatorName),
    ),
]
Readout = Annotated[
    ReadoutName | None,
    data_option(
        "--readout", help="Readout of the gate of mode restore. (default: calibrated)", metavar=one_of(ReadoutName)
    ),
]
ProofInputs = Annotated[
    list[Path] | None,
    proof_option(
        "--proof-inputs",
        help="Decoder inputs by name, an .npz file, to prove the guard on; may be repeated. (default: made from prompts)",
        metavar="FILE",
    ),
]
SigningKey = Annotated[
    Path | None,
    output_option(
        "--sign", metavar="KEY", help="Sign the folder with this elliptic-curve private key, PEM. (extra: sign)"
    ),
]
Anchors = Annotated[
    list[str] | None,
    data_option(
        "--anchors",
        help="Anchor pairs to extract from: FILE, FORMAT:FILE (see `vlmguard prompts`) or builtin; may be repeated. "
        "(default: found beside the model, else builtin)",
        metavar="FILE",
    ),
]
Calibration = Annotated[
    list[str] | None,
    data_option(
        "--calibration",
        help="Labelled prompts to calibrate on: FILE or FORMAT:FILE; may be repeated. "
        "(default: found beside the anchors, else anchors that are kept back)",
        metavar="FILE",
    ),
]
Ray = Annotated[
    str | None,
    cluster(
        "--ray",
        help="Ray cluster that runs the batches: auto (this machine's), HOST:PORT, or local (starts one). "
        "(default: this process alone; extra: ray)",
        metavar="ADDRESS",
    ),
]
RayWorkers = Annotated[
    int | None,
    cluster(
        "--ray-workers",
        help="Number of Ray processes, each with the models open. (default: one per GPU of the cluster, else per machine)",
        metavar="N",
    ),
]
BigFiles = Annotated[
    Data,
    output_option(
        "--data",
        help="How big weights get into the folder: link (reflink or hard link, else a copy), copy, or reference "
        "(symbolic link).",
        metavar=one_of(Data),
    ),
]
Verbose = Annotated[bool, proof_option("--verbose", "-v", help="Show every check of the proof.")]
NoCache = Annotated[
    bool,
    precision("--no-cache", help="Export a checkpoint again, and do not keep the export in the cache."),
]
AnswerTokens = Annotated[
    int, limits("--max-new-tokens", help="Longest answer, in tokens; refusals can come late.", metavar="N")
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
        limits(
            "--max-seconds",
            envvar=MOST_SECONDS,
            min=0,
            help="Time limit in seconds, 0 for none. (default: inspect 600, verify 14400, export 86400, others none)",
            metavar="SECONDS",
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        limits(
            "--max-memory",
            envvar=MOST_MEMORY,
            help="Memory limit, e.g. 4G, 0 for none. (default: the free memory for inspect, verify and export, others none)",
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


@app.command(
    "export",
    panel=GUARD,
    examples=(
        "vlmguard-export model-folder",
        "vlmguard-export model-folder guarded --mode restore --anchors pairs.jsonl",
        "vlmguard-export model-folder guarded --directions directions.safetensors --layers 3-4 --dry-run",
    ),
)
def export_command(
    context: typer.Context,
    model: Model,
    out_folder: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Folder to write. (default: NAME-guarded beside the model)")
    ] = None,
    mode: Annotated[
        WantedMode,
        what(
            "--mode",
            help="Intervention. auto takes that of the directions, where some are given or found, else the first of align, "
            "supervise, restore and combined that brings refusals back.",
            metavar=one_of(WantedMode),
        ),
    ] = "auto",
    layers: Annotated[
        str, what("--layers", help="Decoder layers, from 0: 3,4 or 2-4 or auto.", metavar="LAYERS")
    ] = "auto",
    rank: Annotated[
        int | None, what("--rank", help="Rows of the direction, 1 to 64. (default: calibrated)", metavar="N")
    ] = None,
    alpha: Annotated[
        float | None, what("--alpha", help="Strength of steer and supervise. (default: 1)", metavar="X")
    ] = None,
    tau: Annotated[float | None, what("--tau", help="Gate threshold. (default: calibrated)", metavar="X")] = None,
    positions: Annotated[
        Positions,
        what(
            "--positions",
            help="Tokens to edit: last is the last token of each call; all is every token; prompt is the end of the prompt "
            "and no token of the answer (supervise; always in align).",
            metavar=one_of(Positions),
        ),
    ] = "last",
    gate: Annotated[
        Decided,
        what(
            "--gate",
            help="When the gate is decided: at every token, or at the end of the prompt and held for the whole answer.",
            metavar=one_of(Decided),
        ),
    ] = "token",
    direction_of: Annotated[
        int | None,
        what(
            "--direction-of",
            help="Use this layer's direction in every guarded layer (mode project; lowering fold needs it).",
            metavar="LAYER",
        ),
    ] = None,
    lowering: Annotated[
        str,
        what(
            "--lowering",
            help="How the guard is written into the graph: auto, lowrank, rank1 (for TensorRT), dense, or fold (into the "
            "weights).",
            metavar="NAME",
        ),
    ] = "auto",
    config: Annotated[
        Path | None,
        data_option(
            "--config",
            help="Guard settings from a guard.toml, which a calibration writes and you may edit.",
            metavar="FILE",
        ),
    ] = None,
    directions: Annotated[
        Path | None,
        data_option(
            "--directions", help="Directions file. (default: found beside the model, else extracted)", metavar="FILE"
        ),
    ] = None,
    anchors: Anchors = None,
    calibration: Calibration = None,
    calibration_image: Annotated[
        list[Path] | None,
        data_option(
            "--calibration-image",
            help="Picture to calibrate with, besides a blank one and noise; may be repeated. (default: those of the prompts)",
            metavar="FILE",
        ),
    ] = None,
    calibration_seconds: Annotated[
        float | None,
        data_option(
            "--calibration-seconds",
            min=0,
            help="Stop trying candidates after this time, once one is found. (default: try all)",
            metavar="SECONDS",
        ),
    ] = None,
    budget: Annotated[
        float,
        data_option(
            "--budget",
            help="Highest share of harmless prompts that a calibration lets the guard refuse.",
            metavar="SHARE",
        ),
    ] = 0.01,
    estimator: Estimator = "svd",
    readout: Readout = None,
    variant: Variant = None,
    dtype: Annotated[
        Precision | None,
        precision(
            "--dtype",
            help="Precision of graphs exported from a checkpoint; w16a32 has float16 weights and computes in float32, int4 "
            "needs --exporter genai. (default: fp32)",
            metavar=one_of(Precision),
        ),
    ] = None,
    opset: Annotated[
        int | None,
        precision("--opset", help="ONNX opset of graphs exported from a checkpoint. (default: 18)", metavar="N"),
    ] = None,
    exporter: Annotated[
        ExporterName | None,
        precision(
            "--exporter",
            help="Exporter of a checkpoint; genai and optimum write the text decoder only. (default: transformers)",
            metavar=one_of(ExporterName),
        ),
    ] = None,
    no_cache: NoCache = False,
    target: Annotated[
        Target | None,
        precision(
            "--target",
            help="Runtime to choose the cheapest lowering for. (default: onnxruntime)",
            metavar=one_of(Target),
        ),
    ] = None,
    knobs: Annotated[
        bool,
        controls("--knobs", help="Add inputs with defaults for strength and threshold offset, to be set per request."),
    ] = False,
    telemetry: Annotated[
        bool, controls("--telemetry", help="Add an output with the score that each guarded layer's gate compares.")
    ] = False,
    supervisor: Annotated[
        Supervisor,
        controls(
            "--supervisor",
            help="Where align reads the text-only coordinates: input (a graph input, fed at the prompt's call) or rows "
            "(row 2i of a batch is the text-only prompt, row 2i + 1 the prompt with its image; no extra inputs).",
            metavar=one_of(Supervisor),
        ),
    ] = "input",
    proof: Annotated[
        WantedProof,
        proof_option(
            "--proof",
            help="full runs the model. local runs each guard by itself, at any size of the model. structure runs nothing; "
            "complete it with `vlmguard verify --run`. auto is full if the model fits into the free memory, else local.",
            metavar=one_of(WantedProof),
        ),
    ] = "auto",
    proof_inputs: ProofInputs = None,
    allow_no_effect: Annotated[
        bool,
        proof_option(
            "--allow-no-effect", help="Export a guard that changes nothing on any harmful prompt it is tried on."
        ),
    ] = False,
    no_digest: Annotated[
        bool, proof_option("--no-digest", help="Do not hash big weights; the manifest records that they were not.")
    ] = False,
    verbose: Verbose = False,
    dry_run: Annotated[bool, output_option("--dry-run", help="Print the plan; write nothing.")] = False,
    force: Force = False,
    data: BigFiles = "link",
    engine: Annotated[
        bool,
        output_option(
            "--engine", help="Also build TensorRT engines, into OUT-engine; `vlmguard engine OUT` has the settings."
        ),
    ] = False,
    sign: SigningKey = None,
    sbom: Annotated[
        bool,
        output_option("--sbom", help="Also write sbom.cdx.json, a CycloneDX bill of materials. (extra: sbom)"),
    ] = False,
    reproducible: Annotated[
        bool,
        output_option(
            "--reproducible",
            help="Write the same bytes for the same input, with the time of SOURCE_DATE_EPOCH or 1970.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Guard a model: plan, rewrite, prove, write a folder with the same layout.

    Without directions, the exporter extracts them from anchor pairs (yours, or the built-in English ones) and chooses the mode
    by the model's answers. It writes nothing unless every check of the proof holds.
    """
    if proof == "structure":
        require_effect(context, ("proof_inputs",), "with --proof structure, which runs nothing")
    if engine and (dry_run or proof == "structure" or target == "onnxruntime"):
        raise typer.BadParameter(
            "--engine needs a proved guard for TensorRT; leave --dry-run, --proof structure and --target onnxruntime out"
        )
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
        mode=mode if mode != "auto" else None,
        layers=parse_layers(layers),
        rank=rank,
        alpha=alpha,
        tau=tau,
        positions=positions,
        lowering=lowering,
        direction_of=direction_of,
        target="tensorrt" if engine or target == "tensorrt" else "onnxruntime",
        knobs=knobs,
        telemetry=telemetry,
        gate=gate,
        supervisor=supervisor,
    )
    with render.bars(err) as report_progress:
        result = export(
            model,
            out_folder,
            spec=spec if config is None else None,
            config=config,
            directions=directions,
            anchors=anchors or None,
            calibration=calibration or None,
            estimator=estimator,
            readout=readout,
            budget=budget,
            variant=variant,
            dtype=dtype,
            opset=opset,
            exporter=exporter,
            data=data,
            digests=not no_digest,
            proof=proof,
            proof_inputs=proof_inputs or (),
            dry_run=dry_run,
            force=force,
            allow_no_effect=allow_no_effect,
            sign=sign,
            sbom=sbom,
            reproducible=reproducible,
            calibration_images=calibration_image or (),
            calibration_seconds=calibration_seconds,
            cache=not no_cache,
            report_progress=report_progress,
        )
    try:
        built = _engines(result.out, force) if engine else None
    except KeyboardInterrupt as stop:
        stop.add_note(f"{result.out} is complete; `vlmguard engine {result.out}` builds its engines")
        raise
    if as_json:
        print_json(result.to_json() | ({"engine": built.to_json()} if built is not None else {}))
        return
    render.show_export(out, result, verbose)
    if built is not None:
        render.show_engines(out, built, result.out)
    elif result.written:
        chosen = {"--dtype": dtype, "--opset": opset, "--exporter": exporter}
        options = [word for name, value in chosen.items() if value is not None for word in (name, str(value))]
        render.show_next(out, render.next_after_export(result, model, options))


# Options that a config does not hold: the model, the output, and the proof. Any other option beside it is an error.
_BESIDE_CONFIG = frozenset(
    [
        "model",
        "out_folder",
        "config",
        "variant",
        "dtype",
        "opset",
        "exporter",
        "no_cache",
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
        "verbose",
    ]
)


def _require_alone(context: typer.Context) -> None:
    """Nothing that a config decides was given besides it."""
    for name in context.params.keys() - _BESIDE_CONFIG:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise typer.BadParameter(f"--config holds this setting; edit it, or leave --{name.replace('_', '-')} out")


def _engines(guarded: Path, force: bool) -> EngineResult:
    from .exporter import render
    from .exporter.engines.engine_folder import build_engines

    with render.bars(err) as report_progress:
        return build_engines(guarded, force=force, report_progress=report_progress)


@app.command(
    "engine",
    panel=SHIP,
    examples=(
        "vlmguard engine guarded",
        "vlmguard engine guarded engines --backend tensorrt_rtx --target-capability 8.9",
        "vlmguard engine guarded --profile prefill:batch=1,sequence=1:256:2048 --print-command",
    ),
)
def engine_command(
    context: typer.Context,
    guarded: Guarded,
    out_folder: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Folder to write. (default: GUARDED-engine)")
    ] = None,
    backend: Annotated[
        BackendName | None,
        engines_option(
            "--backend",
            help="Builder of the engines. (default: tensorrt if installed, else tensorrt_rtx)",
            metavar=one_of(BackendName),
        ),
    ] = None,
    profile: Annotated[
        list[str] | None,
        engines_option(
            "--profile",
            help="Shapes of the decoder's calls, as prefill:batch=1:4,sequence=1:256:2048 or "
            "decode:batch=1:4,sequence=1,past=1:512:4096 (smallest:typical:largest); may be repeated. "
            "(default: these two, within the model's limits)",
            metavar="PROFILE",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        engines_option(
            "--shape",
            help="Shapes of an input that no profile has, as pixel_values=1x3x224x224; may be repeated.",
            metavar="NAME=SHAPE",
        ),
    ] = None,
    target_capability: Annotated[
        list[str] | None,
        engines_option(
            "--target-capability",
            help="Compute capability to build for, such as 8.9; may be repeated. For tensorrt_rtx. (default: its own choice)",
            metavar="X.Y",
        ),
    ] = None,
    workspace: Annotated[
        int | None, engines_option("--workspace", min=1, help="Largest scratch memory of a layer, MiB.", metavar="MIB")
    ] = None,
    timing_cache: Annotated[
        Path | None,
        engines_option(
            "--timing-cache",
            help="File of measured tactics, read if it exists and then updated. For tensorrt.",
            metavar="FILE",
        ),
    ] = None,
    print_command: Annotated[
        bool,
        output_option(
            "--print-command", help="Print the trtexec or tensorrt_rtx command lines instead; build nothing."
        ),
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Build TensorRT engines from a guarded folder, and show that the guard is in them."""
    if print_command:
        require_effect(context, ("out_folder", "force"), "with --print-command, which writes nothing")
    if backend == "tensorrt_rtx":
        require_effect(context, ("timing_cache",), "with --backend tensorrt_rtx, which keeps none")
    if backend == "tensorrt":
        require_effect(context, ("target_capability",), "with --backend tensorrt, which builds for this machine's GPU")
    require_guarded_folder(guarded.absolute())
    from .exporter import render
    from .exporter.engines.build_engine import BuildOptions
    from .exporter.engines.commands import commands_for
    from .exporter.engines.engine_folder import build_engines
    from .exporter.engines.profile import EngineProfile

    profiles = [EngineProfile.parse(text) for text in profile or ()]
    options = BuildOptions(tuple(target_capability or ()), workspace, timing_cache)
    if print_command:
        commands = commands_for(guarded, backend, profiles, shape or (), options)
        if as_json:
            print_json({"commands": commands})
        else:
            for command in commands:
                out.print(command, markup=False, highlight=False, soft_wrap=True)
        return
    with render.bars(err) as report_progress:
        result = build_engines(
            guarded,
            out_folder,
            backend=backend,
            profiles=profiles,
            shapes=shape or (),
            options=options,
            force=force,
            report_progress=report_progress,
        )
    if as_json:
        print_json(result.to_json())
    else:
        render.show_engines(out, result, guarded.absolute())


@app.command(
    "package",
    panel=SHIP,
    examples=(
        "vlmguard package guarded --triton models --gpu",
        "vlmguard package guarded --genai guarded-genai",
        "vlmguard package guarded --onnx-community guarded-js --data copy",
    ),
)
def package_command(
    context: typer.Context,
    guarded: Guarded,
    triton: Annotated[
        Path | None, what("--triton", metavar="DIR", help="Write a Triton Inference Server model repository.")
    ] = None,
    genai: Annotated[
        Path | None, what("--genai", metavar="DIR", help="Write a folder for onnxruntime-genai (text decoders).")
    ] = None,
    onnx_community: Annotated[
        Path | None,
        what("--onnx-community", metavar="DIR", help="Write the names and configs that transformers.js looks for."),
    ] = None,
    gpu: Annotated[
        bool, controls("--gpu", help="Triton: run the graphs on every GPU that it sees. (default: CPU)")
    ] = False,
    instances: Annotated[
        int, controls("--instances", help="Triton: copies of each graph, per GPU or on the CPU.", metavar="N")
    ] = 1,
    requests: Annotated[
        int, controls("--requests", help="Triton: answers generated at the same time.", metavar="N")
    ] = 4,
    max_batch: Annotated[
        int,
        controls(
            "--max-batch",
            help="Triton: largest batch of requests for the vision encoder and the embeddings; 0 for none.",
            metavar="N",
        ),
    ] = 8,
    data: BigFiles = "link",
    force: Annotated[bool, output_option("--force", help="Replace DIR.")] = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Lay a guarded folder out for another runtime, with the graphs unchanged.

    The folder is proved before and after, and `vlmguard verify` works on the result.
    """
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

    with render.bars(err) as report_progress:
        if triton is not None:
            options = TritonOptions("gpu" if gpu else "cpu", instances, requests, max_batch)
            result = package_triton(guarded, triton, options, data=data, force=force, report_progress=report_progress)
        elif genai is not None:
            result = package_genai(guarded, genai, data=data, force=force, report_progress=report_progress)
        else:
            assert onnx_community is not None
            result = package_onnx_community(
                guarded, onnx_community, data=data, force=force, report_progress=report_progress
            )
    for note in result.notes:
        err.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
    if as_json:
        print_json(result.to_json())
    else:
        render.show_packaged(out, result, verbose)


@app.command(
    "convert",
    panel=GUARD,
    examples=(
        "vlmguard convert checkpoint model-folder",
        "vlmguard convert checkpoint model-folder --dtype w16a32",
        "vlmguard convert checkpoint model-folder --exporter genai --dtype int4",
    ),
)
def convert_command(
    checkpoint: Annotated[str, typer.Argument(help="Hugging Face checkpoint folder or hub id.", metavar="CHECKPOINT")],
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    dtype: Annotated[
        Precision | None,
        precision(
            "--dtype",
            help="Precision of the graphs; w16a32 has float16 weights and computes in float32, int4 needs --exporter genai. "
            "(default: fp32)",
            metavar=one_of(Precision),
        ),
    ] = None,
    opset: Annotated[
        int | None, precision("--opset", help="ONNX opset of the graphs. (default: 18)", metavar="N")
    ] = None,
    exporter: Annotated[
        ExporterName,
        precision(
            "--exporter",
            help="Exporter of the checkpoint; only transformers is compared with torch here.",
            metavar=one_of(ExporterName),
        ),
    ] = "transformers",
    force: Annotated[bool, output_option("--force", help="Replace OUT.")] = False,
) -> None:
    """Export a checkpoint WITHOUT a guard, as the base to compare with.

    The folder has the onnx-community layout, or that of --exporter.
    """
    from .exporter import render
    from .exporter.checkpoints.exporters import export_checkpoint
    from .graphs.new_files import create_file
    from .graphs.replaceable import WRITTEN_NAME, foreign_file, written_record
    from .graphs.staging import staged

    with render.bars(err) as report_progress, staged(out_folder, force) as stage:
        parity = export_checkpoint(
            checkpoint,
            stage,
            exporter,
            dtype,
            opset,
            report_progress=report_progress,
        )
        graphs = len(list(stage.rglob("*.onnx")))
        if foreign_file(stage) is not None:
            # files that no layout has: recorded, or --force would not replace the folder
            create_file(stage / WRITTEN_NAME, written_record(stage))
    out.print(f"{escape(str(out_folder))}: {graphs} graphs, [bold]unguarded[/bold]")
    if parity:
        render.show_parity(out, parity)


@app.command(
    "inspect",
    panel=GUARD,
    examples=(
        "vlmguard inspect model-folder",
        "vlmguard inspect model.onnx --full",
        "vlmguard inspect model-folder --variant q4 --json",
    ),
)
def inspect_command(
    model: Model,
    variant: Variant = None,
    no_cache: NoCache = False,
    full: Annotated[
        bool, output_option("--full", help="Show a row for every layer; long runs of like layers are folded otherwise.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the decoder's residual stream: layers, width, dtype, and the value that carries each layer's output."""
    require_model(model)
    from .exporter import render
    from .exporter.pipeline import inspect

    with render.bars(err) as report_progress:
        anatomy = inspect(model, variant, report_progress, cache=not no_cache)
    if as_json:
        print_json({"model": model, **anatomy.to_json()})
    else:
        render.show_anatomy(out, anatomy, model, full)


@app.command(
    "directions",
    panel=GUARD,
    examples=(
        "vlmguard directions model-folder",
        "vlmguard directions model-folder --anchors pairs.jsonl -o directions.safetensors --rank 8",
        "vlmguard directions checkpoint --calibrate restore --force",
    ),
)
def directions_command(
    context: typer.Context,
    model: Model,
    rank: Annotated[int, what("--rank", help="Rows to keep per layer, 1 to 64.", metavar="N")] = 4,
    calibrated_for: Annotated[
        Mode | None,
        what(
            "--calibrate",
            help="Also choose layers, thresholds and targets for this mode.",
            metavar=one_of(Mode),
        ),
    ] = None,
    anchors: Anchors = None,
    calibration: Calibration = None,
    estimator: Estimator = "svd",
    readout: Readout = None,
    variant: Variant = None,
    no_cache: NoCache = False,
    output: Annotated[Path, output_option("--output", "-o", help="File to write.", metavar="FILE")] = Path(
        "directions.safetensors"
    ),
    force: Annotated[bool, output_option("--force", help="Replace the file.")] = False,
    as_json: AsJson = False,
    ray: Ray = None,
    ray_workers: RayWorkers = None,
) -> None:
    """Extract safety steering directions from the model itself: one pass over the anchors, one estimate per layer.

    An ONNX model is read as it is, int4 too; a checkpoint is read in torch. --calibrate also writes the guard as a guard.toml
    beside the directions, which you can edit. A killed extraction continues where it stopped.
    """
    if calibrated_for is None:
        require_effect(context, ("calibration", "readout"), "without --calibrate")
        if is_checkpoint(model):
            require_effect(context, ("variant",), "on a checkpoint, which is read in torch")
    require_model(model)
    from .exporter import render
    from .exporter.pipeline import extract_directions

    beside: dict[str, Path] = {}
    with render.bars(err) as report_progress:
        found = extract_directions(
            model,
            output,
            anchors=anchors or None,
            rank=rank,
            calibrate_for=calibrated_for,
            calibration=calibration or None,
            estimator=estimator,
            readout=readout,
            variant=variant,
            ray=ray,
            ray_workers=ray_workers,
            force=force,
            cache=not no_cache,
            report_progress=report_progress,
            report_found=beside.update,
        )
    if as_json:
        shown = {"output": str(output), "layers": list(found.layers), "pairs": found.pairs}
        shown["found"] = {what: str(path) for what, path in beside.items()}
        print_json(shown | {"estimator": found.estimator, "evidence": found.evidence})
        return
    show_found(out, beside)
    render.show_directions(out, found, str(output))
    calibrated = calibrated_for is not None
    render.show_next(out, render.next_after_directions(model, output, calibrated, anchors, variant))


@app.command(
    "verify",
    panel=CHECK,
    examples=(
        "vlmguard verify guarded",
        "vlmguard verify guarded --source model-folder --run",
        "vlmguard verify guarded --verify-signature public.pem",
    ),
)
def verify_command(
    context: typer.Context,
    guarded: Guarded,
    source: Annotated[
        Path | None, proof_option("--source", help="The unguarded model to compare with.", metavar="MODEL")
    ] = None,
    run: Annotated[
        bool, proof_option("--run", help="Also run both models: the numerical proof. Needs --source.")
    ] = False,
    proof_inputs: ProofInputs = None,
    verify_signature: Annotated[
        Path | None,
        proof_option(
            "--verify-signature",
            metavar="PUBLIC_KEY",
            help="Also verify the folder's signature with this public key, PEM. (extra: sign)",
        ),
    ] = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Redo the structural proof of a guarded folder from its files alone; with --source also against the unguarded model."""
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

    with render.bars(err) as report_progress:
        result = verify(guarded, source, run, proof_inputs or (), report_progress, public_key=verify_signature)
    if as_json:
        print_json(result.to_json())
    else:
        plan = result.manifest.plan
        render.show_proof(out, result.checks, f"{guarded}: {plan['mode']} on layers {plan['layers']}", verbose)
    if not result.ok:
        failed = next((check for check in result.checks if not check.ok), None)
        if result.state == "not verified":
            raise GuardError(f"{guarded}: not verified: {result.missing}")
        raise GuardError(f"{guarded}: {failed.name if failed else 'nothing was checked'} does not hold; export again")


@app.command(
    "sign",
    panel=SHIP,
    examples=(
        "openssl ecparam -genkey -name prime256v1 -noout -out key.pem",
        "vlmguard sign guarded --key key.pem",
        "openssl ec -in key.pem -pubout -out public.pem",
    ),
)
def sign_command(
    guarded: Guarded,
    key: Annotated[
        Path,
        what("--key", metavar="KEY", help="Elliptic-curve private key, PEM, without a password."),
    ],
) -> None:
    """Sign a guarded folder, offline, so that `vlmguard verify --verify-signature` detects replaced files. (extra: sign)

    The proof shows what a folder contains; the signature, model.sig, shows which key signed it. An attacker who can write the
    files can remove the guard and make all digests fit, but cannot sign the result without the private key.
    """
    require_guarded_folder(guarded.absolute())
    require_file(key, KEY)
    from .exporter.artifact.signing import sign

    path = sign(guarded, key)
    out.print(f"[bold]signed[/bold]: {escape(str(path))}", highlight=False, soft_wrap=True)


@app.command(
    "generate",
    panel=RUN,
    examples=(
        'vlmguard generate guarded -p "What is in this picture?" -i photo.png',
        'vlmguard generate guarded -p "Describe it." --blank --scores',
        'vlmguard generate model-folder --unguarded -p "Hello" --temperature 0.7 --seed 1',
    ),
)
def generate_command(
    model: Annotated[
        Path, typer.Argument(help="A guarded folder; with --unguarded any model folder.", metavar="GUARDED")
    ],
    prompt: Annotated[str, what("--prompt", "-p", help="Text of the prompt.", metavar="TEXT")],
    image: Annotated[
        Path | None, what("--image", "-i", help="Picture to show. (default: none)", metavar="FILE")
    ] = None,
    blank: Annotated[bool, what("--blank", help="Show a blank white picture.")] = False,
    unguarded: Annotated[bool, what("--unguarded", help="Run a model that has no guard.")] = False,
    max_new_tokens: AnswerTokens = MAX_NEW_TOKENS,
    temperature: Annotated[
        float, controls("--temperature", help="Sampling temperature; 0 is greedy.", metavar="X")
    ] = 0.0,
    top_p: Annotated[
        float,
        controls("--top-p", help="Sample among the likeliest tokens of this total probability.", metavar="SHARE"),
    ] = 1.0,
    seed: Annotated[int, controls("--seed", min=0, help="Random seed for sampling.", metavar="N")] = 0,
    strength: Annotated[
        float | None,
        controls(
            "--strength",
            help="Strength of a guard that has knobs: 0 only measures, 1 is as calibrated, 2 is the highest.",
            metavar="X",
        ),
    ] = None,
    threshold_offset: Annotated[
        float | None,
        controls(
            "--threshold-offset",
            help="Offset to the gate thresholds of a guard that has knobs; above 0 the gates open more rarely.",
            metavar="X",
        ),
    ] = None,
    scores: Annotated[
        bool,
        output_option("--scores", help="Also show what the gates compared. Needs a guard exported with --telemetry."),
    ] = False,
    as_json: Annotated[
        bool, output_option("--json", help="Print the answer, and the gate scores if the model has them, as JSON.")
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


@app.command(
    "serve",
    panel=RUN,
    examples=(
        "vlmguard serve guarded",
        "vlmguard serve guarded --port 9000 --concurrency 2 --max-tokens 256",
        "vlmguard serve guarded --host 0.0.0.0 --api-key-file key.txt",
    ),
)
def serve_command(
    guarded: Guarded,
    host: Annotated[str, what("--host", help="Address to listen on.", metavar="ADDRESS")] = "127.0.0.1",
    port: Annotated[int, what("--port", help="Port to listen on; 0 takes a free one.", metavar="PORT")] = 8000,
    api_key_file: Annotated[
        Path | None,
        what(
            "--api-key-file",
            help="File with the API key that requests must carry. (default: the variable VLMGUARD_API_KEY, else none)",
            metavar="FILE",
        ),
    ] = None,
    without_key: Annotated[
        bool, what("--without-key", help="Accept requests without a key on a --host that other machines can reach.")
    ] = False,
    model_name: Annotated[
        str | None,
        what("--model-name", help="Name of the model in requests. (default: the folder's name)", metavar="NAME"),
    ] = None,
    concurrency: Annotated[
        int | None,
        limits("--concurrency", help="Answers generated at the same time. (default: 4; 1 for engines)", metavar="N"),
    ] = None,
    queue: Annotated[
        int,
        limits("--queue", help="Requests that may wait; the next one gets status 429 and Retry-After.", metavar="N"),
    ] = 64,
    max_tokens: Annotated[
        int, limits("--max-tokens", help="Longest answer that a request may ask for, in tokens.", metavar="N")
    ] = 512,
    max_prompt_tokens: Annotated[
        int,
        limits("--max-prompt-tokens", help="Longest conversation, its image included, in tokens.", metavar="N"),
    ] = 4096,
    max_context: Annotated[
        int | None,
        limits(
            "--max-context",
            help="Longest conversation and answer together, in tokens. (default: from the model's configs)",
            metavar="N",
        ),
    ] = None,
    max_image_mib: Annotated[int, limits("--max-image-mib", help="Largest image file, MiB.", metavar="MIB")] = 10,
    timeout: Annotated[
        float,
        limits("--timeout", help="Time limit of a request, waiting included, in seconds.", metavar="SECONDS"),
    ] = 120.0,
    grace: Annotated[
        float,
        limits("--grace", help="Time for running answers to finish after SIGTERM, in seconds.", metavar="SECONDS"),
    ] = 30.0,
) -> None:
    """Serve a guarded folder over an OpenAI-compatible HTTP API, until SIGTERM or Ctrl-C. (extra: serve)

    It answers /v1/chat/completions (images as data: URLs, streaming), /v1/models, /healthz, and /metrics for Prometheus. It
    rejects a folder that differs from what was proved, and nothing in a request changes the guard. See docs/serving.md.
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

    def on_ready(plan: dict[str, Any], address: str) -> None:
        guard = f"{plan['mode']} on layers {', '.join(map(str, plan['layers']))}"
        asked = "with an API key" if api_key is not None else "without an API key"
        err.print(f"serving {escape(settings.name)} ({guard}), {asked}; Ctrl-C stops", highlight=False, soft_wrap=True)
        out.print(address, markup=False, highlight=False, soft_wrap=True)
        out.file.flush()

    log_to_stderr()
    serve(guarded, settings, on_ready)


@app.command(
    "evaluate",
    panel=CHECK,
    examples=(
        "vlmguard evaluate model-folder guarded",
        "vlmguard evaluate model-folder guarded --prompts evaluation.jsonl --image pictures",
        "vlmguard evaluate model-folder guarded --out records.jsonl --answers",
    ),
)
def evaluate_command(
    base: Annotated[Path, typer.Argument(help="The unguarded model.", metavar="BASE")],
    guarded: Guarded,
    prompts: Annotated[
        list[str] | None,
        data_option(
            "--prompts",
            help="Labelled prompts: FILE, FORMAT:FILE (see `vlmguard prompts`) or builtin; may be repeated. "
            "(default: evaluation.jsonl found beside BASE, else builtin)",
            metavar="FILE",
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        data_option(
            "--image",
            "-i",
            help="Picture, or folder of pictures, for prompts whose file names none; may be repeated.",
            metavar="PATH",
        ),
    ] = None,
    judge_model: Annotated[
        Path | None,
        what(
            "--judge-model",
            help="Checkpoint folder of a LlamaGuard-style model, as a second judge. (needs torch)",
            metavar="CHECKPOINT",
        ),
    ] = None,
    no_gates: Annotated[
        bool, what("--no-gates", help="Do not read the gates, which opens the decoder once more.")
    ] = False,
    seed: Annotated[int, what("--seed", min=0, help="Random seed of the bootstrap intervals.", metavar="N")] = 0,
    max_new_tokens: AnswerTokens = MAX_NEW_TOKENS,
    batch_size: Annotated[int, limits("--batch-size", help="Prompts that run together.", metavar="N")] = 32,
    record: Annotated[
        Path | None,
        output_option(
            "--out",
            "-o",
            help="File to write, one JSON line per prompt; a killed run continues with it.",
            metavar="FILE",
        ),
    ] = None,
    answers: Annotated[
        bool,
        output_option("--answers", help="Keep the answers in --out too; answers to harmful prompts can be harmful."),
    ] = False,
    as_json: AsJson = False,
    ray: Ray = None,
    ray_workers: RayWorkers = None,
) -> None:
    """Measure the safety gap closed: refusals of both models against the text-only model, attacks, open gates, drift."""
    if answers and record is None:
        raise typer.BadParameter("--answers keeps them in the file of --out; name one")
    require_model(base)
    require_guarded_folder(guarded.absolute())
    from .exporter import render
    from .exporter.evaluation.evaluate import compare
    from .exporter.evaluation.tables import show_evaluation

    with render.bars(err) as report_progress:
        result = compare(
            base,
            guarded,
            prompts or None,
            max_new_tokens,
            batch_size,
            report_progress,
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
        render.show_next(out, render.next_after_evaluation(base, guarded))


@app.command(
    "prompts",
    panel=CHECK,
    examples=(
        "vlmguard prompts",
        "vlmguard prompts evaluation.jsonl advbench:harmful_behaviors.csv",
        "vlmguard prompts anchors.jsonl evaluation.jsonl --disjoint",
    ),
)
def prompts_command(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE", help="FILE, FORMAT:FILE or builtin:PART. (default: the built-in prompts)"),
    ] = None,
    disjoint: Annotated[bool, what("--disjoint", help="Fail if two sets share a prompt.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what prompt files contain, and which prompts they share. Without FILE: the known formats, the built-in prompts."""
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


@app.command(
    "report",
    panel=CHECK,
    examples=(
        "vlmguard report guarded",
        "vlmguard report guarded -o report.html --prompts evaluation.jsonl --source model-folder",
        "vlmguard report guarded --max-prompts 10 --json",
    ),
)
def report_command(
    guarded: Guarded,
    prompts: Annotated[
        Path | None,
        data_option(
            "--prompts",
            help="Labelled prompts. (default: evaluation.jsonl found beside SOURCE or GUARDED)",
            metavar="FILE",
        ),
    ] = None,
    source: Annotated[
        Path | None,
        data_option(
            "--source",
            help="The unguarded model. (default: GUARDED's graph with the guard taken out, in memory)",
            metavar="MODEL",
        ),
    ] = None,
    image: Annotated[
        Path | None,
        data_option(
            "--image", help="Picture to show with every text prompt. (default: those the prompts name)", metavar="FILE"
        ),
    ] = None,
    engine: Annotated[
        Path | None,
        data_option(
            "--engine", help="Folder of TensorRT engines built from GUARDED, for the cost table.", metavar="FOLDER"
        ),
    ] = None,
    benchmark: Annotated[
        Path | None,
        data_option("--benchmark", help="Result of benchmarks/inference.py, for the cost table.", metavar="FILE"),
    ] = None,
    max_prompts: Annotated[int, limits("--max-prompts", help="Prompts of each setting and label.", metavar="N")] = 40,
    max_new_tokens: AnswerTokens = MAX_NEW_TOKENS,
    batch_size: Annotated[int, limits("--batch-size", help="Prompts that run together.", metavar="N")] = 16,
    output: Annotated[Path, output_option("--output", "-o", help="Page to write.", metavar="FILE")] = Path(
        "report.html"
    ),
    force: Annotated[bool, output_option("--force", help="Replace the page.")] = False,
    as_json: Annotated[
        bool, output_option("--json", help="Print the data behind the figures as JSON on stdout.")
    ] = False,
) -> None:
    """Write one page about a guarded folder: states, separation, gates, refusals, strength, cost, proof. It works offline."""
    require_guarded_folder(guarded.absolute())
    if source is not None:
        require_model(source)
    from .apps.report.build_report import report
    from .apps.report.report_summary import show_report
    from .exporter import render

    with render.bars(err) as report_progress:
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
            report_progress=report_progress,
        )
    if as_json:
        found = {what: str(path) for what, path in data.found.items()}
        print_json({"output": str(output), **data.to_json(), **({"found": found} if found else {})})
    else:
        show_report(out, data, str(output))


@app.command(
    "playground",
    panel=RUN,
    examples=(
        "vlmguard playground guarded",
        "vlmguard playground guarded --base model-folder --no-open",
        "vlmguard playground guarded --prompts evaluation.jsonl --port 0",
    ),
)
def playground_command(
    guarded: Guarded,
    base: Annotated[
        Path | None,
        data_option(
            "--base",
            help="The unguarded model. (default: GUARDED's graph with the guard taken out, in memory)",
            metavar="MODEL",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        data_option(
            "--prompts",
            help="Labelled prompts to pick from: FILE or FORMAT:FILE. (default: found beside the model, else builtin)",
            metavar="FILE",
        ),
    ] = None,
    assets: Annotated[
        Path | None,
        data_option(
            "--assets",
            help="A node_modules folder with the page's libraries. (default: fetched once from the npm registry)",
            metavar="FOLDER",
        ),
    ] = None,
    variant: Annotated[
        str | None,
        precision(
            "--variant",
            help="Precision variant of the decoder: fp16, q4, ... (default: the one that runs)",
            metavar="NAME",
        ),
    ] = None,
    port: Annotated[
        int,
        output_option("--port", min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.", metavar="PORT"),
    ] = 8365,
    open_page: Annotated[bool, output_option("--open/--no-open", help="Open the page in your browser.")] = True,
    as_json: Annotated[bool, output_option("--json", help="Print the address as JSON on stdout.")] = False,
) -> None:
    """Serve a page that runs the model in your browser, without and with its guard, and shows its gates live.

    Both run in the browser (onnxruntime-web); no data leaves this machine. Ctrl+C ends it. For a browser on another machine
    forward the port: ssh -L 8365:127.0.0.1:8365 HOST.
    """
    require_guarded_folder(guarded.absolute())
    if base is not None:
        require_model(base)
    from .apps.playground.open import playground
    from .exporter import render

    with render.bars(err) as report_progress:
        server = playground(
            guarded,
            base=base,
            variant=variant,
            prompts=prompts,
            assets=assets,
            port=port,
            report_progress=report_progress,
        )
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

# Errors of stdout itself, a file on a full disk.
_NOWHERE_TO_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

# Reasons for which the system refuses a path; wherever they happen, they are no bug of ours.
_OUT_OF_REACH = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS)


def main() -> NoReturn:
    """`vlmguard ...`"""
    _run(sys.argv[1:])


def main_export() -> NoReturn:
    """`vlmguard-export ...`, which is `vlmguard export ...`."""
    _run(["export", *sys.argv[1:]])


def _run(arguments: list[str]) -> NoReturn:
    # Libraries warn about odd files and odd numbers: our own checks find them, and report them in one line.
    logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    try:
        try:
            with kept():
                app(arguments, prog_name="vlmguard", obj=arguments)
        finally:
            if sys.stdout is not None:  # `>&-` closes it
                sys.stdout.flush()  # here, where a full disk or a closed pipe is still reported in our words
    except BrokenPipeError:
        end_quietly()
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
        stdout: IO[str] | None = sys.stdout
        with contextlib.suppress(OSError, ValueError):  # what is still buffered is not tried again at the end
            if stdout is not None:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        sys.exit(1)
    sys.exit(0)
