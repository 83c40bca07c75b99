"""Runs one batch of prompts through both models, in this process or in a worker that opens the same models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from ...graphs.gate_taps import tap_gates
from ...graphs.layouts import open_package
from ...graphs.manifest import MANIFEST_NAME, read_manifest
from ...runtime.generation import Request
from ...runtime.guarded import GuardedVLM
from ...runtime.images.image_features import ImageFeatures
from ...runtime.images.open_picture import Picture, open_image
from ...runtime.refusals import refused
from ...runtime.vlm import VisionLanguageModel
from ..extraction.kept_states import model_files
from ..prompts.labelled import LabelledPrompt
from ..sources import open_model
from .degenerate import is_degenerate
from .judge_model import GuardModel
from .logprobs import Said, ask, first_tokens, kl_divergence, log_likelihoods
from .records import Drift, FirstToken, Record, Reply, digest_of


@dataclass(frozen=True)
class Gates:
    """The guarded model with its gates as outputs.

    Attributes:
        model: the model with the graph of `tap_gates`; used only for its gates, because it is not the shipped file.
        outputs: guarded layer to output name.
    """

    model: VisionLanguageModel
    outputs: Mapping[int, str]

    def read(self, requests: Sequence[Request]) -> list[dict[str, bool]]:
        """Per request of one batch: by layer, whether the gate is open at the last token of the prompt."""
        found = self.model.prefill(requests)
        opened = {layer: found[name].reshape(len(requests), -1)[:, -1] > 0 for layer, name in self.outputs.items()}
        return [{str(layer): bool(column[row]) for layer, column in opened.items()} for row in range(len(requests))]


def open_gates(vlm: GuardedVLM) -> tuple[Gates | None, str | None]:
    """The gates of a guarded folder, or why they cannot be read."""
    if vlm.manifest.engines:
        return None, "engines do not show their gates"
    graph = vlm.package.load_decoder()
    outputs = tap_gates(graph, vlm.manifest.decoders[0].report)
    if not outputs:
        return None, f"mode {vlm.manifest.plan['mode']} has no gate"
    return Gates(vlm.with_decoder(graph), outputs), None


@dataclass(frozen=True)
class Shard:
    """One batch of prompts, with opened pictures.

    Attributes:
        numbers: indices of the prompts in the set.
        prompts, requests: the prompts and the requests made of them.
        text_rows: rows that the unguarded model also answers without the image.
    """

    numbers: tuple[int, ...]
    prompts: tuple[LabelledPrompt, ...]
    requests: tuple[Request, ...]
    text_rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Made:
    """Results of one batch.

    Attributes:
        records: one per prompt.
        answers: per prompt, of the unguarded and of the guarded model.
        reported: number of prompts already counted as progress while the batch ran.
    """

    records: list[Record]
    answers: list[tuple[str, str]]
    reported: int = 0


@dataclass(frozen=True)
class Asking:
    """Both models, the gates and the judge, open: from one batch to what came of it.

    Attributes:
        halfway: called with the number of prompts that one of the models has answered; `None` in another process.
    """

    base: VisionLanguageModel
    guarded: VisionLanguageModel
    max_new_tokens: int
    gates: Gates | None
    judge: GuardModel | None
    keep_answers: bool
    halfway: Callable[[int], None] | None = None

    def __call__(self, shard: Shard) -> Made:
        before = ask(self.base, shard.requests, self.max_new_tokens)
        if self.halfway is not None:
            self.halfway(len(before))
        after = ask(self.guarded, shard.requests, self.max_new_tokens)
        made = _records(shard.numbers, shard.prompts, before, after, self.judge, self.keep_answers)
        made = _with_drift(made, shard.requests, before, after, self.guarded)
        made = self._with_text_only(made, shard)
        made = _with_first_tokens(made, shard.requests, before, after, self.base)
        if self.gates is not None:
            read = self.gates.read(shard.requests)
            made = [record.model_copy(update={"gates": gates}) for record, gates in zip(made, read, strict=True)]
        answers = [(b.answer, a.answer) for b, a in zip(before, after, strict=True)]
        return Made(made, answers, len(before) if self.halfway is not None else 0)

    def _with_text_only(self, records: Sequence[Record], shard: Shard) -> list[Record]:
        """With the unguarded model's replies to the words alone, in the batch's `text_rows`."""
        found = list(records)
        if shard.text_rows:
            said = ask(self.base, [shard.requests[row].text_only for row in shard.text_rows], self.max_new_tokens)
            replies = _replies([shard.prompts[row] for row in shard.text_rows], said, None, self.keep_answers)
            for row, reply in zip(shard.text_rows, replies, strict=True):
                found[row] = found[row].model_copy(update={"text_only": reply})
        return found


@dataclass(frozen=True)
class AskBoth:
    """Opens the models of an evaluation in another process; paths are absolute, `variant` is of both decoders."""

    base: Path
    guarded: Path
    judge: Path | None
    max_new_tokens: int
    read_gates: bool
    keep_answers: bool
    variant: str | None = None

    def files(self) -> list[Path]:
        manifest = read_manifest(self.guarded)
        files = [*model_files(open_package(self.base, self.variant)), self.guarded / MANIFEST_NAME]
        files += [self.guarded / name for name in manifest.files]
        return files + ([path for path in sorted(self.judge.iterdir()) if path.is_file()] if self.judge else [])

    def open(self) -> Asking:
        vlm = GuardedVLM.open(self.guarded, variant=self.variant)
        gates = open_gates(vlm)[0] if self.read_gates else None
        return Asking(
            open_model(self.base, self.variant), vlm, self.max_new_tokens, gates, self.open_judge(), self.keep_answers
        )

    def open_judge(self) -> GuardModel | None:
        return GuardModel(self.judge) if self.judge is not None else None


def shard_of(
    indices: Sequence[int],
    prompts: Sequence[LabelledPrompt],
    requests: Sequence[Request],
    text_only: frozenset[int] = frozenset(),
) -> Shard:
    """The batch with the given indices, with its pictures opened.

    Args:
        indices: indices of the batch's prompts in the set.
        prompts, requests: of the whole set.
        text_only: indices of prompts that also run without their image.
    """
    asked = (requests[index] for index in indices)
    seen = (replace(r, image=[_opened(image) for image in r.images]) if r.images else r for r in asked)
    text_rows = tuple(row for row, index in enumerate(indices) if index in text_only)
    return Shard(tuple(indices), tuple(prompts[index] for index in indices), tuple(seen), text_rows)


def _opened(image: Picture | ImageFeatures) -> Image.Image | ImageFeatures:
    """A picture, decoded; rows as they are."""
    return image if isinstance(image, ImageFeatures) else open_image(image)


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
            degenerate=is_degenerate(one.answer, one.tokens),
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
    guarded_likelihoods = {row: after[row].log_likelihood for row in texts}
    changed = [row for row in texts if before[row].tokens != after[row].tokens]  # the same words are just as likely
    if changed:
        requests, answers = [asked[row] for row in changed], [before[row].tokens for row in changed]
        guarded_likelihoods |= dict(zip(changed, log_likelihoods(guarded, requests, answers), strict=True))
    drifts = {
        row: Drift(
            first_token_kl=kl_divergence(before[row].first, after[row].first),
            tokens=len(before[row].tokens),
            base_log_likelihood=before[row].log_likelihood,
            guarded_log_likelihood=guarded_likelihoods[row],
        )
        for row in texts
    }
    return [record.model_copy(update={"drift": drifts.get(row)}) for row, record in enumerate(records)]


def _with_first_tokens(
    records: Sequence[Record],
    asked: Sequence[Request],
    before: Sequence[Said],
    after: Sequence[Said],
    base: VisionLanguageModel,
) -> list[Record]:
    """With the first tokens' divergences, of the batch's harmless prompts with an image."""
    found = list(records)
    rows = [row for row, record in enumerate(records) if compares_first_tokens(record.setting, record.label)]
    if rows:
        texts = first_tokens(base, [asked[row].text_only for row in rows])
        for row, text in zip(rows, texts, strict=True):
            first = after[row].first
            kl = FirstToken(unguarded=kl_divergence(before[row].first, first), text_only=kl_divergence(text, first))
            found[row] = found[row].model_copy(update={"first_token": kl})
    return found


def compares_first_tokens(setting: str, label: str) -> bool:
    """Whether a prompt's record has `first_token`."""
    return setting != "text" and label == "harmless"
