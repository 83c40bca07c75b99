"""Allowed places for the pictures of a prompts file: its folder, and folders that the user allows.

A prompts file is untrusted input. Without this rule a row could name any file of the reader's machine as its picture.
"""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath

from ...graphs.errors import PromptsUnusable
from ...graphs.links import is_cached_blob

PICTURE_FOLDERS = "VLMGUARD_PICTURE_FOLDERS"  # folders that the user allows besides, separated as in PATH


def picture_path(prompts: Path, number: int, named: str, up: int = 0) -> Path:
    """The picture that a row names.

    Args:
        prompts: the file with the row.
        number: of the row, for the sentence.
        named: relative to the file, or absolute.
        up: how many folders above the file's own the format keeps pictures in.

    Raises:
        PromptsUnusable: it lies elsewhere.
    """
    folder = prompts.parent.resolve()
    root = [folder, *folder.parents][min(up, len(folder.parents))]
    allowed = [Path(entry).resolve() for entry in os.environ.get(PICTURE_FOLDERS, "").split(os.pathsep) if entry]
    path = prompts.parent / named
    try:
        real = path.resolve()
        inside = any(real.is_relative_to(place) for place in (root, *allowed))
        cached = (
            ".." not in PureWindowsPath(named).parts
            and path.is_relative_to(prompts.parent)
            and is_cached_blob(path, real)
        )
    except (OSError, ValueError, RuntimeError):  # no name that a file can have, links in a circle
        inside = cached = False
    if not (inside or cached):
        raise PromptsUnusable(
            f"{prompts}: line {number} names the image {named[:200]!r}, which is not in the folder of the file; copy it there, "
            f"or allow its folder with {PICTURE_FOLDERS}"
        )
    return path
