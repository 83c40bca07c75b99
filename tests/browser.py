"""Headless Chromium, driven by Playwright: what a page draws, says and asks for.

The browser is the system's own; Playwright downloads none.
"""

from __future__ import annotations

import shutil
from typing import Any

from playwright.sync_api import BrowserContext, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_CHROMIUM = "no Chromium on this machine: install Debian's package chromium"
_MILLISECONDS = 60_000  # for any one answer, on a busy machine
_SOFTWARE_GPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--ignore-gpu-blocklist")
# What Chromium itself says where it has WebGPU and the machine has no GPU.
_CHROMIUMS_OWN = ("No available adapters.",)


class Browser:
    """One browser with one tab.

    Args:
        gpu: give pages a GPU (WebGPU) that Chromium's SwiftShader computes on the CPU, so that any machine has one.

    Attributes:
        page: the tab, once something was opened.
        said: console messages of level warning and error of the page and its workers, and exceptions.
        asked: addresses that the page wanted.
    """

    page: Page

    def __init__(self, gpu: bool = False) -> None:
        assert CHROMIUM is not None
        self.said: list[str] = []
        self.asked: list[str] = []
        self._driver = sync_playwright().start()
        arguments = ["--no-sandbox", *(_SOFTWARE_GPU if gpu else ())]
        self._browser = self._driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        self._context: BrowserContext | None = None

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._browser.close()
        self._driver.stop()

    def open(self, url: str, drawn: str, width: int, dark: bool = False) -> Page:
        """Load a page at a width in a fresh tab, and wait until it says that it is ready.

        Args:
            drawn: what matches the page's `html` element then, as a CSS attribute selector.
        """
        if self._context is not None:
            self._context.close()
        self.said.clear()
        self.asked.clear()
        self._context = self._browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", is_mobile=width < 600
        )
        self._context.set_default_timeout(_MILLISECONDS)
        self.page = self._context.new_page()
        self.page.on("console", lambda message: self._hear(message.type, message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self._context.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        try:
            self.page.wait_for_selector(f"html{drawn}", state="attached")
        except Exception as error:
            raise AssertionError(f"the page was never ready; it said {self.said}") from error
        return self.page

    def value(self, expression: str) -> Any:
        """What JavaScript says."""
        return self.page.evaluate(expression)

    def picture(self) -> bytes:
        """The whole page as PNG."""
        return self.page.screenshot(full_page=True)

    def _hear(self, kind: str, text: str) -> None:
        if kind in ("error", "warning", "assert") and text not in _CHROMIUMS_OWN:
            self.said.append(text)
