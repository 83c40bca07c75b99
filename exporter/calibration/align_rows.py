"""Prompts for many guards: prefilled up to their last token once, as far as memory allows.

Mode `align` edits only the last token of the prompt, so every candidate continues from the same KV cache. First tokens are
compared by their distribution over the likeliest tokens of the reference, because a full row of logits can take a megabyte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...runtime.generation import Request
from .align_trial import AlignTrial, Asked, Begun, Guarding

_MEMORY = 256 << 20  # bytes of key/value caches that are kept, for all prompts of a judgement
_LIKELIEST = 64  # tokens


@dataclass
class Room:
    """Memory for kept prompts, shared by several `Prompts`."""

    left: int = field(default_factory=lambda: _MEMORY)

    def takes(self, size: int) -> bool:
        """Whether `size` bytes fit; they are counted as used."""
        if size > self.left:
            return False
        self.left -= size
        return True


@dataclass
class Prompts:
    """Requests in batches, each computed up to its last token when it is first needed.

    Attributes:
        trial: of the model.
        requests: in the caller's order.
        room: for what is kept.
    """

    trial: AlignTrial
    requests: Sequence[Request]
    room: Room
    _kept: dict[int, Begun] = field(default_factory=dict)

    def batches(self) -> Iterator[tuple[list[int], Begun]]:
        """Indices of the requests of each batch, and the batch."""
        for number, indices in enumerate(self.trial.model.groups(self.requests, self.trial.batch_size(self.requests))):
            begun = self._kept.get(number) or self.trial.begin([self.requests[index] for index in indices])
            if number not in self._kept and self.room.takes(begun.size):
                self._kept[number] = begun
            yield indices, begun

    def unguarded(self, tokens: int, report_done: Callable[[int], None]) -> list[Reference]:
        """The unguarded model on each request, in order.

        Args:
            tokens: longest answer.
            report_done: called with the number of requests answered so far.
        """
        found: dict[int, Reference] = {}
        for indices, begun in self.batches():
            asked = begun.answer(Guarding(self.trial.neutral), tokens)
            found |= {index: Reference.of(asked, row) for row, index in enumerate(indices)}
            report_done(len(found))
        return [found[index] for index in range(len(found))]


@dataclass(frozen=True)
class FirstToken:
    """The distribution of an answer's first token over the likeliest tokens of a reference.

    Attributes:
        tokens: ids, `[64]` int64 or fewer, the likeliest first.
        logits: of these, float64.
        log_total: logarithm of the sum of all exponentials.
    """

    tokens: np.ndarray
    logits: np.ndarray
    log_total: float

    @classmethod
    def of(cls, logits: np.ndarray, tokens: np.ndarray | None = None) -> FirstToken:
        """Of a row of logits `[vocabulary]`, at the given tokens or at its own likeliest ones."""
        row = logits.astype(np.float64)
        if tokens is None:
            count = min(_LIKELIEST, len(row))
            tokens = np.argpartition(row, -count)[-count:]
            tokens = tokens[np.argsort(-row[tokens], kind="stable")]
        highest = float(row.max())
        return cls(tokens, row[tokens], highest + float(np.log(np.exp(row - highest).sum())))

    @property
    def probability(self) -> float:
        """Of the likeliest token."""
        return float(np.exp(self.logits[0] - self.log_total))

    def distance(self, logits: np.ndarray) -> float:
        """Total variation between this distribution and that of a row of logits, 0 to 1; the rarer tokens count as one."""
        other = FirstToken.of(logits, self.tokens)
        p, q = np.exp(self.logits - self.log_total), np.exp(other.logits - other.log_total)
        return float(np.abs(p - q).sum() + abs(p.sum() - q.sum())) / 2

    def differs(self, logits: np.ndarray, tolerance: float) -> bool:
        """Whether a logit of a likely token differs by more than `tolerance`, relative to the largest magnitude."""
        other = logits[self.tokens].astype(np.float64)
        possible = np.isfinite(self.logits) & np.isfinite(other)
        scale = max(float(np.abs(self.logits[possible]).max(initial=0.0)), 1e-6)
        return float(np.abs(self.logits - other)[possible].max(initial=0.0)) > tolerance * scale


@dataclass(frozen=True)
class Reference:
    """The unguarded model's answer to one prompt.

    Attributes:
        tokens: token ids of the answer.
        refused: whether it declines.
        first: distribution of its first token.
        states: at the prompt's end, `[layers, d]` float32.
    """

    tokens: tuple[int, ...]
    refused: bool
    first: FirstToken
    states: np.ndarray

    def clearly_refused(self, confidence: float) -> bool:
        """Whether it declines, and its first token has at least this probability."""
        return self.refused and self.first.probability >= confidence

    @classmethod
    def of(cls, asked: Asked, row: int) -> Reference:
        """One row of an unguarded batch."""
        answer = asked.answers[row]
        return cls(answer.tokens, answer.refused, FirstToken.of(asked.first[row]), asked.states[row])
