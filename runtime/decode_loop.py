"""The loop that every answer comes from: choose a token per row, feed it, until every row has ended.

What differs between callers is a hook: which token follows (`choose`: sampling, measuring, forcing given tokens), and what the
caller does with each `Step`, between two calls of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import numpy as np

from .decoder import DecoderSession
from .decoder_inputs import DecoderState
from .generation import Choose, Step


def decode(
    session: DecoderSession,
    outputs: Mapping[str, np.ndarray],
    state: DecoderState,
    choose: Choose,
    embeddings: Callable[[np.ndarray], np.ndarray | None],
    ends: Collection[int],
    most: int,
) -> Iterator[Step]:
    """The steps of a batch's answers; the first one is about the prompt's own call.

    Args:
        session: the decoder.
        outputs, state: of the call with the prompts' last tokens; the state changes.
        choose: logits `[batch, vocabulary]` float32 -> next tokens `[batch]`. Rows that have ended are chosen for too.
        embeddings: tokens `[batch, 1]` -> their embeddings `[batch, 1, d]`, or `None` where the decoder takes tokens.
        ends: token ids that end an answer.
        most: longest answer, in tokens.
    """
    alive = np.ones(state.mask.shape[0], bool)
    for number in range(most):
        chosen = choose(session.last_logits(outputs))
        alive &= ~np.isin(chosen, list(ends))
        yield Step([int(token) if on else None for on, token in zip(alive, chosen, strict=True)], outputs)
        if not alive.any() or number + 1 == most:
            return
        column = chosen[:, None].astype(np.int64)
        outputs = session.step(state, column, embeddings(column))


def rows_of_tokens(steps: Iterable[Step]) -> list[list[int]]:
    """The answer of each row, without the token that ended it; no rows where there are no steps."""
    rows: list[list[int]] = []
    for number, step in enumerate(steps):
        if number == 0:
            rows = [[] for _ in step.tokens]
        for row, token in zip(rows, step.tokens, strict=True):
            if token is not None:
                row.append(token)
    return rows
