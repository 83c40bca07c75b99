"""Around every request: one line in the log, its numbers, and an answer even where something unexpected happens.

A log line has no word of a prompt, an answer, a key or an unknown path, and an error only its type and place: messages of
exceptions quote what they are about.
"""

from __future__ import annotations

import logging
import secrets
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answering import Made
from .http_errors import ApiError, ClientGone

log = logging.getLogger("vlmguard.serve")
PATHS = frozenset({"/v1/chat/completions", "/v1/models", "/healthz", "/healthz/live", "/healthz/ready", "/metrics"})
_KEY = "vlmguard.access"
CLIENT_GONE = 499  # nginx's number: the client left before there was an answer


@dataclass
class Access:
    """One request, as the log has it; a handler adds what came of its answer."""

    id: str
    made: Made | None = None


def access_of(scope: Scope) -> Access:
    return scope[_KEY]


class AccessLog:
    """ASGI middleware.

    Args:
        ended: called with each request's path, status code and duration in seconds.
    """

    def __init__(self, app: ASGIApp, ended: Callable[[str, int, float], None]) -> None:
        self._app, self._ended = app, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        access = scope[_KEY] = Access(secrets.token_hex(8))
        began, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", access.id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except ClientGone:
            status = CLIENT_GONE
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            log.error("%s failed: %s at %s:%s", access.id, type(error).__name__, where.filename, where.lineno)
            if not status:
                refusal = ApiError(500, f"something went wrong here; the log has it as {access.id}")
                await JSONResponse(refusal.to_json(), 500)(scope, receive, sending)
        path = scope["path"] if scope["path"] in PATHS else "other"
        seconds = time.monotonic() - began
        self._ended(path, status, seconds)
        log.info("%s %s %s %s %.3fs%s", access.id, _method(scope), path, status, seconds, _summary(access.made))


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in ("GET", "POST", "HEAD") else "other"


def _summary(made: Made | None) -> str:
    return "" if made is None else f" prompt={made.prompt_tokens} completion={made.tokens} finish={made.finish}"
