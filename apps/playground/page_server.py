"""Serves the page: a fixed list of files, on this machine only.

Response headers restrict the page to this origin (`POLICY`) and isolate it from other sites, which browsers require for
WebAssembly threads. Requests with another host name are rejected: otherwise a site could let its name resolve to this
machine and read the model ("DNS rebinding").
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import webbrowser
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ...graphs.errors import GuardError

LOOPBACK = "127.0.0.1"
_OWN_NAMES = (LOOPBACK, "localhost")

POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self' 'wasm-unsafe-eval'",
        "worker-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",  # the picture that the user chose
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",  # another model may be behind the same address next time
}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json; charset=utf-8",
    ".wasm": "application/wasm",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
_BINARY = "application/octet-stream"


@dataclass(frozen=True)
class Served:
    """One file of the site: bytes, or where they are; its type is its address's."""

    content: bytes | Path

    @property
    def size(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)


Site = Mapping[str, Served]  # path of the address, from "/" on -> what is there


class PlaygroundServer(ThreadingHTTPServer):
    """Serves one site on the loopback address.

    Args:
        site: everything that there is.
        port: 0 takes any that is free.

    Raises:
        GuardError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, site: Site, port: int) -> None:
        self.site = site
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise GuardError(
                f"port {port} of {LOOPBACK} cannot be had ({error.strerror}); choose another --port, or 0 for any that is free"
            ) from None

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/"

    def run(self, open_page: bool = False) -> None:
        """Serve until interrupted.

        Args:
            open_page: open the page in the user's browser.
        """
        if open_page:
            # beside the serving: some browsers (lynx, a foreground $BROWSER) return when the page is closed
            threading.Thread(target=webbrowser.open, args=(self.url,), daemon=True).start()
        with contextlib.suppress(KeyboardInterrupt), self:
            self.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    server: PlaygroundServer  # pyright: ignore[reportIncompatibleVariableOverride] (how http.server is used)
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "vlmguard", ""
    timeout = 60  # seconds; an idle connection occupies a thread
    disable_nagle_algorithm = True  # a head and its body are two writes, and the second must not wait for the first

    def do_GET(self) -> None:
        served = self._found()
        if served is None:
            return
        try:
            if isinstance(served.content, bytes):
                self.wfile.write(served.content)
            else:
                with served.content.open("rb") as file:
                    shutil.copyfileobj(file, self.wfile)
        except ConnectionError:  # the page was closed
            self.close_connection = True

    def do_HEAD(self) -> None:
        self._found()

    def _found(self) -> Served | None:
        """The requested file, with its headers sent; `None` after an error response."""
        if not self._asked_by_own_name():
            return self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
        path = self.path.partition("?")[0]
        served = self.server.site.get(path)  # a table, not a folder: no path leads out of it
        if served is None:
            return self._refuse(HTTPStatus.NOT_FOUND)
        suffix = "." + path.rpartition(".")[2] if "." in path else ".html"
        self._send(HTTPStatus.OK, TYPES.get(suffix, _BINARY), served.size)
        return served

    def _asked_by_own_name(self) -> bool:
        return self.headers.get("Host", "") in {f"{name}:{self.server.server_port}" for name in _OWN_NAMES}

    def _refuse(self, status: HTTPStatus) -> None:
        body = f"{status.value} {status.phrase}\n".encode()
        self._send(status, "text/plain; charset=utf-8", len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send(self, status: HTTPStatus, kind: str, size: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(size))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: a list of addresses on the terminal is of no use."""
