"""One answer, made in a thread of its own and read from the event loop.

The thread is what holds a place (`admission`): a place is free again when the computing has really ended, whatever became of
the client. It ends between two tokens at the latest; a prompt's own pass cannot be interrupted.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from ...graphs.errors import GuardError, RunFailed
from ...runtime.guarded import GuardedVLM
from .admission import stopping
from .chat_request import ChatRequest, too_long
from .http_errors import ApiError, ClientGone

Finish = Literal["stop", "length"]
Stopped = Literal["cancelled", "timeout", "shutdown"]


@dataclass
class Made:
    """Outcome of one answer, for metrics.

    Attributes:
        began: when the request arrived, in seconds of `time.monotonic`.
        prompt_tokens: of the conversation, its image included; 0 until it was read.
        token_times: when each token of the answer came.
        text: all of it, or as far as it came.
        finish: why it ended; `rejected`: its prompt was unfit, and no answer was begun; `error`: it failed.
        scores: what the gates compared at each step, `[layers]` float32; empty without telemetry.
    """

    began: float
    prompt_tokens: int = 0
    token_times: list[float] = field(default_factory=list)
    text: str = ""
    finish: Finish | Stopped | Literal["rejected", "error"] = "error"
    scores: list[np.ndarray] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.token_times)


@dataclass(frozen=True)
class Limits:
    """Of every answer: tokens of its prompt, and of prompt and answer together."""

    prompt_tokens: int
    context: int


class Answering:
    """One answer under way.

    Args:
        deadline: in seconds of `time.monotonic`.
        ended: called in the event loop when the thread is done.

    Attributes:
        made: what is known so far; complete once the thread is done.
    """

    def __init__(
        self,
        vlm: GuardedVLM,
        chat: ChatRequest,
        limits: Limits,
        began: float,
        deadline: float,
        ended: Callable[[Answering], None],
    ) -> None:
        self.made = Made(began)
        self._vlm, self._chat, self._limits, self._deadline = vlm, chat, limits, deadline
        self._ended = ended
        self._stopped: Stopped | None = None
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        # A daemon, so that a stopping process does not wait for a prompt that is still being read.
        threading.Thread(target=self._run, name="answer", daemon=True).start()

    def stop(self, why: Stopped) -> None:
        """End it before its next token. Does nothing once it has ended."""
        self._stopped = self._stopped or why

    def abandon(self) -> None:
        """The server stops: end the answer with an error for its client; its thread may still be in the prompt's pass."""
        self.stop("shutdown")
        self._events.put_nowait(stopping())

    async def begun(self) -> None:
        """Wait until the prompt was read, and found fit to answer.

        Raises:
            GuardError: it is not.
            ApiError: it is too long; or time is up, or the server stops.
        """
        await self._next()

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it comes, after `begun`; errors as there."""
        while (piece := await self._next()) is not None:
            if piece:
                yield piece

    async def _next(self) -> str | None:
        try:
            async with asyncio.timeout(max(self._deadline - time.monotonic(), 0)):
                event = await self._events.get()
        except TimeoutError:
            self.stop("timeout")
            raise _too_late() from None
        if isinstance(event, Exception):
            raise event
        return event

    # In the thread

    def _run(self) -> None:
        try:
            self._answer()
            self._send(None if self._stopped is None else _REASONS[self._stopped]())
        except Exception as error:
            if isinstance(error, ApiError) or (isinstance(error, GuardError) and not isinstance(error, RunFailed)):
                self.made.finish = "rejected"
            self._send(error)
        finally:
            with suppress(RuntimeError):  # the loop is closed: the process is about to end
                self._loop.call_soon_threadsafe(self._ended, self)

    def _answer(self) -> None:
        made, request = self.made, self._chat.request
        # Its text alone, before anything is computed: a million tokens would be embedded first, and then be refused.
        if len(self._vlm.chat.encode_turns(request.text_only.turns)) > self._limits.prompt_tokens:
            raise too_long(self._limits.prompt_tokens)
        batch = self._vlm.batch([request])
        made.prompt_tokens = int(batch.mask.sum())
        sampling = self._chat.sampling
        if made.prompt_tokens > self._limits.prompt_tokens:
            raise too_long(self._limits.prompt_tokens)
        left = self._limits.context - made.prompt_tokens
        if left < (sampling.max_new_tokens if self._chat.asked_length else 1):
            raise too_long(self._limits.context)
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, left))
        self._send("")
        if self._is_stopped():
            return
        for piece in self._vlm.pieces(request, sampling, batch=batch):
            if piece.step.tokens[0] is not None:
                made.token_times.append(time.monotonic())
            if piece.step.gate_scores is not None:
                made.scores.append(np.array(piece.step.gate_scores[0]))
            made.text += piece.text
            self._send(piece.text)
            if piece.finish is not None:
                made.finish, self._stopped = piece.finish, None
            elif self._is_stopped():
                return

    def _is_stopped(self) -> bool:
        if self._stopped is None and time.monotonic() > self._deadline:
            self.stop("timeout")
        if self._stopped is not None:
            self.made.finish = self._stopped
        return self._stopped is not None

    def _send(self, event: str | Exception | None) -> None:
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


def _too_late() -> ApiError:
    return ApiError(504, "the answer took longer than this server allows; ask for a shorter one", code="timeout")


_REASONS: dict[Stopped, Callable[[], Exception]] = {
    "cancelled": ClientGone,
    "timeout": _too_late,
    "shutdown": stopping,
}
