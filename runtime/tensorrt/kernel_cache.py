"""TensorRT-RTX's runtime cache on disk: the kernels that it compiled on this machine, so that the next start is fast.

A cache holds code for the GPU. So it is never read from a model's folder, only from a file that this user alone can write.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from ...graphs.user_cache import cache_folder


def default_path(sha256: str) -> Path | None:
    """`engines/<digest of the engine>.rtxcache` in the user's cache folder; `None` where the cache is off."""
    folder = cache_folder()
    return None if folder is None else folder / "engines" / f"{sha256}.rtxcache"


class RuntimeCache:
    """One engine's cache and its file.

    Args:
        cache: an `IRuntimeCache`; it is filled from the file, if TensorRT finds that it fits this GPU, driver and version.
        path: the file; a missing, broken, foreign or other user's file is ignored. `None`: nothing is kept.
    """

    def __init__(self, cache: Any, path: Path | None) -> None:
        self._cache, self._path = cache, path
        self._kept = None if path is None else _read(path)
        if self._kept is not None and not cache.deserialize(self._kept):
            self._kept = None

    def save(self) -> None:
        """Write what was compiled since, atomically. A cache that cannot be written is done without."""
        if self._path is None:
            return
        serialized = self._cache.serialize()
        content = b"" if serialized is None else bytes(memoryview(serialized))
        if not content or content == self._kept:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._path.parent)  # for this user alone, by its contract
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
                Path(name).replace(self._path)
            except OSError:
                Path(name).unlink(missing_ok=True)
                raise
            self._kept = content


def _read(path: Path) -> bytes | None:
    """The file if it is this user's, no link, and no other user can write it; checked on the open file, not on its name."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if os.name == "posix" and (status.st_uid != os.getuid() or others_write or not stat.S_ISREG(status.st_mode)):
            return None
        return file.read()
