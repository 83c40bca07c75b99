"""The playground's page as a small PNG, for docs: `python tests/playground_picture.py GUARDED PNG`."""

from __future__ import annotations

import sys
from pathlib import Path
from threading import Thread

from browser import CHROMIUM, NO_CHROMIUM, Browser
from report_picture import WIDTH, save
from tiny_vlm_paths import EVALUATION

from vlmguard.apps.playground.open import playground

QUESTION = "optgroup[label='harmful, picture'] option"


def main(guarded: Path, png: Path) -> None:
    """The answers to a harmful prompt with a picture, and the gate."""
    if CHROMIUM is None:
        sys.exit(NO_CHROMIUM)
    with playground(guarded, port=0, prompts=str(EVALUATION)) as server, Browser() as browser:
        Thread(target=server.serve_forever, daemon=True).start()
        page = browser.open(server.url, "[data-ready=true]", WIDTH)
        page.select_option("#sample", page.locator(QUESTION).first.get_attribute("value"))
        page.click("#ask")
        page.get_by_text("Done:").wait_for()
        page.evaluate("document.activeElement.blur()")
        save(browser.picture(), png)
        server.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
