"""Reading a file that is one: no FIFO that waits for ever, no device without an end, and no more bytes than it may have.

A check by name (`Path.is_file`) can be answered by one file and the read by another. Here the file is opened first, without
waiting, and then judged.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

SPARSE_UP_TO = 64 << 30  # bytes
_BLOCK = 512  # bytes of `st_blocks`, whatever the file system's own are


class NotRegular(OSError):
    """A device, a FIFO, a folder, or a file that is too large: `str` is a clause about the file."""


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file; links are followed.

    Args:
        most: bytes that it may have.

    Raises:
        FileNotFoundError: there is none.
        NotRegular: it is something else, or larger.
        OSError: it cannot be read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise NotRegular(f"has {size} bytes, expected at most {most}")
        content = file.read(size + 1)
        if len(content) != size:  # files in /proc have size 0
            raise NotRegular("changes while it is read")
        return content


def require_dense(statuses: Iterable[os.stat_result]) -> None:
    """Require, before files are read, that the disk holds at least a part of their declared size.

    A sparse file can declare 8 EiB and occupy nothing. Up to `SPARSE_UP_TO` bytes in all this is allowed; beyond that a
    quarter must be on disk, because file systems compress.

    Raises:
        NotRegular: too little is on disk.
    """
    size = held = 0
    for status in statuses:
        size += status.st_size
        held += status.st_blocks * _BLOCK if hasattr(status, "st_blocks") else status.st_size
    if size > SPARSE_UP_TO + 4 * held:
        raise NotRegular(f"has {size} bytes with the files beside it, and the disk holds {held} of them")


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, open for reading; errors as for `read_regular`."""
    # O_NONBLOCK: to open a FIFO would wait for its writer. It changes nothing for a regular file.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except IsADirectoryError:
        raise NotRegular("is no regular file") from None
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device that is not there
            raise NotRegular("is no regular file") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegular("is no regular file")
    return descriptor
