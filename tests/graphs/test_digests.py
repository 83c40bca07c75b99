"""Digests of many files at once: what hashlib says, each content read once, and whoever waits is told."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmguard.graphs import digests
from vlmguard.graphs.digests import sha256_file, sha256_files


def expected(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@settings(max_examples=40, deadline=None)
@given(contents=st.lists(st.binary(max_size=300), max_size=8), chunk=st.integers(1, 64))
def test_every_digest_is_hashlibs(tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], chunk: int) -> None:
    """Whatever the files hold, also where none fits into the buffer; and all of it is told, in order."""
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    told: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "_CHUNK", chunk)
        found = sha256_files(paths, lambda done, total: told.append((done, total)))
    assert found == {path: expected(path) for path in paths} and list(found) == paths
    total = sum(map(len, contents))
    done = [count for count, _ in told]
    assert done == sorted(set(done)) and {of for _, of in told} <= {total}
    assert (done[-1] if done else 0) == total


def test_a_file_larger_than_the_buffer_is_hashed_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (digests._CHUNK // 256 + 3))
    assert sha256_file(path) == expected(path)


def test_what_is_one_content_is_read_once(tmp_path: Path) -> None:
    """Hard links and symbolic links to one file, and the same path twice; equal bytes in two files are two contents."""
    file, other = tmp_path / "file", tmp_path / "other"
    for path in (file, other):
        path.write_bytes(b"x" * 100)
    os.link(file, tmp_path / "hard")
    (tmp_path / "soft").symlink_to("file")
    told: list[tuple[int, int]] = []
    paths = [tmp_path / name for name in ("file", "hard", "soft", "other", "file")]
    found = sha256_files(paths, lambda done, total: told.append((done, total)))
    assert found == {path: expected(file) for path in paths}
    assert told[-1] == (200, 200) and len(told) == 2


def test_no_files_have_no_digests() -> None:
    assert sha256_files([], lambda done, total: pytest.fail("there is nothing to tell")) == {}


def test_an_empty_file_has_a_digest(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert sha256_file(tmp_path / "empty") == hashlib.sha256().hexdigest()


def test_a_file_that_is_not_there_is_the_callers_to_know(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sha256_file(tmp_path / "gone")
