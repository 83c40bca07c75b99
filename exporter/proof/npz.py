"""Reading an `.npz` of arrays that is untrusted input."""

from __future__ import annotations

import os
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np

from ...graphs.errors import ModelUnreadable, first_line
from ...graphs.regular_files import open_regular

LARGEST = 8 << 30  # bytes, unpacked: a cache of a long prompt in float32 has some gigabytes
MOST_ARRAYS = 10_000


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays by name.

    Raises:
        ModelUnreadable: it is no such file, holds objects, or unpacks to more than `LARGEST` bytes.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            with ZipFile(file) as archive:  # `zipfile` unpacks no more than the declared size
                sizes = [entry.file_size for entry in archive.infolist()]
            if len(sizes) > MOST_ARRAYS or sum(sizes) > LARGEST:
                raise ValueError(f"{len(sizes)} arrays of {sum(sizes)} bytes, expected at most {LARGEST}")
            file.seek(0)
            with np.load(file, allow_pickle=False) as content:
                return {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, BadZipFile, MemoryError, NotImplementedError, RuntimeError) as error:
        raise ModelUnreadable(
            f"{path}: is no .npz of arrays ({first_line(error)}); write it with numpy.savez"
        ) from None
