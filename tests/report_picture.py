"""A report's page as a small PNG, as `make report-picture` puts it into docs: `python tests/report_picture.py PAGE PNG`."""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from browser import CHROMIUM, Browser
from PIL import Image

WIDTH = 1100
COLORS = 128  # a page of text and flat marks needs no more


def main(page: Path, png: Path, up_to: str = "strength") -> None:
    """The page in the light scheme, up to the section of this id."""
    if CHROMIUM is None:
        sys.exit("no Chromium on this machine: install Debian's package chromium")
    with tempfile.TemporaryDirectory() as profile, Browser(Path(profile)) as browser:
        browser.open(page, WIDTH)
        height = int(browser.value(f"document.getElementById('{up_to}').getBoundingClientRect().top"))
        picture = Image.open(io.BytesIO(browser.picture()))
    picture = picture.convert("RGB").crop((0, 0, WIDTH, height))
    picture.quantize(COLORS, dither=Image.Dither.NONE).save(png, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
