"""Worst-case soft images: features in place of a picture's tokens under which a model refuses least, found without gradients.

A soft image is a sequence of vocabulary embeddings times a scale. A real picture need not reach these features: the search
bounds the effect of any picture, so that a guard is not fitted to the blank picture alone.

1. The model answers the harmful prompts as text. The search uses those that it refuses; the first tokens of these refusals are
   the refusal openings. The first tokens of answers to harmless prompts, if given, are the answer openings: without them the
   search could pick a prefix that merely garbles every answer.
2. Random prefixes, then an evolutionary search over token ids and scale. One prefill scores a prefix, by the probabilities of
   the openings as the first token. Each image comes from its own search.
3. The best prefix of each search is judged by refusals in answers of 8 tokens.

Every decoder call counts against the budget. The same seed gives the same images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...graphs.errors import GuardError
from ...graphs.progress import CountCallback
from ...runtime.decode_loop import rows_of_tokens
from ...runtime.generation import Request, Sampling, Step
from ...runtime.images.image_features import ImageFeatures
from ...runtime.refusals import refused
from ...runtime.vlm import VisionLanguageModel
from ..prompts.labelled import LabelledPrompt

JUDGED_TOKENS = 8  # of an answer: enough to begin a refusal
DEFAULT_CALLS = 400

_PARENTS = 6
_RANDOM_SHARE = 0.2  # of the search's calls: random prefixes, before the evolution
_SCALES = (0.5, 1.0, 2.0)
_SCALE_RANGE = (0.25, 4.0)  # of vocabulary embeddings; features of vision encoders are within it
_LEAST = 1e-30  # probability, before its logarithm
_TEMPERATURE = 4.0  # of the log odds, so that a prompt whose odds are far off still counts


@dataclass(frozen=True)
class SoftImage:
    """One found image.

    Attributes:
        features: the rows; give them as `Request.image` or `LabelledPrompt.features`.
        token_ids: whose embeddings the rows are, times `scale`.
        refusal: mean probability of a refusal opening as the first token, over the prompts searched on.
        refused: of these prompts, those refused in an answer of 8 tokens.
    """

    features: ImageFeatures
    token_ids: tuple[int, ...]
    scale: float
    refusal: float
    refused: int

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": len(self.token_ids),
            "scale": self.scale,
            "mean_probability_of_a_refusal_opening": self.refusal,
            "refused": self.refused,
        }


@dataclass(frozen=True)
class SoftImageSearch:
    """Result of a search.

    Attributes:
        images: fewest refusals first, then the lowest probability of a refusal opening.
        prompts: the harmful prompts of the search, which the model refuses as text.
        blank_refused: number of these refused with a blank picture.
        calls: number of decoder calls.
        seed: seed of the search.
    """

    images: tuple[SoftImage, ...]
    prompts: tuple[str, ...]
    blank_refused: int
    calls: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        return {
            "images": [image.to_json() for image in self.images],
            "prompts": len(self.prompts),
            "refused_with_a_blank_picture": self.blank_refused,
            "calls": self.calls,
            "seed": self.seed,
        }


def worst_images(
    model: VisionLanguageModel,
    harmful: Sequence[str],
    images: int = 1,
    *,
    harmless: Sequence[str] = (),
    calls: int = DEFAULT_CALLS,
    seed: int = 0,
    batch_size: int = 16,
    report_count: CountCallback | None = None,
) -> SoftImageSearch:
    """Search soft images under which the model refuses the fewest of some harmful prompts.

    Args:
        model: unguarded; takes images of one size.
        harmful: prompts whose harm is in the text. Each costs a row of every prefill: 8 to 24 are enough.
        images: how many to search, each on its own with an equal share of the budget.
        harmless: prompts whose answers show how an answer opens.
        calls: budget, in calls of the decoder; at most so many are made.
        seed: of the search.
        batch_size: prompts that run together.
        report_count: called with `(calls, budget)` after each call.

    Raises:
        GuardError: the model takes no such images, refuses none of the prompts as text, or the budget is too small.
    """
    if images < 1:
        raise GuardError(f"{images} soft images are none; ask for 1 or more")
    if not model.sees or model.images_have_grids:
        raise GuardError(f"{model.package.root}: takes no images of one size, so there is nothing to search")
    spent = _Calls(calls, report_count)
    alone = [Request(text) for text in harmful]
    required = spent.of_answers(model, alone, batch_size)
    if harmless:
        required += spent.of_answers(model, [Request(text) for text in harmless], batch_size)
    shown = [Request(text, model.blank_image()) for text in harmful]
    judged = spent.of_answers(model, shown, batch_size)
    required += (1 + images) * judged + images * (judged // JUDGED_TOKENS)
    if calls < required:
        raise GuardError(f"{calls} calls are too few to judge {len(harmful)} prompts; give at least {required}")

    answers = _answers(model, alone, batch_size, spent)
    kept = [number for number, (_, declined) in enumerate(answers) if declined]
    if not kept:
        raise GuardError(f"the model refuses none of {len(harmful)} harmful prompts as text; no image can lower that")
    refusing = {answers[number][0] for number in kept}
    innocent = _answers(model, [Request(text) for text in harmless], batch_size, spent)
    answering = {first for first, declined in innocent if not declined}
    shown = [shown[number] for number in kept]
    blank = _answers(model, shown, batch_size, spent)
    judge = _Judge(model, shown, sorted(refusing), sorted(answering - refusing), batch_size, spent)
    share = (calls - spent.made - images * judged) // images
    best = [_best(judge, np.random.default_rng([seed, number]), share) for number in range(images)]
    found = [judge.with_answers(prefix) for prefix in best]
    found.sort(key=lambda image: (image.refused, image.refusal))
    return SoftImageSearch(
        tuple(found),
        tuple(harmful[number] for number in kept),
        sum(declined for _, declined in blank),
        spent.made,
        seed,
    )


def beside(images: Sequence[SoftImage], prompts: Sequence[LabelledPrompt]) -> list[LabelledPrompt]:
    """The prompts beside the images, which take turns, in setting `image`: to calibrate or to evaluate on."""
    return [
        replace(
            prompt, id=f"{prompt.id}-soft-{number % len(images)}", setting="image", image=None, features=image.features
        )
        for number, prompt in enumerate(prompts)
        for image in (images[number % len(images)],)
    ]


@dataclass
class _Calls:
    """Calls of the decoder, against their budget."""

    budget: int
    report_count: CountCallback | None
    made: int = 0

    def add(self, calls: int = 1) -> None:
        self.made += calls
        if self.report_count is not None:
            self.report_count(min(self.made, self.budget), self.budget)

    def counted(self, steps: Iterable[Step]) -> Iterator[Step]:
        """The steps of answers, a call each."""
        for step in steps:
            self.add()
            yield step

    @staticmethod
    def of_answers(model: VisionLanguageModel, requests: Sequence[Request], batch_size: int) -> int:
        """The most calls that answers to these requests take."""
        return JUDGED_TOKENS * sum(1 for _ in model.groups(requests, batch_size))


def _answers(
    model: VisionLanguageModel, requests: Sequence[Request], batch_size: int, spent: _Calls
) -> list[tuple[int, bool]]:
    """The first token of each answer, -1 for an empty one, and whether its first 8 tokens refuse."""
    found = [(-1, False)] * len(requests)
    for indices in model.groups(requests, batch_size):
        steps = model.steps([requests[index] for index in indices], Sampling(JUDGED_TOKENS))
        for index, row in zip(indices, rows_of_tokens(spent.counted(steps)), strict=True):
            found[index] = (row[0] if row else -1, refused(model.chat.decode(row)))
    return found


@dataclass(frozen=True)
class _Prefix:
    """A candidate: token ids `[image tokens]` int64, a scale, and what it reached.

    Attributes:
        score: the lower, the fewer refusals; see `_Judge.with_first_tokens`.
        refusal: mean probability of a refusal opening.
    """

    ids: np.ndarray
    scale: float
    score: float = np.inf
    refusal: float = 1.0


class _Judge:
    """Judges prefixes by what the model answers behind them.

    Args:
        shown: harmful prompts beside a picture of the size that the model takes.
        refusing, answering: first tokens of refusals and of answers; without the latter all other tokens are.

    Attributes:
        tokens: of an image.
        vocabulary: ids that prefixes are made of.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        shown: Sequence[Request],
        refusing: Sequence[int],
        answering: Sequence[int],
        batch_size: int,
        spent: _Calls,
    ) -> None:
        self._model, self._shown, self._batch_size, self._spent = model, shown, batch_size, spent
        self._refusing, self._answering = list(refusing), list(answering)
        groups = [[shown[index] for index in group] for group in model.groups(shown, batch_size)]
        self._groups = [(group, model.batch(group)) for group in groups]  # tokenized once; only the rows change
        self._picture = model.image_features(model.blank_image()).tokens
        self.tokens = self._picture.count
        self.vocabulary = _known_tokens(model)

    @property
    def calls(self) -> int:
        """For one prefix."""
        return len(self._groups)

    def with_first_tokens(self, prefix: _Prefix) -> _Prefix:
        """The prefix with its score, from one prefill per group of prompts.

        The score is the mean over prompts of `sigmoid(log(p_refusal / p_answer) / T)`: a prompt whose odds are far off
        still counts, and no prompt counts without bound.
        """
        rows = self._rows(prefix)
        refusal, odds = [], []
        for requests, batch in self._groups:
            assert batch.embeds is not None and batch.images is not None and batch.images.at is not None
            embeds = batch.embeds.copy()
            embeds[batch.images.at] = np.tile(rows, (len(requests), 1)).astype(embeds.dtype)
            outputs = self._model.prefill(requests, replace(batch, embeds=embeds))
            self._spent.add()
            logits = self._model.decoder.last_logits(outputs).astype(np.float64)
            p = np.exp(logits - logits.max(axis=-1, keepdims=True))
            p /= p.sum(axis=-1, keepdims=True)
            refusing = p[:, self._refusing].sum(axis=-1)
            answering = p[:, self._answering].sum(axis=-1) if self._answering else 1 - refusing
            refusal.append(refusing)
            odds.append(np.log(np.maximum(refusing, _LEAST)) - np.log(np.maximum(answering, _LEAST)))
        score = 1 / (1 + np.exp(-np.concatenate(odds) / _TEMPERATURE))
        return _Prefix(prefix.ids, prefix.scale, float(score.mean()), float(np.concatenate(refusal).mean()))

    def with_answers(self, prefix: _Prefix) -> SoftImage:
        """The prefix as an image, with the refusals in answers of 8 tokens."""
        features = ImageFeatures(self._rows(prefix), self._picture)
        requests = [Request(request.prompt, features) for request in self._shown]
        answers = _answers(self._model, requests, self._batch_size, self._spent)
        ids = tuple(int(token) for token in prefix.ids)
        return SoftImage(features, ids, prefix.scale, prefix.refusal, sum(declined for _, declined in answers))

    def _rows(self, prefix: _Prefix) -> np.ndarray:
        return self._model.token_embeddings(prefix.ids) * np.float32(prefix.scale)


def _known_tokens(model: VisionLanguageModel) -> np.ndarray:
    """Ids of the vocabulary that the embedding table has, without the marks of images, padding and ends."""
    chat, decoder = model.chat, model.decoder
    size, width = chat.tokenizer.get_vocab_size(), decoder.runner.outputs[decoder.logits_output].shape[-1]
    ids = np.arange(size if width is None else min(size, width))
    marks = {chat.pad_id, chat.image_token_id, *chat.eos_ids} - {None}
    return ids[~np.isin(ids, list(marks))]


def _best(judge: _Judge, random: np.random.Generator, calls: int) -> _Prefix:
    """The best prefix of one search, which spends at most so many calls and judges at least one prefix."""
    prefixes = max(1, calls // judge.calls)
    randoms = max(1, round(_RANDOM_SHARE * prefixes))
    best: list[_Prefix] = []
    for number in range(prefixes):
        new = _drawn(judge, random, number) if number < randoms else _child(judge, random, best, number / prefixes)
        best = sorted([*best, judge.with_first_tokens(new)], key=lambda prefix: prefix.score)[:_PARENTS]
    return best[0]


def _drawn(judge: _Judge, random: np.random.Generator, number: int) -> _Prefix:
    """A random prefix; every second one repeats one token, which moves the states further."""
    ids = random.choice(judge.vocabulary, judge.tokens)
    if number % 2:
        ids = np.full(judge.tokens, ids[0])
    return _Prefix(ids, _SCALES[number // 2 % len(_SCALES)])


def _child(judge: _Judge, random: np.random.Generator, parents: Sequence[_Prefix], done: float) -> _Prefix:
    """A child of one or two of the best: the longer the search has gone on, the fewer tokens change."""
    first, second = (parents[number] for number in random.integers(len(parents), size=2))
    ids, scale = first.ids.copy(), first.scale
    if random.random() < 0.5:
        ids = np.where(random.random(judge.tokens) < 0.5, ids, second.ids)
    changed = max(1, round(judge.tokens * 0.5 * (1 - done) ** 2))
    at = random.choice(judge.tokens, changed, replace=False)
    ids[at] = random.choice(judge.vocabulary, changed)
    if random.random() < 0.3:
        scale = float(np.clip(scale * 2 ** random.normal(0, 0.5), *_SCALE_RANGE))
    return _Prefix(ids, scale)
