"""Commands that check a guarded folder: verify, evaluate, report, prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..exporter.usage import require_effect
from ..graphs.errors import GuardError
from ..graphs.places import (
    KEY,
    PROOF_INPUTS,
    require_file,
    require_guarded_folder,
    require_model,
)
from ..runtime.defaults import MAX_NEW_TOKENS

if TYPE_CHECKING:
    pass

from . import console
from .application import CHECK, app
from .shared_options import (
    AnswerTokens,
    AsJson,
    Guarded,
    ProofInputs,
    Ray,
    RayWorkers,
    RunVariant,
    Verbose,
    data_option,
    limits,
    output_option,
    proof_option,
    what,
)


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
    from ..exporter import render
    from ..exporter.proof.verify import verify

    with render.bars(console.err) as report_progress:
        result = verify(guarded, source, run, proof_inputs or (), report_progress, public_key=verify_signature)
    if as_json:
        console.print_json(result.to_json())
    else:
        plan = result.manifest.plan
        render.show_proof(console.out, result.checks, f"{guarded}: {plan['mode']} on layers {plan['layers']}", verbose)
    if not result.ok:
        failed = next((check for check in result.checks if not check.ok), None)
        if result.state == "not verified":
            raise GuardError(f"{guarded}: not verified: {result.missing}")
        raise GuardError(f"{guarded}: {failed.name if failed else 'nothing was checked'} does not hold; export again")


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
    variant: RunVariant = None,
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
    from ..exporter import render
    from ..exporter.evaluation.evaluate import compare
    from ..exporter.evaluation.tables import show_evaluation

    with render.bars(console.err) as report_progress:
        result = compare(
            base,
            guarded,
            prompts or None,
            max_new_tokens,
            batch_size,
            report_progress,
            variant=variant,
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
        console.print_json(result.to_json())
    else:
        show_evaluation(console.out, result)
        render.show_next(console.out, render.next_after_evaluation(base, guarded, variant))


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
    from ..exporter.prompts.holdings import look_at, require_disjoint, show_formats, show_prompts

    report = look_at(sources or ())
    if as_json:
        console.print_json(report.to_json())
    else:
        if not sources:
            show_formats(console.out)
        show_prompts(console.out, report)
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
    variant: RunVariant = None,
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
    from ..apps.report.build_report import report
    from ..apps.report.report_summary import show_report
    from ..exporter import render

    with render.bars(console.err) as report_progress:
        data = report(
            guarded,
            output,
            prompts=prompts,
            source=source,
            variant=variant,
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
        found_files = {what: str(path) for what, path in data.found.items()}
        console.print_json({"output": str(output), **data.to_json(), **({"found": found_files} if found_files else {})})
    else:
        show_report(console.out, data, str(output))
