"""The hidden siblings of OUT: the stage of a running export, and leftovers of killed runs.

A run holds a lock (`flock`) on its stage, and the kernel releases it when the run ends in any way. So a stage without a
lock belongs to a dead run, whichever process has its number now, in this container or another.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from .whole_numbers import whole_number

try:
    import fcntl
except ImportError:  # Windows: by the process's number alone
    fcntl = None

MARK = ".vlmguard-"
OLD = "-old"
_mine: set[Path] = set()  # what this process is writing


def begin(path: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    """A new hidden sibling that will become `path`, and the lock on it, to be closed at the end.

    Before it is locked, another run may remove it as abandoned: then it is created again.
    """
    while True:
        new = path.with_name(f".{path.name}{MARK}{os.getpid()}-{secrets.token_hex(4)}")
        make(new)
        try:
            lock = hold(new)
        except FileNotFoundError:
            continue
        if new.exists():
            return new, lock
        os.close(lock)


def hold(path: Path) -> int:
    """Lock a file or folder until its descriptor is closed, waiting for a run that cleans up; the descriptor.

    Raises:
        OSError: it is not there any more.
    """
    descriptor = os.open(path, os.O_RDONLY)
    if fcntl is not None:
        with contextlib.suppress(
            OSError
        ):  # a file system without locks: then the process's number is all that there is
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


@contextlib.contextmanager
def written(path: Path, lock: int) -> Iterator[None]:
    """Meanwhile `path` is this run's to write; afterwards it is gone, if it did not become something, and so is its lock."""
    _mine.add(path)
    try:
        yield
    finally:
        _mine.discard(path)
        try:
            remove(path)
        finally:
            os.close(lock)


def abandon() -> None:
    """Remove what this process is writing, from a thread, when the one that writes cannot be stopped any more."""
    for path in list(_mine):
        remove(path)


def writer(path: Path) -> Path | None:
    """The stage of a running export that will become `path`, if there is one."""
    return next((left for left in _siblings(path) if not left.name.endswith(OLD) and not _dead(left)), None)


def sweep(path: Path) -> None:
    """Remove what killed runs left behind; a run that is still alive keeps its own."""
    for left in _siblings(path):
        with _taken(left) as dead:
            if not dead:
                continue
            if left.name.endswith(OLD) and not path.exists():
                left.rename(path)  # killed between the two renames: the old folder is still the one that counts
            else:
                remove(left)


def remove(path: Path) -> None:
    """A file, a folder, or a link to one: the link alone."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _siblings(path: Path) -> Iterator[Path]:
    for left in sorted(path.parent.glob(f".{glob.escape(path.name)}{MARK}*")):
        if _process(left) is not None:
            yield left


def _dead(left: Path) -> bool:
    with _taken(left) as dead:
        return dead


@contextlib.contextmanager
def _taken(left: Path) -> Iterator[bool]:
    """Whether no run writes it; then it is locked meanwhile, so that no run starts to."""
    by_number = not _running(_process(left))
    try:
        descriptor = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) if fcntl is not None else None
    except OSError:  # a link, which has no lock of its own
        descriptor = None
    if fcntl is None or descriptor is None:
        yield by_number
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        dead = True
    except BlockingIOError:
        dead = False
    except OSError:  # a file system without locks
        dead = by_number
    try:
        yield dead
    finally:
        os.close(descriptor)


def _process(left: Path) -> int | None:
    """The number in a stage's name; `None` for a name that no run gives."""
    return whole_number(left.name.partition(MARK)[2].partition("-")[0])


def _running(number: int | None) -> bool:
    if not number:  # 0 would ask about this process's own group
        return False
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
