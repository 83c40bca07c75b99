"""Images of a request: `data:` URLs and nothing else.

A server that fetches a client's URLs sends requests of the client's choice from inside its own network.
"""

from __future__ import annotations

import base64
import binascii

from ...runtime.images.picture_files import media_type
from .http_errors import ApiError

MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/tiff")


def image_bytes(url: str, largest: int, param: str) -> bytes:
    """The image file in a `data:` URL; `open_image` decodes it later, with its own limits.

    Args:
        url: the `data:` URL.
        largest: size limit of the file in bytes.
        param: the request's field, for errors.

    Raises:
        ApiError: 400 for another kind of URL or a file that does not match its declared type, 413 for a larger file.
    """
    if url[:5].lower() != "data:":
        raise ApiError(
            400,
            "the image is not a data: URL, and nothing is fetched from other addresses; send data:image/png;base64,...",
            code="invalid_image_url",
            param=param,
        )
    head, comma, content = url[5:].partition(",")
    media, *options = head.lower().split(";")
    if not comma or media not in MEDIA_TYPES or options != ["base64"]:
        raise ApiError(
            400,
            f"the image is not data:TYPE;base64,... with a TYPE of {', '.join(MEDIA_TYPES)}",
            code="invalid_image_url",
            param=param,
        )
    if len(content) > 4 * -(-largest // 3):  # before anything is decoded
        raise _too_large(largest, param)
    try:
        file = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "the image is not valid base64", code="invalid_base64_image", param=param) from None
    if len(file) > largest:
        raise _too_large(largest, param)
    actual = media_type(file)
    if actual != media:
        raise ApiError(
            400,
            f"the image is declared as {media}, but its bytes are {actual or 'of another format'}; send the actual type",
            code="invalid_image_format",
            param=param,
        )
    return file


def _too_large(largest: int, param: str) -> ApiError:
    return ApiError(
        413, f"the image file is larger than {largest:,} bytes; scale it down", code="image_too_large", param=param
    )
