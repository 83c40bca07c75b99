"""A budget of time and memory for one command, kept from outside by a parent that waits.

Untrusted files can ask for any amount of both: a graph for a huge tensor when it runs, or for a loop without an end.
What native code does cannot be stopped from inside, so the command runs in a process of its own. The commands that open
untrusted models have a budget unless the user lifts it (`DEFAULT_SECONDS`, `free_memory`).
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
from pathlib import Path
from typing import NoReturn

from ..graphs.errors import GuardError
from ..graphs.stage_locks import abandon

MOST_MEMORY, MOST_SECONDS = "VLMGUARD_MAX_MEMORY", "VLMGUARD_MAX_SECONDS"
# Default time limits in seconds. Proving a model of 13 GB takes minutes, calibrating it hours.
DEFAULT_SECONDS = {"inspect": 600.0, "verify": 4 * 3600.0, "export": 24 * 3600.0}
LEAST_DEFAULT = 4 << 30  # bytes; a machine with less free memory swaps, which is no reason to refuse
LEAST = 512 << 20  # bytes; Python, numpy and a runtime take about half of it at start
_STOP = getattr(signal, "SIGALRM", signal.SIGTERM)  # Windows has no other
_INSIDE = "VLMGUARD_WITHIN_BUDGET"  # seconds that the process has, or nothing
_PARENT = "VLMGUARD_BUDGET_PARENT"  # its process id
_GRACE = 3.0  # seconds to clean up in, once time is up
_OUT_OF_MEMORY, _TIME_IS_UP, _INTERRUPTED = 71, 72, 130  # exit codes of the process
# Signals sent by a user or a process supervisor; out of memory ends with others (SIGKILL, SIGABRT, SIGSEGV, ...).
_SENT = {getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)}
MOST = 1 << 50
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class TimeIsUp(BaseException):
    """Raised in the command when its time is up; no `except Exception` on the way takes it for something else."""


def memory_of(text: str) -> int:
    """Bytes of `4G`, `512M`, ...; 0 for no limit.

    Raises:
        GuardError: it is no size, too little for anything to run in, or more than any machine has.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if not found:
        raise GuardError(f"--max-memory {text[:40]}: is no size; write 4G or 512M, or 0 for no limit")
    size = int(float(found[1]) * _UNITS[found[2].upper()])
    if size == 0:
        return 0
    if size < LEAST:
        raise GuardError(f"--max-memory {text}: nothing runs in less than {LEAST >> 20}M; allow more")
    if size > MOST:
        raise GuardError(f"--max-memory {text}: is more than any machine has; write 4G or 512M, or 0 for no limit")
    return size


def free_memory() -> int | None:
    """Memory available to new processes in bytes, including swap; `None` on systems other than Linux.

    A container's limit is respected. A quarter is added, because the limit counts reserved memory that is never used. If the
    system runs out first, it kills the command, and the parent reports that in the same way.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kibibytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        free = (kibibytes["MemAvailable"] + kibibytes.get("SwapFree", 0)) << 10
    except (OSError, ValueError, KeyError, IndexError):
        return None
    left = _left_in_container()
    free = free if left is None else min(free, left)
    return max(free + free // 4, LEAST_DEFAULT)


def _left_in_container() -> int | None:
    """Bytes left in this process's control group; the page cache does not count."""
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text(encoding="ascii").strip()
        if most == "max":
            return None
        used = int((group / "memory.current").read_text(encoding="ascii"))
        numbers = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(int(most) - used + int(numbers.get("inactive_file", 0)), 0)
    except (OSError, ValueError):
        return None


def inside() -> bool:
    """Whether this process is the one that is waited for."""
    return _INSIDE in os.environ


def run_within(arguments: Sequence[str], seconds: float | None, memory: int | None) -> int:
    """Run `vlmguard ARGUMENTS` in a separate process and return its exit code.

    Args:
        arguments: of the command line.
        seconds: limit of wall-clock time; `None` for no limit. At the limit the command has a few seconds to clean up.
        memory: limit of allocated bytes; `None` for no limit. Memory-mapped model files do not count; thread stacks do.

    Raises:
        GuardError: a limit was reached. The partial output is removed, now or by the next run.
    """
    # By this process's own search path: `python -c` would put the folder first that the user happens to be in, and a model's
    # folder may hold a `typer.py`.
    path = [entry for entry in sys.path if Path(entry).is_absolute()] + [str(Path(__file__).parents[2])]
    code = f"import sys; sys.path[:], sys.argv[0] = {path!r}, {sys.argv[0]!r}; from vlmguard.cli import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", code, *arguments],
        env={**os.environ, _INSIDE: "" if seconds is None else str(seconds), _PARENT: str(os.getpid())},
        preexec_fn=_limit(memory) if memory is not None else None,
    )
    with _forwarded(child):
        code = _awaited(child, None if seconds is None else seconds + 3 * _GRACE)
    if code == _TIME_IS_UP:
        raise GuardError(f"time is up: it took more than the {seconds:g} s of --max-seconds; allow more")
    if code == _OUT_OF_MEMORY or (code < 0 and memory is not None and -code not in _SENT):
        how = "" if code == _OUT_OF_MEMORY else f" (ended by {signal.Signals(-code).name})"
        allowed = f"the {memory / (1 << 30):.1f}G of --max-memory" if memory is not None else "there is"
        raise GuardError(f"the command needs more memory than {allowed}{how}; allow more")
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """In the child process: exit with a code of its own at the time or memory limit, which the parent reports."""
    if not inside():
        yield
        return
    if hasattr(signal, "pthread_kill"):
        threading.Thread(target=_end_with, args=(int(os.environ[_PARENT]),), daemon=True).start()
    if seconds := os.environ[_INSIDE]:
        signal.signal(_STOP, _time_is_up)
        threading.Thread(target=_watch, args=(float(seconds),), daemon=True).start()
    try:
        yield
    except TimeIsUp:
        sys.exit(_TIME_IS_UP)
    except MemoryError:
        sys.exit(_OUT_OF_MEMORY)


def _watch(seconds: float) -> None:
    """Request the command to stop; native code ignores that, and is not waited for."""
    time.sleep(seconds)
    signal.pthread_kill(threading.main_thread().ident or 0, _STOP)
    time.sleep(_GRACE)
    abandon()
    os._exit(_TIME_IS_UP)


def _end_with(parent: int) -> None:
    """A parent that was killed cannot end this process: it ends itself, as it would have been ended."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


def _time_is_up(*_: object) -> NoReturn:
    raise TimeIsUp


def _limit(memory: int):
    try:
        import resource
    except ImportError:
        raise GuardError("--max-memory: this system has no limit to set; leave it out") from None
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    return lambda: resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _awaited(child: subprocess.Popen[bytes], seconds: float | None) -> int:
    """Its exit code. A process that does not end itself in time is killed."""
    interrupted = False
    while True:
        try:
            return child.wait(0 if interrupted and seconds is None else seconds)
        except KeyboardInterrupt:  # the terminal interrupts the child too, which cleans up; a second interrupt kills it
            seconds, interrupted = (None if interrupted else 3 * _GRACE), True
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            if interrupted:
                print("interrupted", file=sys.stderr)
            return _INTERRUPTED if interrupted else _TIME_IS_UP


@contextlib.contextmanager
def _forwarded(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whoever ends the parent means the child."""
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
