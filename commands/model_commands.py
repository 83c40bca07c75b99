"""Commands that read a model without guarding it: convert, inspect, directions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ..exporter.choices import (
    ExporterName,
    Precision,
    one_of,
)
from ..exporter.terminal import show_found
from ..exporter.usage import require_effect
from ..graphs.modes import Mode
from ..graphs.places import (
    is_checkpoint,
    require_model,
)

if TYPE_CHECKING:
    pass

from . import console
from .application import GUARD, app
from .shared_options import (
    Anchors,
    AsJson,
    Calibration,
    Estimator,
    Model,
    NoCache,
    Ray,
    RayWorkers,
    Readout,
    Variant,
    output_option,
    precision,
    what,
)


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
    no_cache: NoCache = False,
    force: Annotated[bool, output_option("--force", help="Replace OUT.")] = False,
) -> None:
    """Export a checkpoint WITHOUT a guard, as the base to compare with.

    The folder has the onnx-community layout, or that of --exporter.
    """
    from ..exporter import render
    from ..exporter.checkpoints.cache import export_to
    from ..graphs.new_files import create_file
    from ..graphs.replaceable import WRITTEN_NAME, foreign_file, written_record
    from ..graphs.staging import staged

    with render.bars(console.err) as report_progress, staged(out_folder, force) as stage:
        parity = export_to(stage, checkpoint, exporter, dtype, opset, report_progress, cache=not no_cache)
        graphs = len(list(stage.rglob("*.onnx")))
        if foreign_file(stage) is not None:
            # files that no layout has: recorded, or --force would not replace the folder
            create_file(stage / WRITTEN_NAME, written_record(stage))
    console.out.print(f"{escape(str(out_folder))}: {graphs} graphs, [bold]unguarded[/bold]")
    if parity:
        render.show_parity(console.out, parity)


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
    from ..exporter import render
    from ..exporter.opened_decoder import inspect

    with render.bars(console.err) as report_progress:
        anatomy = inspect(model, variant, report_progress, cache=not no_cache)
    if as_json:
        console.print_json({"model": model, **anatomy.to_json()})
    else:
        render.show_anatomy(console.out, anatomy, model, full)


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
            require_effect(context, ("variant", "no_cache"), "on a checkpoint, which is read in torch")
    require_model(model)
    from ..exporter import render
    from ..exporter.extract_directions import extract_directions

    beside: dict[str, Path] = {}
    with render.bars(console.err) as report_progress:
        directions = extract_directions(
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
        shown = {"output": str(output), "layers": list(directions.layers), "pairs": directions.pairs}
        shown["found"] = {what: str(path) for what, path in beside.items()}
        console.print_json(shown | {"estimator": directions.estimator, "evidence": directions.evidence})
        return
    show_found(console.out, beside)
    render.show_directions(console.out, directions, str(output))
    calibrated = calibrated_for is not None
    render.show_next(console.out, render.next_after_directions(model, output, calibrated, anchors, variant))
