"""Runs one batch and measures its answers: text, distribution of the first token, log-likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...graphs.errors import GuardError
from ...runtime.decode_loop import rows_of_tokens
from ...runtime.generation import Choose, Chooser, Request, Sampling
from ...runtime.vlm import VisionLanguageModel


@dataclass(frozen=True)
class Said:
    """One greedy answer.

    Attributes:
        answer: as text.
        tokens: its token ids, without the one that ends it.
        first: log-probabilities of the first token, `[vocabulary]` float32, in nats.
        log_likelihood: of all tokens together, in nats.
    """

    answer: str
    tokens: tuple[int, ...]
    first: np.ndarray
    log_likelihood: float


def ask(model: VisionLanguageModel, requests: Sequence[Request], max_new_tokens: int) -> list[Said]:
    """One greedy answer per request; the requests must fit in one batch (`VisionLanguageModel.groups`)."""
    measure = _Measure(Chooser(Sampling(max_new_tokens)))
    tokens = _run(model, requests, max_new_tokens, measure)
    return [
        Said(
            model.chat.decode(row).strip(), tuple(row), measure.first[number], measure.log_likelihood(number, len(row))
        )
        for number, row in enumerate(tokens)
    ]


def first_tokens(model: VisionLanguageModel, requests: Sequence[Request]) -> np.ndarray:
    """Log-probabilities of each answer's first token, `[requests, vocabulary]` float32, in nats; one prefill."""
    measure = _Measure(Chooser(Sampling(1)))
    _run(model, requests, 1, measure)
    return measure.first


def log_likelihoods(
    model: VisionLanguageModel, requests: Sequence[Request], answers: Sequence[Sequence[int]]
) -> list[float]:
    """Log-likelihood of given answers in nats, computed with one token per call, as in generation.

    One call with the whole answer would differ: a guard that edits the last token of each call would edit one token of it.

    Args:
        model: the model.
        requests: the prompts.
        answers: token ids of each answer.
    """
    longest = max(map(len, answers), default=0)
    if longest == 0:
        return [0.0 for _ in answers]
    end = next(iter(model.chat.eos_ids), 0)
    script = np.array([[*row, *[end] * (longest - len(row))] for row in answers])
    step = iter(script.T)
    measure = _Measure(lambda logits: next(step))
    _run(model, requests, longest, measure)
    return [measure.log_likelihood(number, len(row)) for number, row in enumerate(answers)]


def kl_divergence(base: np.ndarray, other: np.ndarray) -> float:
    """`KL(base || other)` of two distributions over tokens, given as log-probabilities `[vocabulary]`; nats."""
    possible = np.isfinite(base)  # some models rule tokens out
    p, q = base[possible].astype(np.float64), other[possible].astype(np.float64)
    return max(0.0, float((np.exp(p) * (p - q)).sum()))  # below 0 only by rounding


class _Measure:
    """Chooses the given tokens, and keeps the first step's log-probabilities `[batch, vocabulary]` and each token's."""

    def __init__(self, choose: Choose) -> None:
        self._choose = choose
        self.first = np.zeros(0, np.float32)
        self._steps: list[np.ndarray] = []

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        chosen = self._choose(logits)
        if first := not self._steps:
            self.first = np.empty(logits.shape, np.float32)
        likelihoods = np.empty(len(logits))
        for row, token in enumerate(chosen):  # one row in float64 at a time: a batch has up to 2 MiB a row
            wide = logits[row].astype(np.float64)
            highest = wide.max()
            total = highest + np.log(np.exp(wide - highest).sum())
            likelihoods[row] = wide[token] - total
            if first:
                self.first[row] = wide - total
        self._steps.append(likelihoods)
        return chosen

    def log_likelihood(self, row: int, tokens: int) -> float:
        found = float(sum(step[row] for step in self._steps[:tokens]))
        if not np.isfinite(found):
            raise GuardError("the decoder gave NaN logits; its arithmetic overflows, export it in fp32, bf16 or w16a32")
        return found


def _run(
    model: VisionLanguageModel, requests: Sequence[Request], max_new_tokens: int, measure: _Measure
) -> list[list[int]]:
    """The tokens of each row."""
    return rows_of_tokens(model.steps(requests, Sampling(max_new_tokens), choose=measure))
