"""Requests to a model, sampling of tokens, and results: steps and pieces of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..graphs.errors import GuardError, RunFailed
from ..graphs.runtime_controls import SCORES_OUTPUT
from .chat.turns import Turn
from .defaults import MAX_NEW_TOKENS
from .images.image_features import Shown


@dataclass(frozen=True)
class Request:
    """One prompt, with an optional image and conversation.

    Attributes:
        prompt: the user's text.
        image: path, Pillow image, uint8 array, bytes of an image file, or image features; several as a list or tuple; `None`
            for text only.
        history: earlier turns of the conversation. They have the first pictures (`Turn.pictures`), the prompt has the others.
        pieces: the prompt's texts and pictures in their order, as `Turn.pieces`; empty: the pictures in front of the text.
    """

    prompt: str
    image: Shown | Sequence[Shown] | None = None
    history: tuple[Turn, ...] = ()
    pieces: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise GuardError(f"the prompt is of type {type(self.prompt).__name__}; give text")
        if not self.prompt.strip():
            raise GuardError("the prompt is empty; write something")
        if isinstance(self.image, list | tuple) and not self.image:
            object.__setattr__(self, "image", None)
        earlier = sum(turn.pictures for turn in self.history)
        if earlier > len(self.images):
            raise GuardError(
                f"the request has {_images(len(self.images))}, and its earlier turns show {earlier}; give one for each"
            )
        if self.pieces:
            asked = self.turns[-1]
            if (asked.text, asked.pictures) != (self.prompt, len(self.images) - earlier):
                raise GuardError(
                    "the request's pieces are not its prompt and its images; give the same texts and images"
                )

    @property
    def images(self) -> tuple[Shown, ...]:
        """All pictures, in the order of the turns."""
        if self.image is None:
            return ()
        return tuple(self.image) if isinstance(self.image, list | tuple) else (self.image,)  # type: ignore[return-value]

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The whole conversation, the question last."""
        if self.pieces:
            return (*self.history, Turn.of_pieces("user", self.pieces))
        earlier = sum(turn.pictures for turn in self.history)
        return (*self.history, Turn("user", self.prompt, len(self.images) - earlier))

    @property
    def text_only(self) -> Request:
        """The same words without the images."""
        return Request(self.prompt, None, tuple(turn.text_only for turn in self.history))


def _images(number: int) -> str:
    return {0: "no image", 1: "one image"}.get(number, f"{number} images")


@dataclass(frozen=True)
class Sampling:
    """Choice of the next token.

    Attributes:
        max_new_tokens: where to stop at the latest.
        temperature: 0 takes the likeliest token (greedy); above, softmax(logits / temperature) is sampled.
        top_p: only the likeliest tokens that together reach this probability are sampled.
        seed: of the sampling; the same seed gives the same answer.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise GuardError(f"max_new_tokens {self.max_new_tokens} is below 1; choose 1 or more")
        if not self.temperature >= 0 or not np.isfinite(self.temperature):
            raise GuardError(f"temperature {self.temperature} is out of range; choose 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise GuardError(f"top_p {self.top_p} is out of range; choose above 0, up to 1")
        if self.seed < 0:
            raise GuardError(f"seed {self.seed} is negative; choose 0 or more")


GREEDY = Sampling()


@dataclass(frozen=True)
class Step:
    """One step of a batch's generation.

    Attributes:
        tokens: each row's next token, `None` once the row has ended.
        outputs: what the decoder gave for the token before it (at the first step: for the prompt).
    """

    tokens: list[int | None]
    outputs: Mapping[str, np.ndarray]

    @property
    def gate_scores(self) -> np.ndarray | None:
        """Each guarded layer's gate score at that token, `[batch, layers]` float32; `None` without telemetry."""
        return self.outputs.get(SCORES_OUTPUT)


@dataclass(frozen=True)
class Piece:
    """Text that one step adds to an answer.

    Attributes:
        text: text to show; empty while a character is incomplete.
        step: the step of the generation, for a batch of one.
        finish: why the answer ends here: `stop` (the model ended it) or `length` (`max_new_tokens`); `None` while it continues.
    """

    text: str
    step: Step
    finish: Literal["stop", "length"] | None


Choose = Callable[[np.ndarray], np.ndarray]  # logits [batch, vocabulary] float32 -> next tokens [batch]


class Chooser:
    """Chooses tokens `[batch]` from logits `[batch, vocabulary]` with the given sampling."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        # minus infinity rules a token out; plus infinity and NaN are what an overflow leaves
        if not np.isfinite(logits).any(axis=-1).all() or not (logits < np.inf).all():
            raise RunFailed("the decoder gave NaN logits; its arithmetic overflows, export it in fp32, bf16 or w16a32")
        if self.sampling.temperature == 0:
            return logits.argmax(axis=-1)
        below = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        with np.errstate(over="ignore"):  # after the difference, because 0 / 1e-300 is still 0
            probabilities = np.exp(below / self.sampling.temperature)
        probabilities /= probabilities.sum(axis=-1, keepdims=True)
        return np.array([self._draw(row) for row in probabilities])

    def _draw(self, probabilities: np.ndarray) -> int:
        order = np.argsort(-probabilities)
        before = np.cumsum(probabilities[order]) - probabilities[order]
        kept = order[before < self.sampling.top_p]
        return int(self._random.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))
