"""Reading a file that is one: no FIFO that waits for ever, no device without an end, and no more bytes than it may have.

A check by name (`Path.is_file`) can be answered by one file and the read by another. Here the file is opened first, without
waiting, and then judged.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


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
        content = file.read(most + 1) if size <= most else b""
        if size > most or len(content) > most:  # a file of /proc has a size of 0
            raise NotRegular(f"has {max(size, len(content))} bytes, expected at most {most}")
        return content


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, open for reading; errors as for `read_regular`."""
    # O_NONBLOCK: to open a FIFO would wait for its writer. It changes nothing for a regular file.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except IsADirectoryError:
        raise NotRegular("is no regular file") from None
    except OSError as error:
        if error.errno == 6:  # ENXIO: a socket, or a device that is not there
            raise NotRegular("is no regular file") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegular("is no regular file")
    return descriptor
