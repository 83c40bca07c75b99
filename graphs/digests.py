"""SHA-256 of many files, big ones included: streamed, several files at once, each content read once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from .errors import ModelUnreadable
from .progress import CountCallback
from .regular_files import NotRegular, open_regular, require_dense

# From this size on a file is weights: worth sharing instead of copying, and worth not reading twice. Bytes.
BIG = 16 << 20
_CHUNK = 8 << 20
# hashlib releases the interpreter's lock, so threads suffice; more than this only compete for one disk.
_WORKERS = min(8, os.cpu_count() or 1)


def sha256_file(path: Path) -> str:
    """Hex digest, streamed."""
    return sha256_files([path])[path]


def sha256_files(paths: Iterable[Path], report_count: CountCallback | None = None) -> dict[Path, str]:
    """Hex digest of every path; hard links to one file are read once.

    Args:
        report_count: called with `(done, total)` bytes, from several threads but never at the same time.

    Raises:
        ModelUnreadable: a path is no regular file, or the files are far larger than what the disk holds of them.
    """
    wanted = list(dict.fromkeys(paths))
    try:
        require_dense(path.stat() for path in wanted)
    except NotRegular as error:
        raise ModelUnreadable(
            f"{wanted[0]}: {error}; copy the model again, or limit the run with --max-seconds"
        ) from None
    contents: dict[tuple[int, int], Path] = {}
    for path in wanted:
        contents.setdefault(_content(path), path)
    counter = _ByteCounter(sum(path.stat().st_size for path in contents.values()), report_count)
    with ThreadPoolExecutor(_WORKERS) as pool:
        digests = dict(zip(contents, pool.map(lambda path: _digest(path, counter), contents.values()), strict=True))
    return {path: digests[_content(path)] for path in wanted}


class _ByteCounter:
    def __init__(self, total: int, report_count: CountCallback | None) -> None:
        self.total, self.report_count, self.done, self.lock = total, report_count, 0, Lock()

    def add(self, count: int) -> None:
        if self.report_count is None:
            return
        with self.lock:
            self.done += count
            self.report_count(self.done, self.total)


def _digest(path: Path, counter: _ByteCounter) -> str:
    digest = hashlib.sha256()
    try:
        descriptor = open_regular(path)
    except NotRegular as error:
        raise ModelUnreadable(f"{path}: {error}; copy it from the model again") from None
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(_CHUNK, max(os.fstat(file.fileno()).st_size, 1))))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            counter.add(count)
    return digest.hexdigest()


def _content(path: Path) -> tuple[int, int]:
    """Equal for two paths to the same bytes; links are followed."""
    status = path.stat()
    return status.st_dev, status.st_ino
