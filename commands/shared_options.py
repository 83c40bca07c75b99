"""Arguments and options that several commands have."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..exporter.choices import (
    EstimatorName,
    ReadoutName,
    one_of,
)
from ..graphs.new_files import Data

if TYPE_CHECKING:
    pass

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
RunVariant = Annotated[
    str | None,
    what(
        "--variant",
        help="Precision variant of an onnx-community folder to run: fp16, q4, ... (default: the plain one)",
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
