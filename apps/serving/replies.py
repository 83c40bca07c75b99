"""OpenAI's objects: a completion, its chunks, the list of models."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from ...graphs.clock import wall_clock
from ...graphs.strict_json import to_strict_json
from .answering import Answering, Made


@dataclass(frozen=True)
class Reply:
    """Fields shared by all objects of one answer.

    Attributes:
        model: its name.
        fingerprint: of the graph that answers: the beginning of its SHA-256.
    """

    model: str
    fingerprint: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(wall_clock().timestamp()))

    def completion(self, made: Made) -> dict[str, Any]:
        """The whole answer at once."""
        message = {"role": "assistant", "content": made.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": made.finish}
        return {**self._object("chat.completion"), "choices": [choice], "usage": usage(made)}

    def chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        """A part of it."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._object("chat.completion.chunk"), "choices": [choice]}

    async def chunks(self, answering: Answering, tells_usage: bool) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a streamed answer: role, text, finish reason, and on request the token counts."""
        nothing_yet = {"usage": None} if tells_usage else {}
        yield self.chunk({"role": "assistant", "content": "", "refusal": None}) | nothing_yet
        async for piece in answering.pieces():
            yield self.chunk({"content": piece}) | nothing_yet
        yield self.chunk({}, answering.made.finish) | nothing_yet
        if tells_usage:
            yield {**self._object("chat.completion.chunk"), "choices": [], "usage": usage(answering.made)}

    def _object(self, kind: str) -> dict[str, Any]:
        about = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return about | {"system_fingerprint": self.fingerprint}


def usage(made: Made) -> dict[str, int]:
    """Tokens, in OpenAI's words; an answer's end does not count as one."""
    total = made.prompt_tokens + made.tokens
    return {"prompt_tokens": made.prompt_tokens, "completion_tokens": made.tokens, "total_tokens": total}


def model_card(name: str, created: int) -> dict[str, Any]:
    """One entry of `/v1/models`."""
    return {"id": name, "object": "model", "created": created, "owned_by": "vlmguard"}


def event(content: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = content if isinstance(content, str) else to_strict_json(content, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
