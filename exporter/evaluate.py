"""Does the guard work? The same prompts to the unguarded and to the guarded model, and what each did with them.

1. The prompts, in their settings, none of which an earlier step has used (`evaluation_prompts`, `overlaps`).
2. Batch by batch: both models answer (`answers`); judges, drift and gates (`judge`, `judge_model`, `gate_taps`).
3. A record per prompt, on request in a file that a killed run goes on with (`evaluation_records`).
4. The figures, with their intervals (`evaluation`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..graphs.digests import sha256_file
from ..graphs.directions import DIRECTIONS_FILE, read_directions
from ..graphs.errors import PromptsUnusable
from ..graphs.gate_taps import tap_gates
from ..graphs.manifest import MANIFEST_NAME
from ..graphs.package import external_files
from ..runtime.guarded import GuardedVLM
from ..runtime.vlm import Request, Sampling, VisionLanguageModel
from .answers import Said, ask, kl_divergence, log_likelihoods
from .evaluation import KEYWORDS, Cell, Evaluation, Tally, count
from .evaluation_prompts import shown_prompts
from .evaluation_records import Drift, Record, RecordFile, Reply, digest_of
from .extract import Progress
from .judge import refused
from .judge_model import GuardModel
from .overlaps import require_held_out
from .prompts import BUILTIN, LabelledPrompt, Sources, find_file, fingerprint, listed
from .sources import Watch, open_model, unwatched

__all__ = ["Cell", "Evaluation", "Tally", "compare", "evaluate", "tally"]

EVALUATION_FILES = ("evaluation.jsonl", "evaluation.json", "evaluation.csv")
ENOUGH_TOKENS = 100  # refusals can come late; fewer are for models that say little, and for tests


@dataclass(frozen=True)
class Gates:
    """The guarded model with its gates as outputs.

    Attributes:
        model: as `tap_gates` made it; not the file that ships, so it is asked for nothing but its gates.
        outputs: guarded layer to output name.
    """

    model: VisionLanguageModel
    outputs: Mapping[int, str]

    def read(self, requests: Sequence[Request]) -> list[dict[str, bool]]:
        """Per request of one batch: by layer, whether the gate is open at the last token of the prompt."""
        found = self.model.prefill(requests)
        opened = {layer: found[name].reshape(len(requests), -1)[:, -1] > 0 for layer, name in self.outputs.items()}
        return [{str(layer): bool(column[row]) for layer, column in opened.items()} for row in range(len(requests))]


def compare(
    base: Path | str,
    guarded: Path | str,
    prompts: Sources | None = None,
    max_new_tokens: int = ENOUGH_TOKENS,
    batch_size: int = 32,
    watch: Watch | None = None,
    *,
    images: Sequence[Path | str] = (),
    judge_model: Path | str | None = None,
    out: Path | str | None = None,
    keep_answers: bool = False,
    read_gates: bool = True,
    seed: int = 0,
) -> Evaluation:
    """An unguarded and a guarded model on the same prompts.

    Args:
        base: the unguarded model.
        guarded: the guarded folder.
        prompts: sources of labelled prompts; default: found beside the base, else the built-in held-out ones.
        max_new_tokens: of each answer.
        batch_size: prompts that run together.
        watch: told what is going on.
        images: pictures that matter, to show with prompts whose source names none.
        judge_model: a checkpoint folder of a LlamaGuard-style model, as a second judge.
        out: a file of JSON lines, one per prompt; a run that was killed goes on with it.
        keep_answers: keep the answers in `out` too, those of the unguarded model to harmful prompts included.
        read_gates: read the gates, which opens the guarded decoder a second time.
        seed: of the confidence intervals.

    Raises:
        GuardError: a model, the judge or the prompts cannot be opened; prompts that were extracted from or calibrated on;
            `out` is another evaluation's.
    """
    tell = watch or unwatched
    unguarded, vlm = open_model(base), GuardedVLM.open(guarded)
    sources = prompts if prompts is not None else find_file(unguarded.package.root, EVALUATION_FILES) or BUILTIN
    title = ", ".join(listed(sources))
    rows = shown_prompts(sources, images)
    _require_held_out(title, rows, vlm)
    if not unguarded.sees:
        rows = [row for row in rows if row.setting == "text"]
        if not rows:
            raise PromptsUnusable(f"{title}: holds no prompt in setting text, and {base} takes no images; add some")
    judge = GuardModel(judge_model) if judge_model is not None else None
    asked = {
        "prompts": digest_of(*(f"{row.id} {row.setting} {row.label} {fingerprint(row)}" for row in rows)),
        "count": len(rows),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "judge": judge.identity if judge is not None else None,
        "gates": read_gates,
        "answers": keep_answers,
    }
    file = RecordFile(out, _identity(unguarded, vlm) | asked) if out is not None else None
    gates, unread = _open_gates(vlm) if read_gates else (None, "not asked for")
    return evaluate(
        unguarded,
        vlm,
        rows,
        max_new_tokens,
        batch_size,
        lambda done, total: tell("asking both models", done, total),
        gates=gates,
        gates_unread=unread,
        judge=judge,
        file=file,
        keep_answers=keep_answers,
        same_source=_same_source(unguarded, vlm),
        seed=seed,
    )


def tally(
    model: VisionLanguageModel,
    prompts: Sequence[LabelledPrompt],
    max_new_tokens: int = ENOUGH_TOKENS,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Tally:
    """Ask one model every prompt (greedy) and count refusals."""
    requests = [prompt.request(model) for prompt in prompts]
    answers = [""] * len(requests)
    done = 0
    for indices in model.groups(requests, batch_size):
        replies = model.answer([requests[index] for index in indices], Sampling(max_new_tokens), len(indices))
        for index, said in zip(indices, replies, strict=True):
            answers[index] = said
        done += len(indices)
        if progress is not None:
            progress(done, len(requests))
    refusals = tuple(refused(answer) for answer in answers)
    return Tally(count(prompts, refusals), tuple(answers), refusals)


def evaluate(
    base: VisionLanguageModel,
    guarded: VisionLanguageModel,
    prompts: Sequence[LabelledPrompt],
    max_new_tokens: int = ENOUGH_TOKENS,
    batch_size: int = 32,
    progress: Progress | None = None,
    *,
    gates: Gates | None = None,
    gates_unread: str | None = None,
    judge: GuardModel | None = None,
    file: RecordFile | None = None,
    keep_answers: bool = False,
    same_source: bool | None = None,
    seed: int = 0,
) -> Evaluation:
    """The same prompts to the unguarded and to the guarded model; what `file` holds already is not asked again."""
    requests = [prompt.request(base) for prompt in prompts]
    records = dict(file.found) if file is not None else {}
    answers: dict[int, tuple[str, str]] = {}
    both, done = 2 * len(prompts), 0
    # Batches are those of the whole set, whatever is done already: another batch has other padding, and other roundings.
    for indices in (base if base.pads else guarded).groups(requests, batch_size):
        if not all(index in records for index in indices):
            asked = [requests[index] for index in indices]
            before = ask(base, asked, max_new_tokens)
            if progress is not None:
                progress(done + len(indices), both)
            after = ask(guarded, asked, max_new_tokens)
            batch = [prompts[index] for index in indices]
            made = _records(indices, batch, before, after, judge, keep_answers)
            made = _with_drift(made, asked, before, after, guarded)
            if gates is not None:
                made = [r.model_copy(update={"gates": g}) for r, g in zip(made, gates.read(asked), strict=True)]
            if file is not None:
                file.add(made)
            records |= {record.number: record for record in made}
            answers |= {i: (b.answer, a.answer) for i, b, a in zip(indices, before, after, strict=True)}
        done += 2 * len(indices)
        if progress is not None:
            progress(done, both)
    return Evaluation(
        tuple(prompts),
        tuple(_recalled(records[index], answers.get(index)) for index in range(len(prompts))),
        (KEYWORDS, *((judge.name,) if judge is not None else ())),
        gates_unread if gates is None else None,
        same_source,
        seed,
    )


# A batch


def _records(
    numbers: Sequence[int],
    prompts: Sequence[LabelledPrompt],
    before: Sequence[Said],
    after: Sequence[Said],
    judge: GuardModel | None,
    keep_answers: bool,
) -> list[Record]:
    replies = [_replies(prompts, said, judge, keep_answers) for said in (before, after)]
    return [
        Record(
            number=number,
            id=prompt.id,
            setting=prompt.setting,
            label=prompt.label,
            intent=prompt.intent,
            base=first,
            guarded=second,
        )
        for number, prompt, first, second in zip(numbers, prompts, *replies, strict=True)
    ]


def _replies(
    prompts: Sequence[LabelledPrompt], said: Sequence[Said], judge: GuardModel | None, keep_answers: bool
) -> list[Reply]:
    unsafe: list[bool | None] = [None] * len(said)
    if judge is not None:
        unsafe = [*judge.unsafe([prompt.prompt for prompt in prompts], [one.answer for one in said])]
    return [
        Reply(
            refused=refused(one.answer),
            unsafe=verdict,
            tokens=len(one.tokens),
            digest=digest_of(one.answer),
            answer=one.answer if keep_answers else None,
        )
        for one, verdict in zip(said, unsafe, strict=True)
    ]


def _with_drift(
    records: Sequence[Record],
    asked: Sequence[Request],
    before: Sequence[Said],
    after: Sequence[Said],
    guarded: VisionLanguageModel,
) -> list[Record]:
    """Drift of the harmless texts of a batch."""
    texts = [row for row, record in enumerate(records) if (record.setting, record.label) == ("text", "harmless")]
    told = {row: after[row].log_likelihood for row in texts}
    changed = [row for row in texts if before[row].tokens != after[row].tokens]  # the same words are just as likely
    if changed:
        requests, answers = [asked[row] for row in changed], [before[row].tokens for row in changed]
        told |= dict(zip(changed, log_likelihoods(guarded, requests, answers), strict=True))
    drifts = {
        row: Drift(
            first_token_kl=kl_divergence(before[row].first, after[row].first),
            tokens=len(before[row].tokens),
            base_log_likelihood=before[row].log_likelihood,
            guarded_log_likelihood=told[row],
        )
        for row in texts
    }
    return [record.model_copy(update={"drift": drifts.get(row)}) for row, record in enumerate(records)]


def _recalled(record: Record, answers: tuple[str, str] | None) -> Record:
    """With the answers of this run, whether the file keeps them or not."""
    if answers is None:
        return record
    base, guarded = (
        reply.model_copy(update={"answer": answer})
        for reply, answer in zip((record.base, record.guarded), answers, strict=True)
    )
    return record.model_copy(update={"base": base, "guarded": guarded})


# Models


def _open_gates(vlm: GuardedVLM) -> tuple[Gates | None, str | None]:
    """The gates of a guarded folder, or why they cannot be read."""
    if vlm.manifest.engines:
        return None, "engines do not show their gates"
    graph = vlm.package.load_decoder()
    outputs = tap_gates(graph, vlm.manifest.plan["layers"])
    if not outputs:
        return None, f"mode {vlm.manifest.plan['mode']} has no gate"
    return Gates(vlm.with_decoder(graph), outputs), None


def _require_held_out(title: str, rows: Sequence[LabelledPrompt], vlm: GuardedVLM) -> None:
    """Nothing that the guard was made from: neither its calibration prompts nor its anchors."""
    calibrated = (vlm.manifest.calibration or {}).get("prompt_fingerprints", ())
    require_held_out(title, rows, calibrated, "were calibrated on", "evaluate")
    file = vlm.package.root / DIRECTIONS_FILE
    anchors = (read_directions(file).anchors or {}) if file.is_file() else {}
    how = "are anchors that the directions were extracted from"
    require_held_out(title, rows, anchors.get("fingerprints", ()), how, "evaluate")


def _identity(base: VisionLanguageModel, vlm: GuardedVLM) -> dict[str, Any]:
    """Who was asked: a decoder by its graph's digest and its weights' sizes, a guarded folder by its manifest's."""
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
