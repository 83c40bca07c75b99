"""Caches files: content that was read from a file is kept until the file changes.

One export needs the decoder's graph and the small configs in many places. The first use reads the file.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
Stamp = tuple[int, int, int, int, int]


def stamp_of(path: Path) -> Stamp | None:
    """Device, inode, size and times of a file: different after any change, also one that keeps the time of modification.
    `None` if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@dataclass
class ReadOnce(Generic[T]):
    """Contents by path, the most recently used.

    Attributes:
        most: files that are kept.
        largest: size of a content that is kept, in bytes.
        size: of a content.
    """

    most: int
    largest: int
    size: Callable[[T], int]
    _kept: OrderedDict[Path, tuple[Stamp, T]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, path: Path, read: Callable[[Path], T]) -> T:
        """The current result of `read` for the file. Callers share it and must not change it.

        Args:
            path: of the file.
            read: called if the file was not read yet, or has changed since.

        Raises:
            Exception: what `read` raises; nothing is kept then.
        """
        stamp = stamp_of(path)
        with self._lock:
            kept = self._kept.get(path)
            if kept is not None and kept[0] == stamp:
                self._kept.move_to_end(path)
                return kept[1]
        content = read(path)
        # A file that changed while it was read is read again next time.
        if stamp is not None and self.size(content) <= self.largest and stamp_of(path) == stamp:
            with self._lock:
                self._kept[path] = stamp, content
                self._kept.move_to_end(path)
                while len(self._kept) > self.most:
                    self._kept.popitem(last=False)
        return content
