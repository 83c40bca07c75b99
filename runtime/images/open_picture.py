"""Opening pictures: from a path, bytes, a Pillow image or an array to RGB. Files are decoded in a confined process."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from ...graphs.errors import GuardError, first_line
from ...graphs.regular_files import NotRegular, read_regular
from ..confined import PICTURES, ConfinedFailure
from .picture_files import FORMATS, refuse_huge, to_rgb

# What stands for a picture: opened, its pixels (uint8), or a file by its path or content.
Picture = Image.Image | np.ndarray | Path | str | bytes
LARGEST_FILE = 256 << 20  # bytes; an uncompressed picture of `MAX_PIXELS` has 200 million


def open_image(source: Picture) -> Image.Image:
    """Open a picture as RGB, upright, with transparency on white.

    Files are rotated by their EXIF orientation; an animation gives its first frame. transformers does the same, except that it
    drops the transparency of files.

    Files are decoded in a confined process (`confined`). A Pillow image was opened by the caller and is decoded here.

    Args:
        source: a Pillow image, the path or the content of an image file, or a uint8 array `[height, width]` or
            `[height, width, 3 or 4]`.

    Raises:
        GuardError: `source` is not a picture, the file is missing, damaged, empty, not one of `FORMATS`, larger than
            `MAX_PIXELS`, or takes too long or too much memory to decode.
    """
    if isinstance(source, Image.Image):
        refuse_huge(source.width, source.height, "the image")
        try:
            return to_rgb(source)
        except Exception as error:  # Pillow decodes late: a damaged file shows only now
            raise GuardError(f"the image cannot be read ({first_line(error)}); save it again as PNG or JPEG") from None
    if isinstance(source, np.ndarray):
        return to_rgb(_of_array(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return _decoded(bytes(source), "the image", "the image cannot be read")
    if not isinstance(source, str | os.PathLike):
        raise GuardError(
            f"the image is of type {type(source).__name__}; give a path, the bytes of a file, a Pillow image or a uint8 array"
        )
    path = Path(source)
    return _decoded(picture_bytes(path), f"{path}: the image", f"{path}: is not an image that can be read")


def _of_array(pixels: np.ndarray) -> Image.Image:
    """Pixels as a Pillow image: grey, RGB or RGBA."""
    shaped = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if pixels.dtype != np.uint8 or not shaped or not pixels.size:
        raise GuardError(
            f"the image is an array of {pixels.dtype} with shape {pixels.shape}; give uint8 of shape [height, width, 3], "
            "[height, width, 4] or [height, width]"
        )
    refuse_huge(pixels.shape[1], pixels.shape[0], "the image")
    return Image.fromarray(np.ascontiguousarray(pixels))


def picture_bytes(path: Path) -> bytes:
    """The content of a picture's file, not yet decoded.

    Raises:
        GuardError: no such file, no regular one, or more than `LARGEST_FILE` bytes.
    """
    if not path.is_file():
        raise GuardError(f"{path}: no such image file; name a {', '.join(FORMATS)} file")
    try:
        return read_regular(path, LARGEST_FILE)
    except NotRegular as error:
        raise GuardError(f"{path}: {error}; save it again as PNG or JPEG") from None
    except OSError as error:
        reason = first_line(error)
        raise GuardError(f"{path}: is not an image that can be read ({reason}); save it again as PNG or JPEG") from None


def _decoded(content: bytes, what: str, damaged: str) -> Image.Image:
    """A file's picture; `what` and `damaged` begin the sentences that refuse it."""
    try:
        reply, pixels = PICTURES.run("decode", {"what": what, "damaged": damaged}, content)
    except ConfinedFailure as error:
        raise GuardError(f"{damaged} ({error}); save it again as PNG or JPEG") from None
    width, height = int(reply["width"]), int(reply["height"])
    refuse_huge(width, height, what)
    assert len(pixels) == 3 * width * height, "the helper sends RGB"
    return Image.frombytes("RGB", (width, height), pixels)
