"""Processes that can be ended: untrusted programs and files are worked on there, within limits of time and memory.

A chat template is a program, and a picture decoder is native code that a file can keep busy for minutes. Neither can be stopped
inside the process that answers. So a small helper process does the work (`confined_jobs`), and is killed when its time is up or
its memory runs out; the next job starts a new one. A helper is kept for the next job, because starting one takes about 0.1 s.

    TEMPLATES, PICTURES, TRANSFORMERS, TORCHVISION    the pools; `run` is safe to call from any thread, and after a fork

Helpers end with this process: their stdin ends then, even where it is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from multiprocessing import spawn
from pathlib import Path
from typing import Any

from ..graphs.errors import GuardError
from .confined_frames import read_frame, write_frame

_PACKAGE = Path(__file__).parents[1]
_START = """
import sys, types
sys.path[:] = {path!r}
package = types.ModuleType("vlmguard")
package.__path__ = [{package!r}]
sys.modules["vlmguard"] = package
from vlmguard.runtime.confined_jobs import serve
serve({memory}, {module!r})
"""
_START_SECONDS = 60.0
_PATIENCE = 3  # seconds on the clock for a second of the job, on a machine that has other things to do
_MOST_HELPERS = 4  # of a pool, at the same time; more jobs wait


class ConfinedFailure(Exception):
    """The job failed; `str` is the reason as a clause ("it takes more than 10 s")."""


class LimitReached(ConfinedFailure):
    """The job exceeded its time or memory limit; a retry would too."""


class ConfinedPool:
    """Helper processes for one kind of work.

    Args:
        seconds: of the processor that a job may take, and `_PATIENCE` times that on the clock.
        memory: bytes of address space of a helper.
        module: dotted, within `runtime`, that the jobs need; imported before a job's time begins.
    """

    def __init__(self, seconds: float, memory: int, module: str = "chat.chat_environment") -> None:
        self.seconds, self.memory, self.module = seconds, memory, module
        self._forget()
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def run(self, job: str, values: Mapping[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """Run one job in the helper process and return its reply.

        Args:
            job: name of the job.
            values: its arguments, JSON values.
            payload: binary input.

        Raises:
            ConfinedFailure: the job raised, crashed, or exceeded its time or memory limit.
            GuardError: the job rejected its input; or no helper process can be started.
        """
        with self._places:
            helper, late = self._take(), threading.Event()
            try:
                with _ended_after(helper, _PATIENCE * self.seconds, late):
                    write_frame(_pipe(helper.stdin), {**values, "job": job, "seconds": self.seconds}, payload)
                    reply, content = read_frame(_pipe(helper.stdout))
            except (OSError, EOFError, ValueError):
                _end(helper)
                if late.is_set() or helper.returncode == -getattr(signal, "SIGXCPU", signal.SIGTERM):
                    raise LimitReached(f"it takes more than {self.seconds:g} s") from None
                raise LimitReached(f"it crashes, or needs more than {self.memory >> 20} MiB of memory") from None
            except BaseException:  # interrupted: the helper's next frame would be the answer to this job
                _end(helper)
                raise
            if "memory" in reply:
                _end(helper)
                raise LimitReached(f"it needs more than {self.memory >> 20} MiB of memory")
            self._idle.append(helper)
        if "refusal" in reply:
            raise GuardError(reply["refusal"])
        if "error" in reply:
            raise ConfinedFailure(reply["error"])
        return reply, content

    def close(self) -> None:
        """End the idle helpers; the next job starts another."""
        while self._idle:
            _end(self._idle.pop())

    def _take(self) -> subprocess.Popen[bytes]:
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread was faster
                helper = self._idle.pop()
                if helper.poll() is None:
                    return helper
                _end(helper)
        return _started(self.memory, self.module)

    def _forget(self) -> None:
        """In a forked child: the helpers are the parent's."""
        self._idle: list[subprocess.Popen[bytes]] = []
        self._places = threading.BoundedSemaphore(_MOST_HELPERS)


def _started(memory: int, module: str) -> subprocess.Popen[bytes]:
    # Not by `import vlmguard`: that would need the site's hooks for editable installs. Relative entries name the folder that
    # the user happens to be in, which may be the one with the untrusted files.
    path = [entry for entry in sys.path if Path(entry).is_absolute()]
    code = _START.format(path=path, package=str(_PACKAGE), memory=memory, module=module)
    flags = ["-I", "-S", *(["-B"] if sys.dont_write_bytecode else [])]
    try:
        helper = subprocess.Popen(
            [os.fsdecode(spawn.get_executable()), *flags, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except OSError as error:
        raise _cannot_start(error.strerror or "unknown reason") from None
    try:
        with _ended_after(helper, _START_SECONDS, threading.Event()):
            read_frame(_pipe(helper.stdout))
    except (OSError, EOFError, ValueError):
        _end(helper)
        raise _cannot_start("it ended at once") from None
    except BaseException:
        _end(helper)
        raise
    return helper


def _cannot_start(reason: str) -> GuardError:
    return GuardError(
        f"the process for chat templates and pictures cannot be started with {os.fsdecode(spawn.get_executable())} ({reason}); "
        "name a Python interpreter with multiprocessing.set_executable"
    )


@contextlib.contextmanager
def _ended_after(helper: subprocess.Popen[bytes], seconds: float, late: threading.Event) -> Iterator[None]:
    """Kill the helper after `seconds`, and set `late`."""

    def end() -> None:
        late.set()
        helper.kill()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(helper: subprocess.Popen[bytes]) -> None:
    helper.kill()
    for pipe in (helper.stdin, helper.stdout):
        with contextlib.suppress(OSError):  # what was still to be written
            _pipe(pipe).close()
    helper.wait()


def _pipe(stream: Any) -> Any:
    assert stream is not None
    return stream


TEMPLATES = ConfinedPool(seconds=5, memory=512 << 20)
PICTURES = ConfinedPool(seconds=10, memory=2 << 30, module="images.picture_files")
# The address space of numpy's and transformers' libraries alone is about 2 GiB.
TRANSFORMERS = ConfinedPool(seconds=30, memory=8 << 30, module="images.picture_files")
# With torch, whose CUDA builds take 4 GiB more and start slowly.
TORCHVISION = ConfinedPool(seconds=60, memory=16 << 30, module="images.picture_files")
