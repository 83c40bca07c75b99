"""`vlmguard export`: guard a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..exporter.choices import (
    ExporterName,
    Precision,
    WantedMode,
    WantedProof,
    one_of,
)
from ..exporter.usage import require_effect
from ..graphs.modes import Positions
from ..graphs.places import (
    CONFIG,
    DIRECTIONS,
    KEY,
    PROOF_INPUTS,
    require_file,
    require_model,
)
from ..graphs.spec import Decided, GuardSpec, Supervisor, Target, parse_layers

if TYPE_CHECKING:
    from ..exporter.engines.engine_folder import EngineResult

from . import console
from .application import GUARD, app
from .shared_options import (
    Anchors,
    AsJson,
    BigFiles,
    Calibration,
    Estimator,
    Force,
    Model,
    NoCache,
    ProofInputs,
    Readout,
    SigningKey,
    Variant,
    Verbose,
    controls,
    data_option,
    output_option,
    precision,
    proof_option,
    what,
)


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
            help="Intervention. auto uses the mode of the given or found directions, else the first of align, supervise, "
            "restore and combined that restores refusals.",
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
            help="Largest share of harmless prompts that a calibrated guard may refuse.",
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
            help="Exporter of a checkpoint. optimum writes the text decoder only, so does genai, but for Gemma 3 and "
            "Qwen2.5-VL. (default: transformers)",
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
    from ..exporter import render
    from ..exporter.options import ExportOptions
    from ..exporter.pipeline import export

    if engine:
        from ..runtime.tensorrt.backend import find_backend

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
    options = ExportOptions(
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
    )
    with render.bars(console.err) as report_progress:
        result = export(model, out_folder, options, report_progress=report_progress)
    try:
        built = _engines(result.out, force) if engine else None
    except KeyboardInterrupt as stop:
        stop.add_note(f"{result.out} is complete; `vlmguard engine {result.out}` builds its engines")
        raise
    if as_json:
        console.print_json(result.to_json() | ({"engine": built.to_json()} if built is not None else {}))
        return
    render.show_export(console.out, result, verbose)
    if built is not None:
        render.show_engines(console.out, built, result.out)
    elif result.written:
        chosen = {"--dtype": dtype, "--opset": opset, "--exporter": exporter}
        words = [word for name, value in chosen.items() if value is not None for word in (name, str(value))]
        render.show_next(console.out, render.next_after_export(result, model, words))


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
    from ..exporter import render
    from ..exporter.engines.engine_folder import build_engines

    with render.bars(console.err) as report_progress:
        return build_engines(guarded, force=force, report_progress=report_progress)
