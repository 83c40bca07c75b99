"""TensorRT and TensorRT-RTX behind one adapter: which of them is installed, and how it talks.

`tensorrt` (10 and 11) and `tensorrt_rtx` (1.x) share the API that is used here: parser, profiles, builder, engine, context.
`Backend` contains their differences, so that no other code depends on a module's name.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

from ...graphs.errors import ExtraMissing, GuardError
from ...graphs.extras import Extra, install_command

BackendName = Literal["tensorrt", "tensorrt_rtx"]
# Modules in order of preference, and the extra that installs each. Plain TensorRT first: it supports every GPU.
_EXTRAS: dict[str, Extra] = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}


@dataclass(frozen=True)
class Backend:
    """One installed TensorRT.

    Attributes:
        name: a row of the table, also the module's name.
        module: the imported module.
        log: its logger, the only one of this process (TensorRT keeps the first that it is given).
    """

    name: BackendName
    module: Any
    log: Log

    @property
    def version(self) -> str:
        """Such as `1.7.1.116`."""
        return str(self.module.__version__)

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])

    @property
    def is_rtx(self) -> bool:
        """Built ahead of time for a range of GPUs, compiled to the end on the one that runs it."""
        return self.name == "tensorrt_rtx"

    @property
    def command(self) -> str:
        """The vendor's own command line tool."""
        return "tensorrt_rtx" if self.is_rtx else "trtexec"


@dataclass(frozen=True)
class Message:
    """One log message of TensorRT; `severity` is `INTERNAL_ERROR`, `ERROR`, `WARNING`, `INFO` or `VERBOSE`."""

    severity: str
    text: str


class Log:
    """Collects TensorRT's messages inside `with log.recording()`, and drops them otherwise.

    Attributes:
        logger: the `ILogger` to hand to TensorRT.
    """

    def __init__(self, module: Any) -> None:
        self._recordings: list[list[Message]] = []
        recordings = self._recordings

        class Collector(module.ILogger):
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                for messages in recordings:
                    messages.append(Message(severity.name, msg))

        self.logger = Collector()

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Message]]:
        """The messages of the block, in order."""
        messages: list[Message] = []
        self._recordings.append(messages)
        try:
            yield messages
        finally:
            self._recordings.remove(messages)


def find_backend(name: str | None = None) -> Backend:
    """The backend `name`, or by default the first that is installed.

    Raises:
        GuardError: unknown name.
        ExtraMissing: the backend, or every backend, is missing.
    """
    if name is not None and name not in _EXTRAS:
        raise GuardError(f"backend {name!r} is unknown; choose one of {', '.join(get_args(BackendName))}")
    for candidate in _EXTRAS if name is None else (name,):
        with contextlib.suppress(ImportError):
            return _backend(candidate)
    if name is None:
        raise ExtraMissing(
            f"no TensorRT is installed; run: {install_command('tensorrt')} (or {install_command('rtx')} for RTX GPUs)"
        )
    raise ExtraMissing(f"{name} is not installed; run: {install_command(_EXTRAS[name])}")


@lru_cache
def _backend(name: BackendName) -> Backend:
    module = importlib.import_module(name)
    return Backend(name, module, Log(module))


def why(messages: list[Message]) -> str:
    """The first thing that went wrong, as a clause of a sentence of ours."""
    errors = [message.text for message in messages if message.severity.endswith("ERROR")]
    return " ".join(errors[0].split())[:200] if errors else "no reason given"
