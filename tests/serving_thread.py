"""A guarded model behind a real uvicorn on a loopback port, in a thread of the test's process."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from vlmguard.apps.serving.app import Service
from vlmguard.apps.serving.server import graceful_server, open_port
from vlmguard.apps.serving.settings import ServeSettings
from vlmguard.runtime.guarded import GuardedVLM

NAME = "tiny"


@dataclass
class Served:
    """A running server.

    Attributes:
        url: of the server, without `/v1`.
        key: what requests bear.
        server: uvicorn, in a thread.
    """

    service: Service
    url: str
    key: str | None
    server: Any
    thread: threading.Thread

    @cached_property
    def openai(self) -> openai.OpenAI:
        """The official client; it tries nothing twice."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0)

    @cached_property
    def http(self) -> httpx.Client:
        return httpx.Client(timeout=30)

    def ask(
        self,
        content: Any = None,
        path: str = "/v1/chat/completions",
        method: str = "POST",
        headers: Mapping[str, str | bytes] | None = None,
        raw: bytes | Iterator[bytes] | None = None,
    ) -> httpx.Response:
        """A bare request with the JSON `content`, or with the bytes of `raw`."""
        bearer = {"authorization": f"Bearer {self.key}"} if self.key else {}
        body: dict[str, Any] = {"json": content} if content is not None else {"content": raw} if raw is not None else {}
        return self.http.request(method, self.url + path, headers=bearer | dict(headers or {}), **body)

    def metrics(self) -> dict[str, float]:
        """`name{label=value,...}` -> number, without times of creation."""
        text = self.ask(path="/metrics", method="GET").text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {
            sample.name + "".join(f"{{{key}={value}}}" for key, value in sorted(sample.labels.items())): sample.value
            for sample in samples
            if not sample.name.endswith("_created")
        }

    def told_to_stop(self) -> None:
        """What SIGTERM does; only a main thread gets signals."""
        self.server.handle_exit(signal.SIGTERM, None)


@contextmanager
def serving(vlm: GuardedVLM, **settings: Any) -> Iterator[Served]:
    """Serve the model while the block runs."""
    wanted = ServeSettings(**{"name": NAME, "port": 0, "timeout": 30.0, **settings})
    port = open_port(wanted.host, wanted.port)
    service, started = Service(vlm, wanted), threading.Event()
    server = graceful_server(service, started.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [port]}, daemon=True)
    url = f"http://127.0.0.1:{port.getsockname()[1]}"
    thread.start()
    assert started.wait(30)
    try:
        yield Served(service, url, wanted.api_key, server, thread)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(30)
        port.close()
    assert not thread.is_alive()


def eventually(true: Callable[[], object]) -> None:
    """Wait until something is so; a minute, on a machine that has other things to do."""
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.01)


@dataclass
class Paced:
    """A model that says a token when it is told to.

    Attributes:
        ready: tokens that were ready to be said so far, of all answers.
        said: those that were.
    """

    ready: int = 0
    said: int = 0
    _tokens: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def say(self, tokens: int = 1) -> None:
        self._tokens.release(tokens)

    @contextmanager
    def of(self, vlm: GuardedVLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Paced]:
        real = vlm.pieces

        def pieces(*arguments: Any, **named: Any) -> Iterator[Any]:
            for piece in real(*arguments, **named):
                self.ready += 1
                self._tokens.acquire()
                self.said += 1
                yield piece

        with monkeypatch.context() as patch:
            patch.setattr(vlm, "pieces", pieces)
            yield self
            self.say(10_000)  # whoever still waits must not wait for ever
