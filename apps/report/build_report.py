"""`report`: one page about a guarded folder, in one screen.

guarded folder ──► both sides ──► states ──► plane, separation, gates ──┐
       prompts ──► chosen ──────► answers ──► yardstick, rates, sweep ──┴──► data ──► figures ──► page
"""

from __future__ import annotations

from pathlib import Path

from ...exporter.evaluation.evaluate import evaluate
from ...graphs.clock import now
from ...graphs.directions import Directions
from ...graphs.errors import OutputRefused
from ...graphs.progress import ProgressCallback, ignore_progress
from ...graphs.staging import require_writable_file, write_file
from ...graphs.whole_numbers import whole_number
from ...runtime.defaults import MAX_NEW_TOKENS
from .cost import cost_of
from .data import ReportData, both_labels, layer_points
from .gates import gate_scores
from .outcomes import mistakes_of, rates_of
from .page import make_page
from .plotly_js import require_plotly
from .questions import choose_prompts
from .score_separation import separations
from .states import read_states
from .subject import open_subject
from .sweep import sweep_alpha

MAX_PROMPTS = 40  # of each setting and label


def report(
    guarded: Path | str,
    output: Path | str,
    *,
    prompts: Path | str | None = None,
    source: Path | str | None = None,
    variant: str | None = None,
    image: Path | str | None = None,
    max_prompts: int = MAX_PROMPTS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 16,
    engine: Path | str | None = None,
    benchmark: Path | str | None = None,
    force: bool = False,
    report_progress: ProgressCallback = ignore_progress,
) -> ReportData:
    """Measure a guarded folder and write the page.

    Args:
        guarded: a folder of graphs that `vlmguard-export` wrote.
        output: the page; one file that needs nothing else.
        prompts: labelled, held-out prompts; default: `evaluation.jsonl` found beside the source or the folder.
        source: the unguarded model; default: the guard is taken out of the shipped graph in memory.
        variant: precision variant of the decoder, guarded and unguarded; `None`: the one that runs.
        image: a picture to show with every text prompt, in place of the pictures that the prompts name.
        max_prompts: of each setting and label.
        max_new_tokens: longest answer.
        batch_size: prompts that run together.
        engine: TensorRT engines built from the folder, for the cost table.
        benchmark: a result file of `benchmarks/inference.py`, for the cost table.
        force: replace the output.
        report_progress: called with `(stage, done, total)`.

    Raises:
        GuardError: anything wrong with the request or its files; nothing was written.
    """
    output = Path(output).absolute()
    require_plotly()  # before minutes of work
    when = _now()
    _require_writable(output, Path(guarded).absolute(), force)
    subject = open_subject(guarded, source, variant)
    file, chosen = choose_prompts(
        subject, Path(prompts) if prompts is not None else None, Path(image) if image is not None else None, max_prompts
    )
    cost = cost_of(
        subject, Path(engine) if engine is not None else None, Path(benchmark) if benchmark is not None else None
    )
    layers = tuple(sorted({site.layer_index for site in subject.anatomy.sites}))
    drawn = both_labels(chosen)
    states = read_states(subject, drawn, batch_size, lambda done, total: report_progress("reading states", done, total))
    answers = evaluate(
        subject.unguarded,
        subject.guarded,
        chosen,
        max_new_tokens,
        batch_size,
        lambda done, total: report_progress("asking both models", done, total),
    )
    sweep = sweep_alpha(
        subject,
        chosen,
        max_new_tokens,
        batch_size,
        lambda done, total: report_progress("trying strengths", done, total),
    )
    data = ReportData(
        name=subject.folder.name
        if variant is None
        else f"{subject.folder.name}, {subject.guarded.package.decoder.name}",
        prompts_file=file.name,
        prompts=tuple(chosen),
        max_new_tokens=max_new_tokens,
        manifest=subject.manifest,
        layers=layers,
        points=tuple(layer_points(states, drawn, layers)),
        separations=tuple(separations(states, drawn, subject.directions, layers)),
        gates=tuple(gate_scores(states, drawn, subject.plan)),
        yardstick=answers.yardstick,
        rates=tuple(rates_of(answers)),
        mistakes=tuple(mistakes_of(answers)),
        sweep=tuple(sweep),
        cost=cost,
        anchors_auc=_anchors_auc(subject.directions),
        found={} if prompts is not None else {"prompts": file.absolute()},
    )
    write_file(output, make_page(data, when).encode())
    return data


def _require_writable(output: Path, guarded: Path, force: bool) -> None:
    folder = guarded.resolve()
    if folder in (output.resolve(), *output.resolve().parents):
        raise OutputRefused(f"{output}: lies in the guarded folder, which nothing may change; choose a file beside it")
    if output.is_dir():
        raise OutputRefused(f"{output}: is a folder; choose a file for the page, such as report.html")
    require_writable_file(output, force)


def _anchors_auc(directions: Directions) -> dict[int, float]:
    """The extraction's record; a directions file from another source may have none."""
    found = {}
    for layer, seen in directions.evidence.items():
        value = seen.get("auc") if isinstance(seen, dict) else None
        number = whole_number(layer)
        if number is not None and isinstance(value, int | float) and 0 <= value <= 1:
            found[number] = float(value)
    return dict(sorted(found.items()))


def _now() -> str:
    """The current time, or that of SOURCE_DATE_EPOCH for reproducible builds."""
    return now().strftime("%Y-%m-%d %H:%M UTC")
