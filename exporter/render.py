"""Terminal output: tables of plans and checks, and progress bars.

Text from files (names, paths, notes) is escaped, because untrusted text can look like markup.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..graphs.anatomy import DecoderAnatomy
from ..graphs.directions import Directions
from ..graphs.errors import GuardError
from ..graphs.places import is_checkpoint
from ..graphs.plan import GuardPlan
from ..graphs.proof.structure import Check
from ..graphs.sites import ResidualSite
from ..runtime.telemetry import ScoredAnswer
from .calibration.results import HeldOut
from .engines.engine_folder import EngineResult
from .export_result import ExportResult
from .packaging.repackage import Packaged
from .terminal import show_found
from .variants_table import show_variants


def show_anatomy(out: Console, anatomy: DecoderAnatomy, model: str, full: bool = False) -> None:
    """Print the residual stream as a sentence, a table of layers, and the next command.

    Args:
        out: the console.
        anatomy: the decoder.
        model: the user's name of the model, for the title and the next command.
        full: print a row for every layer; otherwise runs of similar layers are folded.
    """
    out.print(escape(anatomy_in_words(anatomy)), highlight=False)
    branches = len(anatomy.streams) > 1
    table = Table(title=escape(model))
    for column in ("layer", *(("branch",) if branches else ()), "output made by", "carried by", "dtype"):
        table.add_column(column, overflow="fold")
    for stream in anatomy.streams:
        for layers, site in _folded(stream.sites, full):
            cells = ("[dim]as above[/dim]",) * 3 if site is None else _site_cells(site)
            table.add_row(layers, *((escape(stream.body),) if branches else ()), *cells)
    out.print(table)
    out.print(f"from {escape(anatomy.source)} to {escape(anatomy.sink)}, {anatomy.nodes} nodes", highlight=False)
    if anatomy.guarded_layers:
        layers = ", ".join(map(str, anatomy.guarded_layers))
        out.print(f"carries a guard on layers {layers}; `vlmguard verify` proves it", highlight=False)
    else:
        show_next(out, f"vlmguard-export {shlex.quote(model)}")


def anatomy_in_words(anatomy: DecoderAnatomy) -> str:
    """One sentence: how many layers, how wide, in which dtype, how their sums are written, and how sure that is."""
    kinds = Counter(site.kind for site in anatomy.streams[0].sites)
    if len(kinds) == 1:
        sums = _SUMS[next(iter(kinds))]
    else:
        sums = " and ".join(f"{number} {_SUMS[kind]}" for kind, number in sorted(kinds.items()))
    where = ""
    if len(anatomy.streams) > 1:
        where = f", the same in {len(anatomy.streams)} branches of an If ({', '.join(anatomy.bodies)})"
    sure = {"confirmed": "confirmed by the config", "structural": "not confirmed: there is no config"}
    return (
        f"{anatomy.layer_count} layers, width {anatomy.width}, {'/'.join(anatomy.dtypes)}, {sums}{where}; "
        f"{sure[anatomy.certainty]}"
    )


_SUMS = {
    "add": "plain sums (Add)",
    "skip_norm": "sums fused with their norms (ONNX Runtime's skip-norm)",
    "behind": "states behind their sums (a norm or a Reshape)",
}
_WRITTEN = {"add": "an Add", "skip_norm": "a fused skip-norm", "behind": "behind the sum"}
_FEWEST_FOLDED = 3  # fewer rows are shown as they are


def _folded(sites: Sequence[ResidualSite], full: bool) -> Iterator[tuple[str, ResidualSite | None]]:
    """`(layer, site)` to be shown; `None` stands for the middle of a run of layers that are alike but for their names."""
    for _, members in groupby(sites, key=lambda site: (site.kind, bool(site.value), site.dtype)):
        run = list(members)
        if full or len(run) - 2 < _FEWEST_FOLDED:
            yield from ((str(site.layer_index), site) for site in run)
        else:
            first, *hidden, last = run
            yield str(first.layer_index), first
            yield f"{hidden[0].layer_index} to {hidden[-1].layer_index}", None
            yield str(last.layer_index), last


def _site_cells(site: ResidualSite) -> tuple[str, str, str]:
    return (
        _WRITTEN[site.kind],
        escape(site.value) or f"inside the fused node that makes {escape(site.anchor)}",
        site.dtype,
    )


def show_plan(out: Console, plan: GuardPlan) -> None:
    held = ", gate held from the prompt" if plan.gate == "prompt" else ""
    table = Table(title=f"plan: {plan.mode}, positions {plan.positions}, lowering {plan.lowering}{held}")
    separation = {one.layer: f"{one.auc:.2f}{'!' if one.at_chance else ''}" for one in plan.separation}
    for column in ("layer", "kind", "at", "rank", "tau", "alpha", *(("AUC",) if separation else ())):
        table.add_column(column, overflow="fold")
    for planned in plan.sites:
        shown = planned.to_json(plan.mode)
        numbers = [f"{shown[key]:.4g}" if key in shown else "-" for key in ("tau", "alpha")]
        if separation:
            numbers.append(separation.get(planned.layer_index, "-"))
        row = (str(planned.layer_index), planned.site.kind, escape(planned.site.anchor), str(planned.guard.rank))
        table.add_row(*row, *numbers)
    out.print(table)
    for note in (plan.lowering_reason, *plan.notes):
        out.print(f"  - {escape(note)}", highlight=False)


def show_checks(out: Console, checks: Sequence[Check], title: str) -> None:
    table = Table(title=escape(title))
    for column in ("check", "compared", "worst", "limit", "holds"):
        table.add_column(column, overflow="fold")
    for check in checks:
        verdict = "[green]yes[/green]" if check.ok else "[red]NO[/red]"
        table.add_row(escape(check.name), f"{check.compared:,}", f"{check.worst:.1e}", f"{check.limit:.0e}", verdict)
    out.print(table)
    for check in checks:
        if check.note:
            out.print(f"  - {escape(check.name)}: {escape(check.note)}", highlight=False)


def show_proof(out: Console, checks: Sequence[Check], what: str, verbose: bool) -> None:
    """Print `PROVED 9/9` on one line, and with `verbose` or after a failure a table of the checks.

    Args:
        out: the console.
        checks: the checks of one graph or folder.
        what: name of the graph or folder.
        verbose: print the table in any case.
    """
    held = sum(check.ok for check in checks)
    whole = held == len(checks) > 0
    if verbose or not whole:
        show_checks(out, checks, f"proof of {what}")
    verdict = "[bold green]PROVED[/bold green]" if whole else "[bold red]NOT PROVED[/bold red]"
    more = "" if verbose or not whole else " (-v shows each check)"
    out.print(f"{verdict} {held}/{len(checks)}: {escape(what)}{more}", highlight=False, soft_wrap=True)


def show_parity(out: Console, parity: Sequence[Check]) -> None:
    """Print the difference between exported graphs and the checkpoint in torch, on one line; nothing without a comparison."""
    if parity:
        worst = max(parity, key=lambda check: check.worst / check.limit)
        out.print(
            f"torch against ONNX: {worst.worst:.1e} of the largest value at most ({escape(worst.name)}), allowed "
            f"{worst.limit:.0e}; {sum(check.compared for check in parity):,} values compared",
            highlight=False,
            soft_wrap=True,
        )


def show_next(out: Console, command: str) -> None:
    """Print the next command on one line, to paste into a shell."""
    out.print(f"next: {escape(command)}", highlight=False, soft_wrap=True)


def next_after_export(result: ExportResult, model: str, convert_options: Sequence[str] = ()) -> str:
    """The command that shows what a new guard does.

    Args:
        result: of the export.
        model: the unguarded model as the user named it; a checkpoint has to become ONNX before it can be compared with.
        convert_options: options that the checkpoint was exported with.
    """
    base, guarded = shlex.quote(model), shlex.quote(str(result.out))
    convert = ""
    if is_checkpoint(model):
        base = shlex.quote(f"{Path(model).name}-onnx")
        convert = " ".join(["vlmguard convert", shlex.quote(model), base, *map(shlex.quote, convert_options), "&& "])
    if result.proved.level == "structure":
        return f"{convert}vlmguard verify {guarded} --run --source {base}"
    if (result.out / "tokenizer.json").is_file():
        return f"{convert}vlmguard evaluate {base} {guarded}"
    return f"{convert}vlmguard verify {guarded} --source {base}"


def next_after_directions(
    model: str, output: Path, calibrated: bool, anchors: Sequence[str] | None, variant: str | None
) -> str:
    """The command that guards a model along extracted directions.

    Args:
        model: as the user named it.
        output: the directions file; a calibration wrote a config beside it.
        calibrated: whether there is such a config.
        anchors: as the user named them; without, those that were found or the built-in ones are taken again.
        variant: as the user named it.
    """
    words = ["vlmguard-export", model]
    if calibrated:
        words += ["--config", str(output.with_suffix(".toml"))]
    else:
        words += ["--mode", "restore", "--directions", str(output)]
        words += [word for source in anchors or ("builtin",) for word in ("--anchors", source)]
    if variant is not None and not is_checkpoint(model):
        words += ["--variant", variant]
    return shlex.join(words)


def next_after_evaluation(base: Path, guarded: Path, variant: str | None = None) -> str:
    """The command that shows the same in pictures, or checks the folder where the page cannot be drawn."""
    if find_spec("plotly") is None:
        return shlex.join(["vlmguard", "verify", str(guarded), "--source", str(base)])
    chosen = ["--variant", variant] if variant is not None else []
    return shlex.join(["vlmguard", "report", str(guarded), "--source", str(base), *chosen])


def show_export(out: Console, result: ExportResult, verbose: bool = False) -> None:
    show_plan(out, result.plan)
    show_found(out, result.found)
    if result.calibration is not None:
        guarded = result.calibration.guarded
        out.print(
            f"calibrated on {len(result.calibration.prompts)} prompts: harmful refused at least {guarded.worst('harmful'):.1%} "
            f"(unguarded {result.calibration.base.worst('harmful'):.1%}), harmless at most {guarded.worst('harmless'):.1%}, "
            "in any setting"
        )
        _show_held_out(out, result.calibration.held_out)
    if result.refusals is not None:
        out.print(
            f"harmful prompts refused, {escape(str(result.refusals.prompts))}: {result.refusals}", highlight=False
        )
        if result.refusals.no_effect:
            out.print(
                f"[bold]no effect[/bold] on {result.refusals.counted} harmful prompts, allowed with --allow-no-effect"
            )
    if result.variants:
        show_variants(out, result.variants)
    if not result.written:
        out.print(f"dry run: nothing was written to {escape(str(result.out))}")
        return
    show_parity(out, result.parity)
    for decoder in result.decoders:
        show_proof(out, decoder.proof, decoder.path, verbose)
    out.print(f"proof: {result.proved.level}, {result.proved.why}", highlight=False, soft_wrap=True)
    out.print(f"[bold]guarded[/bold]: {escape(str(result.out))}", highlight=False, soft_wrap=True)


def _show_held_out(out: Console, held: HeldOut) -> None:
    """The winner and its controls on prompts that no choice was made on."""
    table = Table(title="held-out prompts, refused in the worst setting")
    for column in ("who", "harmful", "harmless"):
        table.add_column(column, overflow="fold")
    rows = (("unguarded", held.base), ("guarded", held.guarded), *((c.name, c.tally) for c in held.controls))
    for name, result in rows:
        table.add_row(name, f"{result.worst('harmful'):.1%}", f"{result.worst('harmless'):.1%}")
    out.print(table)


def show_engines(out: Console, result: EngineResult, guarded: Path) -> None:
    """Print the engines, their layer counts, and the layers of the guard.

    Args:
        out: the console.
        result: the built engines.
        guarded: the folder that the engines were built from.
    """
    table = Table(title=f"engines by {result.manifest.engines[0].backend} {result.manifest.engines[0].version}")
    for column in ("engine", "profile", "layers", "kernels", "guard nodes by decoder layer"):
        table.add_column(column, overflow="fold")
    for engine in result.manifest.engines:
        for profile, found in zip(engine.profiles, engine.layers["profiles"], strict=True):
            guard = ", ".join(f"{layer}: {nodes}" for layer, nodes in found["guard_nodes"].items()) or "-"
            counts = str(found["layers"]), str(found["kernels"])
            table.add_row(escape(engine.path), escape(profile["name"]), *counts, guard)
    out.print(table)
    for name, warnings in result.warnings.items():
        for warning in warnings:
            out.print(f"  - {escape(name)}: {escape(' '.join(warning.split()))}", highlight=False)
    out.print(f"[bold]guarded[/bold]: {escape(str(result.out))}")
    if result.manifest.proved != "full":
        out.print("the engines were not run here; run the next command on the GPU that they are for", highlight=False)
        show_next(out, f"vlmguard verify {shlex.quote(str(result.out))} --run --source {shlex.quote(str(guarded))}")


def show_packaged(out: Console, result: Packaged, verbose: bool = False) -> None:
    """Print the packaged folder, its proof, and the next command."""
    what = f"{result.out}: {result.manifest.plan['mode']}, layout {result.manifest.layout}"
    show_proof(out, result.proof.checks, what, verbose)
    out.print(f"[bold]guarded[/bold]: {escape(str(result.out))}", highlight=False, soft_wrap=True)
    if result.manifest.layout == "triton":
        show_next(out, f"tritonserver --model-repository={shlex.quote(str(result.out))}")


def show_scores(out: Console, answer: ScoredAnswer) -> None:
    """Print the gates' scores during an answer, layer by layer."""
    calls = len(answer.scores)
    table = Table(title="gates, held from the prompt" if answer.held else "gates, decided at every token")
    for column in ("layer", "threshold", "score at the prompt", "highest in the answer", f"open at {calls} tokens"):
        table.add_column(column, justify="right", overflow="fold")
    for row, (layer, threshold) in enumerate(zip(answer.layers, answer.thresholds, strict=True)):
        scores = answer.scores[:, row]
        highest = f"{scores[1:].max():.3f}" if calls > 1 else "-"
        shown = (f"{threshold:.3f}", f"{scores[0]:.3f}", highest, str(int(answer.opened[:, row].sum())))
        table.add_row(str(layer), *shown)
    out.print(table)


PROGRESS_SECONDS = "VLMGUARD_PROGRESS_SECONDS"
_LINE_EVERY = 10.0  # seconds
_STEP = re.compile(r"\(\d+/\d+\)")


@contextmanager
def bars(err: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on a terminal, one per stage, gone when done.

    Where stderr is a file or a pipe: a line with the stage every `_LINE_EVERY` seconds, so that a log shows how far a long
    command is, and a short one prints nothing. A numbered step, "exporting (1/3) ...", takes a minute: it prints its line at
    once. The variable `VLMGUARD_PROGRESS_SECONDS` sets another interval, 0 none.
    """
    between = _seconds_between_lines()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
    tasks: dict[str, TaskID] = {}
    printed = time.monotonic()

    def report_progress(stage: str, done: int, total: int) -> None:
        nonlocal printed
        if not err.is_terminal:
            if between and _STEP.search(stage):
                err.print(escape(stage), highlight=False, soft_wrap=True)
            elif between and time.monotonic() - printed >= between:
                printed = time.monotonic()
                err.print(f"{escape(stage)}: {done} of {total}", highlight=False, soft_wrap=True)
            return
        if stage not in tasks:
            progress.start()  # not before there is something to show: an idle display leaves an empty line behind
            tasks[stage] = progress.add_task(stage, total=total)
        progress.update(tasks[stage], completed=done, total=total)

    try:
        yield report_progress
    finally:
        if tasks:
            progress.stop()


def _seconds_between_lines() -> float:
    given = os.environ.get(PROGRESS_SECONDS)
    try:
        between = _LINE_EVERY if given is None else float(given)
    except ValueError:
        between = -1.0
    if not 0 <= between < math.inf:
        raise GuardError(f"{PROGRESS_SECONDS} is {given!r}; set it to a number of seconds, or to 0 for no lines")
    return between


def show_directions(out: Console, found: Directions, name: str) -> None:
    table = Table(
        title=f"{escape(name)}: {len(found.layers)} layers of width {found.width}, {found.pairs} anchor pairs"
    )
    for column in ("layer", "rank", "mean along row 1", "std", "AUC", "explained by row 1"):
        table.add_column(column, justify="right", overflow="fold")
    for number, layer in found.layers.items():
        seen = found.evidence[str(number)]
        figures = (seen["mean"], seen["std"], seen["auc"])
        numbers = (*(_figure(value, ".3f") for value in figures), _figure(seen["explained"][0], ".0%"))
        table.add_row(str(number), str(layer.ssd.shape[0]), *numbers)
    out.print(table)


def _figure(value: float | None, form: str) -> str:
    """A number of a file; `null` stands for one that is not finite."""
    return "-" if value is None else format(value, form)
