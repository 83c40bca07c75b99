"""Authentication of requests."""

from __future__ import annotations

import hashlib
import hmac
from urllib.parse import urlsplit

from .http_errors import ApiError
from .settings import ServeSettings, is_loopback


def require_key(settings: ServeSettings, authorization: str | None) -> None:
    """The request bears the key, if there is one.

    Raises:
        ApiError: 401, the same for no key and for a wrong one.
    """
    if settings.api_key is None:
        return
    scheme, _, given = (authorization or "").partition(" ")
    # Digests have one length, and `compare_digest` takes as long for a near miss as for any other.
    same = hmac.compare_digest(_digest(given.strip()), _digest(settings.api_key))
    if scheme.lower() != "bearer" or not same:
        raise ApiError(
            401, "no API key, or a wrong one; send the header Authorization: Bearer KEY", code="invalid_api_key"
        )


def require_local_name(settings: ServeSettings, host: str | None) -> None:
    """Reject requests with a foreign host name on a loopback server without a key.

    Otherwise a web page could let its own name resolve to 127.0.0.1 and send requests through the visitor's browser.

    Raises:
        ApiError: 403.
    """
    if settings.api_key is not None or not settings.is_local:
        return
    try:
        name = urlsplit(f"//{host or ''}").hostname or ""
    except ValueError:
        name = ""
    if not is_loopback(name):
        raise ApiError(403, "this server answers to its local name only; ask 127.0.0.1, or give it an API key")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
