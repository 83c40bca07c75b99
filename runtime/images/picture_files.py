"""Files to pictures, with Pillow. Runs in a confined process (`confined_jobs`): a file can keep a decoder busy for long."""

from __future__ import annotations

import warnings
from io import BytesIO
from typing import Final

from PIL import Image, ImageOps, UnidentifiedImageError

from ...graphs.errors import GuardError, first_line

# Above it a picture is refused before it is decoded: 50 million RGB pixels are 150 MB, and more helps no vision tower.
MAX_PIXELS = 50_000_000

# Common formats. Pillow supports 40 more, and some of them start other programs (EPS runs Ghostscript).
FORMATS: Final = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# A progressive JPEG goes over the whole picture once per scan. Encoders write about 10; a file of a megabyte can have 100,000.
MOST_SCANS = 50
_START_OF_SCAN = b"\xff\xda"


def decode(content: bytes, what: str, damaged: str) -> Image.Image:
    """An RGB picture, upright, transparency on white; of an animation the first frame.

    Args:
        content: of a file.
        what, damaged: begin the sentences that refuse it ("the image", "the image cannot be read").

    Raises:
        GuardError: not one of `FORMATS`, damaged, empty, or more than `MAX_PIXELS` or `MOST_SCANS`.
    """
    if content[:2] == b"\xff\xd8" and content.count(_START_OF_SCAN) > MOST_SCANS:
        raise GuardError(
            f"{what} has {content.count(_START_OF_SCAN)} scans, more than {MOST_SCANS}; save it again as a plain JPEG"
        )
    try:
        with warnings.catch_warnings():
            # Pillow warns at a limit of its own; ours is lower and refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(BytesIO(content), formats=FORMATS) as image:
                refuse_huge(image.width, image.height, what)
                return to_rgb(ImageOps.exif_transpose(image))
    except (GuardError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise GuardError(f"{what} has more than {MAX_PIXELS:,} pixels; scale it down first") from None
    except Exception as error:  # decoders fail on damaged files with whatever Python raises at that byte
        # Pillow names the object that it was given, which is not the user's file
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise GuardError(f"{damaged} ({reason}); save it again as PNG or JPEG") from None


def media_type(content: bytes) -> str | None:
    """Media type by a file's first bytes; `None` for a format that browsers do not support."""
    if content[:4] == b"RIFF":
        return "image/webp" if content[8:12] == b"WEBP" else None
    return next((media for start, media in _STARTS.items() if content.startswith(start)), None)


_STARTS = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
    b"BM": "image/bmp",
    b"II*\0": "image/tiff",
    b"MM\0*": "image/tiff",
    b"II+\0": "image/tiff",
    b"MM\0+": "image/tiff",
}


def to_rgb(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def refuse_huge(width: int, height: int, what: str) -> None:
    """Raises GuardError for a picture of no pixels, or of more than `MAX_PIXELS`."""
    if width * height > MAX_PIXELS:
        raise GuardError(f"{what} has {width} x {height} pixels, more than {MAX_PIXELS:,}; scale it down first")
    if width * height < 1:
        raise GuardError(f"{what} has {width} x {height} pixels; send a picture")
