"""Commands that run a guarded folder: generate, serve, playground."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..graphs.places import (
    require_guarded_folder,
    require_model,
)
from ..runtime.defaults import MAX_NEW_TOKENS

if TYPE_CHECKING:
    from ..runtime.telemetry import ScoredAnswer

from . import console
from .application import RUN, app
from .shared_options import (
    AnswerTokens,
    Guarded,
    RunVariant,
    controls,
    data_option,
    limits,
    output_option,
    what,
)


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
        list[Path] | None,
        what("--image", "-i", help="Picture to show; repeat it for several. (default: none)", metavar="FILE"),
    ] = None,
    blank: Annotated[bool, what("--blank", help="Show a blank white picture.")] = False,
    unguarded: Annotated[bool, what("--unguarded", help="Run a model that has no guard.")] = False,
    variant: RunVariant = None,
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
    if blank and image:
        raise typer.BadParameter("--blank and --image exclude each other")
    if unguarded and scores:
        raise typer.BadParameter("--unguarded has no gates: leave --scores out")
    if unguarded:
        require_model(model)
    else:
        require_guarded_folder(model.absolute())
    from ..exporter.sources import open_model, require_unmarked
    from ..runtime.generation import Request, Sampling
    from ..runtime.guarded import GuardedVLM
    from ..runtime.knobs import Knobs

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    if unguarded:
        require_unmarked(model)
    vlm = open_model(model, variant) if unguarded else GuardedVLM.open(model, variant=variant)
    shown = vlm.blank_image() if blank else image
    knobs = Knobs(strength, threshold_offset)
    if as_json and not (scores or vlm.decoder.outputs_scores):
        console.print_json({"answer": vlm.answer([Request(prompt, shown)], sampling, knobs=knobs)[0], "scores": None})
        return
    if isinstance(vlm, GuardedVLM) and (scores or as_json):
        answer = vlm.generate_scored(
            prompt, shown, max_new_tokens, temperature, top_p, seed, strength, threshold_offset
        )
        _show_scored(answer, as_json)
        return
    for piece in vlm.stream(Request(prompt, shown), sampling, knobs):
        console.out.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.out.print()


def _show_scored(answer: ScoredAnswer, as_json: bool) -> None:
    from ..exporter import render

    if as_json:
        console.print_json(answer.to_json())
        return
    console.out.print(answer.text, markup=False, highlight=False, soft_wrap=True)
    render.show_scores(console.out, answer)


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
    variant: RunVariant = None,
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
        limits("--max-prompt-tokens", help="Longest conversation, its images included, in tokens.", metavar="N"),
    ] = 4096,
    max_context: Annotated[
        int | None,
        limits(
            "--max-context",
            help="Longest conversation and answer together, in tokens. (default: from the model's configs)",
            metavar="N",
        ),
    ] = None,
    max_image_mib: Annotated[
        int,
        limits("--max-image-mib", help="Largest image file, and all images of a request together, MiB.", metavar="MIB"),
    ] = 10,
    max_images: Annotated[int, limits("--max-images", help="Most images of a conversation.", metavar="N")] = 8,
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
    from ..apps.serving.server import log_to_stderr, require_extra, serve
    from ..apps.serving.settings import MIB, ServeSettings, read_api_key, require_key_or_loopback

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
        max_images=max_images,
        variant=variant,
        timeout=timeout,
        grace=grace,
    )

    def on_ready(plan: dict[str, Any], address: str) -> None:
        guard = f"{plan['mode']} on layers {', '.join(map(str, plan['layers']))}"
        access = "with an API key" if api_key is not None else "without an API key"
        console.err.print(
            f"serving {escape(settings.name)} ({guard}), {access}; Ctrl-C stops", highlight=False, soft_wrap=True
        )
        console.out.print(address, markup=False, highlight=False, soft_wrap=True)
        console.out.file.flush()

    log_to_stderr()
    serve(guarded, settings, on_ready)


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
    variant: RunVariant = None,
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
    from ..apps.playground.open import playground
    from ..exporter import render

    with render.bars(console.err) as report_progress:
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
        console.print_json({"url": server.url})
    else:
        console.out.print(
            f"{escape(str(guarded))}: [bold]{server.url}[/bold] (Ctrl+C ends it)", highlight=False, soft_wrap=True
        )
    sys.stdout.flush()
    server.run(open_page)
