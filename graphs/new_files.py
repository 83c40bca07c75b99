"""Files that were not there before, to be written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

from .errors import OutputRefused

Data = Literal["link", "copy", "reference"]  # how big files get into a folder


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Create a file to write. An existing file may be a hard link to the source's own bytes, because a model's weights may
    have one of our names.

    Raises:
        OutputRefused: the file exists.
    """
    try:
        with path.open("xb") as file:
            yield file
    except FileExistsError:
        raise OutputRefused(
            f"{path.name}: the model has a file of this name, which the guarded folder needs for its own; rename it"
        ) from None


def create_file(path: Path, content: bytes) -> None:
    """Write a file that was not there before.

    Raises:
        OutputRefused: as for `new_file`.
    """
    with new_file(path) as file:
        file.write(content)
