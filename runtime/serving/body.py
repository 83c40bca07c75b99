"""A request's body: JSON of a bounded size, and nothing that must be unpacked first."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from ...graphs.whole_numbers import whole_number
from .errors import ApiError, ClientGone


async def read_json(http: Request, largest: int) -> dict[str, Any]:
    """The body as an object.

    Args:
        largest: bytes.

    Raises:
        ApiError: 415 for another content type or an encoded body, 413 beyond the limit, 400 for what is no JSON object.
        ClientGone: the client left before it had sent it all.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON; send the header Content-Type: application/json")
    if http.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "the body is compressed; send it as it is")
    declared = whole_number(http.headers.get("content-length", ""))
    if declared is not None and declared > largest:
        raise _too_large(largest)
    body = bytearray()
    try:
        async for part in http.stream():
            body += part
            if len(body) > largest:
                raise _too_large(largest)
    except ClientDisconnect:
        raise ClientGone from None
    try:
        content = from_json(bytes(body), allow_inf_nan=False)
    except ValueError:  # what it says quotes nothing, but where it is helps nobody in a body of megabytes
        raise ApiError(400, "the body is not valid JSON in UTF-8; send one object") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body is JSON, but not an object; send one")
    return content


def _too_large(largest: int) -> ApiError:
    return ApiError(
        413, f"the request is larger than {largest:,} bytes; send a smaller image", code="request_too_large"
    )
