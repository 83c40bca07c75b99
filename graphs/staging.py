"""Writing a folder so that at any kill it is complete or absent: a hidden sibling first, then one rename."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from .digests import BIG
from .errors import OutputRefused
from .new_files import Data
from .places import require_no_tilde
from .replaceable import require_replaceable
from .stage_locks import OLD, begin, hold, remove, sweep, writer, written

_IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_FICLONE = 0x40049409  # linux/fs.h


@contextlib.contextmanager
def staged(directory: Path, force: bool = False) -> Iterator[Path]:
    """A temporary sibling of `directory` that becomes it when the block succeeds, and vanishes when it fails.

    Args:
        directory: what to write; its parent must exist or be creatable.
        force: replace an existing folder.

    Raises:
        OutputRefused: it exists and `force` is not set, is a file, or cannot be written.
    """
    directory = directory.absolute()
    require_writable(directory, force)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        stage, lock = begin(directory, Path.mkdir)
    except OSError as error:
        raise OutputRefused(f"{directory}: cannot be written ({error.strerror}); choose another OUT") from None
    with written(stage, lock):
        try:
            yield stage
            _swap(stage, directory, force)
        except OSError as error:
            raise OutputRefused(
                f"{directory}: cannot be written ({error.strerror or error}); choose another OUT"
            ) from error


def require_writable(directory: Path, force: bool) -> None:
    """Refuse early, before minutes of work, what would be refused at the end.

    Raises:
        OutputRefused: as for `staged`.
        GuardError: a part of its path is a literal `~`.
    """
    directory = directory.absolute()
    require_no_tilde(directory)
    sweep(directory)
    if (directory.exists() or directory.is_symlink()) and not directory.is_dir():  # a link to nothing is in the way too
        raise OutputRefused(f"{directory}: is a file; choose a folder for OUT")
    if directory.exists() and not force:
        raise _exists(directory)
    if writer(directory):
        raise OutputRefused(f"{directory}: another run is writing it; wait for it, or choose another OUT")
    if force and directory.exists() and _precious(directory):
        raise OutputRefused(f"{directory}: holds more than a model, --force will not replace it; choose another OUT")
    if force and directory.exists() and not directory.is_symlink():  # of a link, the link alone is replaced
        require_replaceable(directory)
    parent = next(folder for folder in (directory.parent, *directory.parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputRefused(f"{directory}: cannot be written (no permission in {parent}); choose another OUT")


def _exists(directory: Path) -> OutputRefused:
    return OutputRefused(f"{directory}: exists already; choose another OUT, or replace it with --force")


def _precious(directory: Path) -> bool:
    """Whether a mistyped OUT would cost more than a model: a repository, or a folder that people live in."""
    lived_in = {Path.cwd().resolve(), Path.home().resolve()}
    real = directory.resolve()
    return (directory / ".git").exists() or any(real == place or real in place.parents for place in lived_in)


def require_writable_file(path: Path, force: bool) -> None:
    """Refuse early, before minutes of work, a file that `write_file` could not write at the end.

    Raises:
        OutputRefused: it is a folder, exists and `force` is not set, or cannot be written.
        GuardError: a part of its path is a literal `~`.
    """
    path = path.absolute()
    require_no_tilde(path)
    if path.is_dir():
        raise OutputRefused(f"{path}: is a folder; choose a file")
    if path.exists() and not force:
        raise OutputRefused(f"{path}: exists already; choose another file, or replace it with --force")
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputRefused(f"{path}: cannot be written (no permission in {parent}); choose another file")


def write_file(path: Path, content: bytes) -> None:
    """One file, whole or not at all.

    Raises:
        OutputRefused: it cannot be written.
        GuardError: a part of its path is a literal `~`.
    """
    require_no_tilde(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        temporary, lock = begin(path, Path.touch)
        with written(temporary, lock):
            temporary.write_bytes(content)
            temporary.replace(path)
    except OSError as error:
        raise OutputRefused(f"{path}: cannot be written ({error.strerror}); choose another file") from None


def bring(source: Path, destination: Path, data: Data = "link") -> None:
    """Bring an untouched file along. A link (Hugging Face's cache) is followed first, so that the result stands alone.

    Args:
        data: what happens to big files. `link`: share the bytes, as a reflink (a copy that costs nothing until one of the
            two is changed) or else a hard link, and copy where the file system allows neither. `copy`: bytes of its own.
            `reference`: a symbolic link, for runtimes that follow one out of the model's folder.

    Small files are always copied: they are what people edit in place, and a link would carry that edit into the source.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()
    if source.stat().st_size < BIG or data == "copy":
        shutil.copyfile(source, destination)
    elif data == "reference":
        destination.symlink_to(source)
    elif not _reflink(source, destination):
        try:
            os.link(source, destination)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, destination)


def _reflink(source: Path, destination: Path) -> bool:
    """A copy on write, where the file system has such (btrfs, XFS, bcachefs); whether it worked."""
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        with source.open("rb") as original, destination.open("wb") as clone:
            fcntl.ioctl(clone.fileno(), _FICLONE, original.fileno())
    except OSError:
        destination.unlink(missing_ok=True)
        return False
    return True


def _swap(stage: Path, directory: Path, force: bool) -> None:
    """The old folder is moved away, not emptied, so that a reader never sees half of one.

    Without `force`, what another run wrote in the meantime stays: a rename does not replace a folder that holds something.
    """
    if not (force and directory.exists()):
        if directory.exists():
            raise _exists(directory)
        try:
            stage.rename(directory)
        except OSError as error:
            raise _exists(directory) if error.errno in _IN_THE_WAY else error from None
        return
    if not directory.is_symlink():
        require_replaceable(directory)  # again: files may have come since the run began
    old = directory.parent / f"{stage.name}{OLD}"
    lock = hold(directory)
    try:
        directory.rename(old)
        try:
            stage.rename(directory)
        except OSError:
            old.rename(directory)
            raise
        remove(old)
    finally:
        os.close(lock)
