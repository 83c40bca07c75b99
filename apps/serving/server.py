"""Open the port, serve, and stop with grace."""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ...graphs.errors import ExtraMissing, GuardError, first_line
from ...graphs.extras import install_command
from ...runtime.guarded import GuardedVLM
from .context import context_limit
from .settings import ServeSettings

if TYPE_CHECKING:
    import uvicorn

    from .app import Service

_PARTS = ("fastapi", "uvicorn", "prometheus_client")
# Seconds that an idle connection stays open. Longer than clients keep theirs (httpx, and so openai: 5), or a request would
# now and then meet a connection that is just being closed.
_KEEP_ALIVE = 75
_LAST_WORDS = 5  # seconds for writing what was answered, once every answer has ended


def log_to_stderr() -> None:
    """The server's log, a line per request, where a process's log belongs."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("vlmguard.serve")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def require_extra() -> None:
    """Raises ExtraMissing unless the extra `serve` is installed."""
    missing = [name for name in _PARTS if find_spec(name) is None]
    if missing:
        raise ExtraMissing(
            f"serving needs {', '.join(missing)}, which is not installed; run: {install_command('serve', 'cpu')}"
        )


def serve(folder: Path, settings: ServeSettings, on_ready: Callable[[dict[str, Any], str], None]) -> None:
    """Serve a guarded folder until SIGTERM or SIGINT.

    Args:
        folder: the guarded folder.
        settings: the operator's settings.
        on_ready: called with the guard's plan and the API's address once the server accepts requests.

    Raises:
        ExtraMissing: the extra `serve` is not installed.
        ManifestMismatch: the folder is not guarded, or differs from its manifest.
        GuardError: the port cannot be opened, or the model cannot answer.
    """
    require_extra()
    vlm = GuardedVLM.open(folder, variant=settings.variant)
    settings.places(bool(vlm.manifest.engines))
    context_limit(vlm, settings)
    warm_up(vlm)
    with open_port(settings.host, settings.port) as port:
        settings = replace(settings, port=port.getsockname()[1])
        run(vlm, settings, port, lambda: on_ready(vlm.manifest.plan, _address(settings)))


def warm_up(vlm: GuardedVLM) -> None:
    """One token, so that every part is open before the first request, and a model that cannot answer opens no port."""
    vlm.generate("hello", vlm.blank_image() if vlm.sees else None, max_new_tokens=1)


def open_port(host: str, port: int) -> socket.socket:
    """A listening socket; the first address that the host's name has.

    Raises:
        GuardError: it is taken, or not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.create_server(address[:2], family=family, backlog=2048)
        # Its connections inherit this. asyncio sets it only where a socket names its protocol, and one made by `create_server`
        # does not: then each token would wait for the client's (delayed, 40 ms) acknowledgement of the one before.
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        return opened
    except OSError as error:
        raise GuardError(f"cannot listen on {host} port {port} ({first_line(error)}); choose another --port") from None


def run(vlm: GuardedVLM, settings: ServeSettings, port: socket.socket, started: Callable[[], None]) -> None:
    """Serve an open model on an open port until SIGTERM or SIGINT.

    Args:
        vlm: the model.
        settings: the operator's settings.
        port: a listening socket; closed at the end.
        started: called once the server accepts requests.
    """
    from .app import Service

    service = Service(vlm, settings)
    server = graceful_server(service, started)
    with port:
        server.run(sockets=[port])


def graceful_server(service: Service, started: Callable[[], None]) -> uvicorn.Server:
    """A uvicorn server with a graceful stop: running requests are finished, new ones receive 503.

    uvicorn itself closes the port at once, so callers would get no response.
    """
    import uvicorn

    admission, grace = service.admission, service.settings.grace

    class GracefulServer(uvicorn.Server):
        asked_at: float | None = None
        grace_over = False

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if (
                self.asked_at is not None
            ):  # second signal: stop answers, with an error to each caller; third signal: exit
                self.grace_over, self.force_exit = True, self.grace_over
                return
            logging.getLogger("vlmguard.serve").info(
                "stopping (%s): %d requests inside, at most %g s", signal.Signals(sig).name, admission.inside, grace
            )
            self.asked_at, admission.draining = time.monotonic(), True

        async def on_tick(self, counter: int) -> bool:
            if self.asked_at is not None and not self.should_exit:
                over = self.grace_over or time.monotonic() - self.asked_at >= grace
                if over:
                    service.stop_answers()
                self.should_exit = over or admission.inside == 0
            return await super().on_tick(counter)

    config = uvicorn.Config(
        service.app,
        access_log=False,
        log_config=None,
        lifespan="off",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_LAST_WORDS,
    )
    return GracefulServer(config)


def _address(settings: ServeSettings) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}/v1"
