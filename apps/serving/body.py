"""A request's body: JSON of a bounded size, and nothing that must be unpacked first.

It is read before the request takes a place, so that a slow client delays no other request. What bounds memory then is
`Bodies`: bytes of all bodies that are being read, not their number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from ...graphs.whole_numbers import whole_number
from .http_errors import ApiError, ClientGone

LONGEST_WAIT = 60.0  # seconds from a request's headers to the end of its body


class Bodies:
    """The bodies that are being read, in the event loop.

    Args:
        most: bytes of all of them together.
    """

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    @contextmanager
    def body(self) -> Iterator[bytearray]:
        """A body to fill; its bytes are given back when it has been read."""
        content = bytearray()
        try:
            yield content
        finally:
            self.held -= len(content)

    def add(self, content: bytearray, part: bytes) -> None:
        """Raises ApiError 429 if there are too many bytes already."""
        if self.held + len(part) > self.most:
            raise ApiError(
                429,
                "too many large requests are being read; try again later",
                kind="rate_limit_error",
                code="queue_full",
                retry_after=1,
            )
        content += part
        self.held += len(part)


async def read_json(http: Request, largest: int, bodies: Bodies, seconds: float = LONGEST_WAIT) -> dict[str, Any]:
    """Read the body as a JSON object.

    Args:
        http: the request.
        largest: size limit in bytes.
        bodies: the bodies currently being read.
        seconds: time limit for receiving the body.

    Raises:
        ApiError: 415 for another content type or an encoded body, 413 beyond the size limit, 400 if it is not a JSON
            object, 408 beyond the time limit, 429 if too many bodies are being read.
        ClientGone: the client disconnected before the end of the body.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON; send the header Content-Type: application/json")
    if http.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "the body is compressed; send it as it is")
    declared = whole_number(http.headers.get("content-length", ""))
    if declared is not None and declared > largest:
        raise _too_large(largest)
    with bodies.body() as body:
        try:
            async with asyncio.timeout(min(seconds, LONGEST_WAIT)):
                async for part in http.stream():
                    bodies.add(body, part)
                    if len(body) > largest:
                        raise _too_large(largest)
        except ClientDisconnect:
            raise ClientGone from None
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {min(seconds, LONGEST_WAIT):g} s; send it faster", code="timeout"
            ) from None
        return _object(bytes(body))


def _object(body: bytes) -> dict[str, Any]:
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError:  # the message quotes nothing, but its position is of no use in a body of megabytes
        raise ApiError(400, "the body is not valid JSON in UTF-8; send one object") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body is JSON, but not an object; send one")
    return content


def _too_large(largest: int) -> ApiError:
    return ApiError(
        413, f"the request is larger than {largest:,} bytes; send a smaller image", code="request_too_large"
    )
