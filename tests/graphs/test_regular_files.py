"""What is read and hashed is a regular file of a size that can be read."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from vlmguard.graphs.digests import sha256_file, sha256_files
from vlmguard.graphs.errors import ModelUnreadable
from vlmguard.graphs.regular_files import SPARSE_UP_TO, NotRegular, read_regular

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="files that are none")


def odd(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "file"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        listening.close()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "device"])
def test_nothing_else_is_read_or_hashed_and_nothing_waits(tmp_path: Path, kind: str) -> None:
    path = odd(tmp_path, kind)
    with pytest.raises(NotRegular, match=r"^is no regular file$"):
        read_regular(path, 100)
    with pytest.raises(ModelUnreadable) as raised:
        sha256_file(path)
    assert str(raised.value) == f"{path}: is no regular file; copy it from the model again"


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"x" * 100)
    link.symlink_to(path)
    assert read_regular(path, 100) == read_regular(link, 100) == b"x" * 100
    with pytest.raises(NotRegular, match=r"^has 100 bytes, expected at most 99$"):
        read_regular(path, 99)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "nothing", 100)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_file_that_does_not_say_its_size_is_refused() -> None:
    with pytest.raises(NotRegular, match=r"^changes while it is read$"):
        read_regular(Path("/proc/self/status"), 100)


def sparse(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="sparse files")
def test_files_that_are_far_larger_than_what_the_disk_holds_are_not_hashed(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.write_bytes(b"x" * 4096)
    several = [sparse(tmp_path / f"part {number}", SPARSE_UP_TO // 4) for number in range(5)]
    for files in ([sparse(tmp_path / "huge", 1 << 42)], [whole, *several]):
        size = sum(file.stat().st_size for file in files)
        held = sum(file.stat().st_blocks for file in files) * 512
        with pytest.raises(ModelUnreadable) as raised:
            sha256_files(files)
        assert str(raised.value) == (
            f"{files[0]}: has {size} bytes with the files beside it, and the disk holds {held} of them; copy the model again, "
            "or limit the run with --max-seconds"
        )
    honest = sparse(tmp_path / "honest", 1 << 20)  # tests of large models are made of such files
    assert len(sha256_files([whole, honest])) == 2
