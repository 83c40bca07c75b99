"""Evaluates a guard: runs the same prompts through the unguarded and the guarded model and compares the answers.

1. Choose held-out prompts and their settings (`prompt_settings`, `overlaps`).
2. Batch by batch, here or on a cluster (`executors`): both models answer; judges, drift and gates are recorded
(`batch_runner`). The
   unguarded model also answers prompts without their image, once per text: this text-only model is the yardstick.
3. Keep a record per prompt, on request in a file from which a killed run resumes (`records`).
4. Compute the figures with their intervals (`yardstick`, `metrics`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...graphs.digests import sha256_file
from ...graphs.errors import PromptsUnusable
from ...graphs.graph_io import external_files
from ...graphs.manifest import MANIFEST_NAME
from ...graphs.progress import CountCallback, ProgressCallback, ignore_progress
from ...runtime.defaults import MAX_NEW_TOKENS
from ...runtime.generation import Sampling
from ...runtime.guarded import GuardedVLM
from ...runtime.refusals import refused
from ...runtime.vlm import VisionLanguageModel
from ..cluster import open_executors
from ..executors import Executor, in_turn
from ..prompts.labelled import BUILTIN, LabelledPrompt, Sources, find_file, fingerprint, listed
from ..prompts.overlaps import require_held_out_of
from ..sources import open_model, require_unmarked
from .batch_runner import AskBoth, Asking, Gates, compares_first_tokens, open_gates, shard_of
from .judge_model import GuardModel
from .metrics import KEYWORDS, Evaluation, Tally, count
from .prompt_settings import shown_prompts
from .records import Record, RecordFile, digest_of

EVALUATION_FILES = ("evaluation.jsonl", "evaluation.json", "evaluation.csv")


def compare(
    base: Path | str,
    guarded: Path | str,
    prompts: Sources | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 32,
    report_progress: ProgressCallback = ignore_progress,
    *,
    variant: str | None = None,
    images: Sequence[Path | str] = (),
    judge_model: Path | str | None = None,
    out: Path | str | None = None,
    keep_answers: bool = False,
    read_gates: bool = True,
    seed: int = 0,
    ray: str | None = None,
    ray_workers: int | None = None,
) -> Evaluation:
    """Evaluate an unguarded and a guarded model on the same prompts.

    Args:
        base: the unguarded model.
        guarded: the guarded folder.
        prompts: sources of labelled prompts; default: found beside the base, else the built-in held-out prompts.
        max_new_tokens: longest answer.
        batch_size: prompts per call.
        report_progress: called with `(stage, done, total)`.
        variant: precision variant of both models' decoders, which are in onnx-community folders; `None`: those that run.
        images: pictures to show with prompts whose source has none.
        judge_model: a checkpoint folder of a LlamaGuard-style model, as a second judge.
        out: a file of JSON lines, one per prompt; a killed run resumes from it.
        keep_answers: keep the answers in `out` too, including the unguarded model's answers to harmful prompts.
        read_gates: read the gates, which opens the guarded decoder a second time.
        seed: seed of the confidence intervals.
        ray, ray_workers: Ray cluster that runs the prompts (`cluster.cluster`), with bit-identical results; default: this
            process.

    Raises:
        GuardError: a model, the judge or the prompts cannot be opened; a prompt was used for extraction or calibration; `out`
            belongs to another evaluation.
    """
    require_unmarked(base)
    unguarded, vlm = open_model(base, variant), GuardedVLM.open(guarded, variant=variant)
    beside = find_file(unguarded.package.root, EVALUATION_FILES) if prompts is None else None
    sources = prompts if prompts is not None else beside or BUILTIN
    title = ", ".join(listed(sources))
    rows = shown_prompts(sources, images)
    require_held_out_of(vlm.package.root, vlm.manifest, title, rows, "evaluate")
    if not unguarded.sees:
        rows = [row for row in rows if row.setting == "text"]
        if not rows:
            raise PromptsUnusable(f"{title}: holds no prompt in setting text, and {base} takes no images; add some")
    asking = AskBoth(
        Path(base).absolute(),
        Path(guarded).absolute(),
        Path(judge_model).absolute() if judge_model is not None else None,
        max_new_tokens,
        read_gates,
        keep_answers,
        variant,
    )
    judge = asking.open_judge()
    settings = {
        "prompts": digest_of(*(f"{row.id} {row.setting} {row.label} {fingerprint(row)}" for row in rows)),
        "count": len(rows),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "judge": judge.identity if judge is not None else None,
        "gates": read_gates,
        "answers": keep_answers,
        **({"variant": variant} if variant is not None else {}),
    }
    file = RecordFile(out, _identity(unguarded, vlm) | settings) if out is not None else None
    gates, unread = open_gates(vlm) if read_gates else (None, "not requested")
    with open_executors(ray, ray_workers) as executors, _reported(file, len(rows)):
        return evaluate(
            unguarded,
            vlm,
            rows,
            max_new_tokens,
            batch_size,
            lambda done, total: report_progress("asking both models", done, total),
            gates=gates,
            gates_unread=unread,
            judge=judge,
            file=file,
            keep_answers=keep_answers,
            same_source=_same_source(unguarded, vlm),
            seed=seed,
            executor=executors(asking),
            found={"prompts": beside} if beside is not None else {},
        )


def tally(
    model: VisionLanguageModel,
    prompts: Sequence[LabelledPrompt],
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 32,
    report_count: CountCallback | None = None,
) -> Tally:
    """Run all prompts through one model (greedy) and count refusals.

    Args:
        model: the model.
        prompts: labelled prompts.
        max_new_tokens: longest answer.
        batch_size: prompts per call.
        report_count: called with `(done, total)` after each batch.
    """
    requests = [prompt.request(model) for prompt in prompts]
    answers = [""] * len(requests)
    done = 0
    for indices in model.groups(requests, batch_size):
        replies = model.answer([requests[index] for index in indices], Sampling(max_new_tokens), len(indices))
        for index, reply in zip(indices, replies, strict=True):
            answers[index] = reply
        done += len(indices)
        if report_count is not None:
            report_count(done, len(requests))
    refusals = tuple(refused(answer) for answer in answers)
    return Tally(count(prompts, refusals), tuple(answers), refusals)


def evaluate(
    base: VisionLanguageModel,
    guarded: VisionLanguageModel,
    prompts: Sequence[LabelledPrompt],
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 32,
    report_count: CountCallback | None = None,
    *,
    gates: Gates | None = None,
    gates_unread: str | None = None,
    judge: GuardModel | None = None,
    file: RecordFile | None = None,
    keep_answers: bool = False,
    same_source: bool | None = None,
    seed: int = 0,
    executor: Executor = in_turn,
    found: Mapping[str, Path] | None = None,
) -> Evaluation:
    """Run the same prompts through the unguarded and the guarded model; prompts recorded in `file` are not run again.

    Args:
        base: the unguarded model.
        guarded: the guarded model.
        prompts: labelled prompts.
        max_new_tokens: longest answer.
        batch_size: prompts per call.
        report_count: called with `(done, total)`; each prompt counts once per model.
        gates: the guarded model with gate outputs; `None`: do not read the gates.
        gates_unread: why the gates are not read.
        judge: a second judge beside the keywords.
        file: records of earlier runs; new ones are added.
        keep_answers: keep the answers in the records.
        same_source: as in `Evaluation`.
        seed: seed of the confidence intervals.
        executor: runs the batches; the caller ensures that its workers open the same models.
        found: as in `Evaluation`.
    """
    requests = [prompt.request(base) for prompt in prompts]
    records = dict(file.found) if file is not None else {}
    answers: dict[int, tuple[str, str]] = {}
    # Batches are always those of the whole set: another batch would have other padding, and so other rounding.
    batches = list((base if base.pads else guarded).groups(requests, batch_size))
    text_only = _texts_to_ask(prompts)
    missing = [
        indices
        for indices in batches
        if not all(_is_complete(records.get(index), index in text_only) for index in indices)
    ]
    both, done = 2 * len(prompts), 0

    def add_done(count: int) -> None:
        nonlocal done
        done += count
        if report_count is not None:
            report_count(done, both)

    if len(missing) < len(batches):
        add_done(2 * (len(prompts) - sum(map(len, missing))))
    work = Asking(base, guarded, max_new_tokens, gates, judge, keep_answers, halfway=add_done)
    shards = (shard_of(indices, prompts, requests, text_only) for indices in missing)
    for indices, batch in zip(missing, executor(work, shards), strict=True):
        if file is not None:
            file.add(batch.records)
        records |= {record.number: record for record in batch.records}
        answers |= dict(zip(indices, batch.answers, strict=True))
        add_done(2 * len(indices) - batch.reported)
    return Evaluation(
        tuple(prompts),
        tuple(_recalled(records[index], answers.get(index)) for index in range(len(prompts))),
        (KEYWORDS, *((judge.name,) if judge is not None else ())),
        gates_unread if gates is None else None,
        same_source,
        seed,
        found or {},
    )


def _texts_to_ask(prompts: Sequence[LabelledPrompt]) -> frozenset[int]:
    """Indices of the prompts to run without their image too: the first of each text that has no `text` prompt.

    Prompts whose harm is only in the picture are excluded, because their text is harmless.
    """
    asked = {prompt.prompt for prompt in prompts if prompt.setting == "text"}
    first: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        if prompt.prompt not in asked and prompt.has_text_twin:
            first.setdefault(prompt.prompt, index)
    return frozenset(first.values())


def _is_complete(record: Record | None, text_only: bool) -> bool:
    """Whether a record holds all that is measured; an earlier version's may lack the text-only comparison, and more."""
    if record is None or (text_only and record.text_only is None):
        return False
    if record.base.degenerate is None or record.guarded.degenerate is None:
        return False
    return record.first_token is not None or not compares_first_tokens(record.setting, record.label)


def _recalled(record: Record, answers: tuple[str, str] | None) -> Record:
    """With the answers of this run, whether the file keeps them or not."""
    if answers is None:
        return record
    base, guarded = (
        reply.model_copy(update={"answer": answer})
        for reply, answer in zip((record.base, record.guarded), answers, strict=True)
    )
    return record.model_copy(update={"base": base, "guarded": guarded})


@contextlib.contextmanager
def _reported(file: RecordFile | None, prompts: int) -> Iterator[None]:
    """An interrupt carries a sentence on what is recorded."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if file is None:
            stop.add_note("nothing was kept; with --out FILE a run records each prompt and can resume")
        else:
            stop.add_note(
                f"{len(file.found)} of {prompts} prompts are recorded in {file.path}; run the same command again to resume"
            )
        raise


# Models


def _identity(base: VisionLanguageModel, vlm: GuardedVLM) -> dict[str, Any]:
    """Identity of both models: digest and weight sizes of the unguarded decoder, digest of the guarded folder's manifest."""
    weights = {path.name: path.stat().st_size for path in external_files(base.package.decoder)}
    return {
        "base": sha256_file(base.package.decoder),
        "base_weights": weights,
        "guarded": sha256_file(vlm.package.root / MANIFEST_NAME),
    }


def _same_source(base: VisionLanguageModel, vlm: GuardedVLM) -> bool:
    """Whether the decoder that was guarded is the one it is compared with."""
    source = vlm.manifest.decoders[0].source
    return source.get("sha256") == sha256_file(base.package.decoder)
