"""A budget of time and memory for one command, kept from outside by a parent that waits.

Files of strangers can ask for any amount of both: a graph for a huge tensor when it runs, or for a loop without an end.
What native code does cannot be stopped from inside, so the command runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

from ..graphs.errors import GuardError
from ..graphs.leftovers import abandon

MOST_MEMORY, MOST_SECONDS = "VLMGUARD_MAX_MEMORY", "VLMGUARD_MAX_SECONDS"
LEAST = 512 << 20  # bytes; Python, numpy and a runtime want about half of it before they do anything
_STOP = getattr(signal, "SIGALRM", signal.SIGTERM)  # Windows has no other
_INSIDE = "VLMGUARD_WITHIN_BUDGET"  # seconds that the process has, or nothing
_GRACE = 3.0  # seconds to clean up in, once time is up
_WANTED_MORE, _TIME_IS_UP = 71, 72  # exit codes of the process
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class TimeIsUp(BaseException):
    """Raised in the command when its time is up; no `except Exception` on the way takes it for something else."""


def memory_of(text: str) -> int:
    """Bytes of `4G`, `512M`, ...

    Raises:
        GuardError: it is no size, or too little for anything to run in.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if not found:
        raise GuardError(f"--max-memory {text}: is no size; write 4G or 512M")
    size = int(float(found[1]) * _UNITS[found[2].upper()])
    if size < LEAST:
        raise GuardError(f"--max-memory {text}: nothing runs in less than {LEAST >> 20}M; allow more")
    return size


def inside() -> bool:
    """Whether this process is the one that is waited for."""
    return _INSIDE in os.environ


def run_within(arguments: Sequence[str], seconds: float | None, memory: int | None) -> int:
    """`vlmguard ARGUMENTS` in a process of its own; its exit code.

    Args:
        seconds: of wall-clock time. The command is asked to clean up then, and gets some seconds for it.
        memory: bytes that it may allocate. Model files that are mapped, not read, do not count; the stacks of its threads do.

    Raises:
        GuardError: time was up, or it wanted more memory; what it wrote is gone, or is swept up by the next run.
    """
    child = subprocess.Popen(
        [sys.executable, "-c", "from vlmguard.cli import main; main()", *arguments],
        env={**os.environ, _INSIDE: "" if seconds is None else str(seconds)},
        preexec_fn=_limit(memory) if memory is not None else None,
    )
    with _forwarded(child):
        code = _awaited(child, None if seconds is None else seconds + 3 * _GRACE)
    if code == _TIME_IS_UP:
        raise GuardError(f"time is up: it took more than the {seconds:g} s of --max-seconds; allow more")
    if code == _WANTED_MORE or (code < 0 and memory is not None):
        how = "" if code == _WANTED_MORE else f" (ended by {signal.Signals(-code).name})"
        raise GuardError(f"it wanted more memory than --max-memory allows{how}; allow more")
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """In the process that is waited for: how time and memory that run out become an exit code. The parent says it."""
    if not inside():
        yield
        return
    if seconds := os.environ[_INSIDE]:
        signal.signal(_STOP, _time_is_up)
        threading.Thread(target=_watch, args=(float(seconds),), daemon=True).start()
    try:
        yield
    except TimeIsUp:
        sys.exit(_TIME_IS_UP)
    except MemoryError:
        sys.exit(_WANTED_MORE)


def _watch(seconds: float) -> None:
    """Ask the command to stop; native code does not hear that, and is not waited for."""
    time.sleep(seconds)
    signal.pthread_kill(threading.main_thread().ident or 0, _STOP)
    time.sleep(_GRACE)
    abandon()
    os._exit(_TIME_IS_UP)


def _time_is_up(*_: object) -> NoReturn:
    raise TimeIsUp


def _limit(memory: int):
    try:
        import resource
    except ImportError:
        raise GuardError("--max-memory: this system has no limit to set; leave it out") from None
    return lambda: resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def _awaited(child: subprocess.Popen[bytes], seconds: float | None) -> int:
    """Its exit code. A process that does not even end itself is killed."""
    while True:
        try:
            return child.wait(seconds)
        except KeyboardInterrupt:  # the terminal told the child as well, and it cleans up
            seconds = 3 * _GRACE
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return _TIME_IS_UP


@contextlib.contextmanager
def _forwarded(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whoever ends the parent means the child."""
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
