"""A report's page as a small PNG, as `make report-picture` puts it into docs: `python tests/report_picture.py PAGE PNG`."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from browser import CHROMIUM, NO_CHROMIUM, Browser
from PIL import Image

WIDTH = 1100
COLORS = 128  # a page of text and flat marks needs no more


def main(page: Path, png: Path, up_to: str = "cost") -> None:
    """The page in the light scheme, up to the section of this id."""
    if CHROMIUM is None:
        sys.exit(NO_CHROMIUM)
    with Browser() as browser:
        browser.open(page.resolve().as_uri(), "[data-drawn]", WIDTH)
        height = int(browser.value(f"document.getElementById('{up_to}').getBoundingClientRect().top"))
        save(browser.picture(), png, height)


def save(picture: bytes, png: Path, height: int | None = None) -> None:
    """In few colours, from the top down to a height."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image = image.crop((0, 0, image.width, height or image.height))
    image.quantize(COLORS, dither=Image.Dither.NONE).save(png, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
