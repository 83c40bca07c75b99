"""Commands that prepare a guarded folder for deployment: engine, package, sign."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ..exporter.choices import (
    one_of,
)
from ..exporter.usage import require_effect
from ..graphs.places import (
    KEY,
    require_file,
    require_guarded_folder,
)
from ..runtime.tensorrt.backend import BackendName

if TYPE_CHECKING:
    pass

from . import console
from .application import SHIP, app
from .shared_options import (
    AsJson,
    BigFiles,
    Force,
    Guarded,
    Verbose,
    controls,
    engines_option,
    output_option,
    what,
)


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
    single_engine: Annotated[
        bool,
        engines_option(
            "--single-engine",
            help="Build one decoder engine for prefill and decode: half the memory for weights, more kernels per decode step.",
        ),
    ] = False,
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
        require_effect(context, ("single_engine",), "with --print-command, whose decoder is always one engine")
    if backend == "tensorrt_rtx":
        require_effect(context, ("timing_cache",), "with --backend tensorrt_rtx, which keeps none")
    if backend == "tensorrt":
        require_effect(context, ("target_capability",), "with --backend tensorrt, which builds for this machine's GPU")
    require_guarded_folder(guarded.absolute())
    from ..exporter import render
    from ..exporter.engines.build_engine import BuildOptions
    from ..exporter.engines.commands import commands_for
    from ..exporter.engines.engine_folder import build_engines
    from ..exporter.engines.profile import EngineProfile

    profiles = [EngineProfile.parse(text) for text in profile or ()]
    options = BuildOptions(tuple(target_capability or ()), workspace, timing_cache)
    if print_command:
        commands = commands_for(guarded, backend, profiles, shape or (), options)
        if as_json:
            console.print_json({"commands": commands})
        else:
            for command in commands:
                console.out.print(command, markup=False, highlight=False, soft_wrap=True)
        return
    with render.bars(console.err) as report_progress:
        result = build_engines(
            guarded,
            out_folder,
            backend=backend,
            profiles=profiles,
            shapes=shape or (),
            options=options,
            single_engine=single_engine,
            force=force,
            report_progress=report_progress,
        )
    if as_json:
        console.print_json(result.to_json())
    else:
        render.show_engines(console.out, result, guarded.absolute())


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
        Path | None,
        what(
            "--genai",
            metavar="DIR",
            help="Write a folder for onnxruntime-genai: a text decoder, or with pictures Qwen2-VL and Qwen2.5-VL.",
        ),
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
    from ..exporter import render
    from ..exporter.packaging.genai import package_genai
    from ..exporter.packaging.onnx_community import package_onnx_community
    from ..exporter.packaging.triton_config import TritonOptions
    from ..exporter.packaging.triton_repository import package_triton

    with render.bars(console.err) as report_progress:
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
        console.err.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
    if as_json:
        console.print_json(result.to_json())
    else:
        render.show_packaged(console.out, result, verbose)


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
    from ..exporter.artifact.signing import sign

    path = sign(guarded, key)
    console.out.print(f"[bold]signed[/bold]: {escape(str(path))}", highlight=False, soft_wrap=True)
