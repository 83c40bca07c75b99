"""Asking mode `align` with any layers and rank in one decoder session, beside the unguarded model.

The guard edits the prompt's last token alone. So everything before that token is computed once per batch, and each guard
continues from there: the unguarded model (no supervisor), the guarded one (the text-only coordinates), any candidate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...graphs.anatomy import DecoderAnatomy
from ...graphs.directions import Directions, LayerDirections
from ...graphs.spec import GuardSpec
from ...graphs.taps import STATES_OUTPUT
from ...runtime.decode_loop import decode, rows_of_tokens
from ...runtime.decoder_inputs import DecoderState, PromptBatch
from ...runtime.generation import Request
from ...runtime.refusals import refused
from ...runtime.vlm import VisionLanguageModel
from .trials import TrialModel

_MEMORY = 256 << 20  # bytes for the caches and logits of a batch
_COPIES = 3  # of a cache: what every guard continues from, what goes in, what comes out
_FEWEST, _MOST = 2, 24  # prompts


@dataclass(frozen=True)
class Answer:
    """One greedy answer, up to the requested length.

    Attributes:
        tokens: its token ids, without the one that ends it.
        refused: whether it declines the request.
    """

    tokens: tuple[int, ...]
    refused: bool


@dataclass(frozen=True)
class Asked:
    """A batch's answers under one guard.

    Attributes:
        answers: one per request.
        states: every layer's state at the prompt's end, `[requests, layers, d]` float32.
        coordinates: of these states along the guard's directions, `[requests, layers, m]` float32.
        first: logits of each answer's first token, `[requests, vocabulary]` float32.
    """

    answers: list[Answer]
    states: np.ndarray
    coordinates: np.ndarray
    first: np.ndarray


@dataclass(frozen=True)
class Guarding:
    """The guard of one batch.

    Attributes:
        directions: of a candidate.
        supervisor: the text-only coordinates `[requests, layers, m]`; `None` leaves the model unguarded.
    """

    directions: Directions
    supervisor: np.ndarray | None = None


@dataclass(frozen=True)
class Begun:
    """A batch whose prompts are computed up to their last token.

    Attributes:
        trial: of the model.
        batch: the whole prompts.
        state: of the decoder; `None` where it takes prompts as a whole.
    """

    trial: AlignTrial
    batch: PromptBatch
    state: DecoderState | None

    @property
    def size(self) -> int:
        """Bytes that are held."""
        cache = [] if self.state is None else self.state.cache.values()
        embeds = 0 if self.batch.embeds is None else self.batch.embeds.nbytes
        return embeds + sum(np.asarray(value).nbytes for value in cache)

    def answer(self, guard: Guarding, tokens: int) -> Asked:
        """Go on under one guard; may be called again for another.

        Args:
            guard: at the prompts' last token.
            tokens: longest answer.
        """
        return self.trial.answer(self, guard, tokens)


class AlignTrial:
    """A model that is opened once, guarded at every layer that may be chosen.

    Args:
        model: unguarded.
        anatomy: of its decoder.
        directions: the SSD of each layer that may be chosen, `rank` rows or more.
        rank: the highest that may be chosen.

    Raises:
        GuardError: the decoder cannot be guarded.
    """

    def __init__(self, model: VisionLanguageModel, anatomy: DecoderAnatomy, directions: Directions, rank: int) -> None:
        spec, layers = GuardSpec(mode="align"), tuple(sorted(directions.layers))
        self._trial = TrialModel(model, anatomy, directions, spec, layers, rank, tapped=True)
        self.neutral = aligned_directions(directions, layers[:1], 1)  # any candidate: it runs without a supervisor
        self._candidate: tuple[Directions, Mapping[str, np.ndarray]] | None = None  # the last one's numbers
        self.model = self._trial.model

    def batch_size(self, requests: Sequence[Request]) -> int:
        """Number of these requests per batch, so that their KV caches and logits stay small compared to a decoder."""
        session = self.model.decoder
        tokens = self.model.batch(requests[:1]).ids.shape[1]
        cache = sum(_bytes(port.shape[1:], port.dtype) for port in session.cache_inputs.values())
        logits = session.runner.outputs[session.logits_output]
        rows = 1 if len(logits.shape) < 3 or logits.shape[1] == 1 else tokens
        each = _COPIES * tokens * cache + rows * _bytes(logits.shape[-1:], logits.dtype)
        return max(_FEWEST, min(_MOST, _MEMORY // max(each, 1)))

    def begin(self, requests: Sequence[Request]) -> Begun:
        """One batch, computed up to each prompt's last token.

        Args:
            requests: as many as fit in one batch (`VisionLanguageModel.groups`).
        """
        session, batch = self.model.decoder, self.model.batch(requests)
        if not session.cache_inputs or session.call_length is not None or batch.ids.shape[1] < 2:
            return Begun(self, batch, None)
        embeds = None if batch.embeds is None else batch.embeds[:, :-1]
        head = replace(batch, ids=batch.ids[:, :-1], mask=batch.mask[:, :-1], embeds=embeds)
        return Begun(self, batch, session.prefill(head, session.no_supervisor(batch.size))[1])

    def answer(self, begun: Begun, guard: Guarding, tokens: int) -> Asked:
        """The result of `Begun.answer`."""
        session, batch = self.model.decoder, begun.batch
        nothing = session.no_supervisor(batch.size)
        supervisor = nothing if guard.supervisor is None else guard.supervisor
        with self._trial.guarded(self._fed(guard.directions)):
            if begun.state is None:
                outputs, state = session.prefill(batch, supervisor)
            else:
                start = begun.state
                state = replace(
                    start, cache=dict(start.cache), runtime_controls=dict(start.runtime_controls), supervisor=supervisor
                )
                embeds = None if batch.embeds is None else batch.embeds[:, -1:]
                outputs = session.step(state, batch.ids[:, -1:], embeds)
            state.supervisor = nothing
            states = np.asarray(outputs[STATES_OUTPUT])
            coordinates = np.asarray(session.coordinates(outputs))
            first = session.last_logits(outputs)
            answers = self._answered(outputs, state, tokens)
        return Asked(answers, states, coordinates, first)

    def _answered(self, outputs: Mapping[str, np.ndarray], state: DecoderState, tokens: int) -> list[Answer]:
        """Greedy answers from the outputs of the prompts' end on; no token of an answer is edited."""
        model = self.model
        steps = decode(model.decoder, outputs, state, _likeliest, model.step_embeds, model.chat.eos_ids, tokens)
        return [Answer(tuple(row), refused(model.chat.decode(row))) for row in rows_of_tokens(steps)]

    def _fed(self, directions: Directions) -> Mapping[str, np.ndarray]:
        if self._candidate is None or self._candidate[0] is not directions:
            self._candidate = directions, self._trial.numbers(directions)
        return self._candidate[1]


def _likeliest(logits: np.ndarray) -> np.ndarray:
    """The next tokens; a candidate whose arithmetic overflows is judged by its answers like every other."""
    return logits.argmax(axis=-1)


def _bytes(shape: Sequence[int | None], dtype: np.dtype) -> int:
    """Of an array of this shape; sizes that are open count once."""
    return math.prod(size or 1 for size in shape) * dtype.itemsize


def aligned_directions(directions: Directions, layers: Sequence[int], rank: int) -> Directions:
    """The directions cut to a rank, for mode `align` on chosen layers."""
    cut = {number: LayerDirections(layer.ssd[:rank]) for number, layer in directions.layers.items()}
    return replace(directions, layers=cut, mode="align", recommended_layers=tuple(layers))
