"""Symbolic links in an untrusted folder: they must stay inside the folder.

Links of one layout are followed: the Hugging Face cache, where every file of a snapshot is a link to a blob of the same
repository. Exactly this is allowed:

    models--NAME/snapshots/REVISION/.../FILE -> models--NAME/blobs/HEX

Only the last component may be a link. Any other link could make us read, and copy into a folder that is then published, any
file of the reader.
"""

from __future__ import annotations

import re
from pathlib import Path

from .errors import ModelUnreadable

_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")
_BLOB = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")  # SHA-1 of git, or SHA-256 of its large files


def require_own(path: Path, folder: Path) -> None:
    """A file that a folder holds is in the folder, or a blob of the Hugging Face cache that the folder lies in.

    Args:
        path: below `folder`, as it was named.
        folder: the model's; it may itself be reached by links, which are the user's own.

    Raises:
        ModelUnreadable: a link leads out.
    """
    real = path.resolve()
    if real.is_relative_to(folder.resolve()) or is_cached_blob(path, real):
        return
    raise ModelUnreadable(
        f"{path}: is a link out of the model's folder (to {real}); do not use it, or copy the model with its links followed"
    )


def is_cached_blob(path: Path, real: Path) -> bool:
    """Whether a link is one of the Hugging Face cache."""
    at = path.parent.resolve() / path.name  # its own folder may be named by a link; the last step alone leaves it
    repository = next((folder for folder in at.parents if folder.parent.name == "snapshots"), at).parent.parent
    return (
        _REPOSITORY.fullmatch(repository.name) is not None
        and at.is_relative_to(repository / "snapshots")
        and real.parent == repository / "blobs"
        and _BLOB.fullmatch(real.name) is not None
    )
