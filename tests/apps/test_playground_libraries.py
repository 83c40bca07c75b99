"""The page's libraries against a registry of ours: fetched once, checked to the bit, never unpacked; refusals in one line."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import tarfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from vlmguard.apps.playground import libraries
from vlmguard.apps.playground.libraries import LIBRARIES, Library, find_libraries, libraries_folder
from vlmguard.graphs.errors import GuardError

NAME, FILE, CONTENT = "@us/made", "dist/made.mjs", b"export const made = 1;\n"
_POLL = 0.01  # seconds until a server notices that it is to end
HOSTILE = "../../../outside.mjs"

Entry = tuple[str, bytes]


def archive(*entries: Entry, link: str | None = None) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if link is not None:
            member = tarfile.TarInfo(link)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
            tar.addfile(member)
    return made.getvalue()


def library(content: bytes, **files: bytes) -> Library:
    pins = {name: hashlib.sha256(body).hexdigest() for name, body in (files or {FILE: CONTENT}).items()}
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    return Library(NAME, "1.2.3", integrity, pins)


GOOD = archive(
    ("package/package.json", b"{}"), (f"package/{FILE}", CONTENT), (HOSTILE, b"x"), ("/tmp/absolute.mjs", b"x")
)


class Registry:
    """Gives one archive at every address, and remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.content: bytes | None = GOOD
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                registry.asked.append(self.path)
                self.send_response(200 if registry.content is not None else 404)
                self.send_header("Content-Length", str(len(registry.content or b"")))
                self.end_headers()
                self.wfile.write(registry.content or b"")

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Registry]:
    made = Registry()
    Thread(target=made.server.serve_forever, args=[_POLL], daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"{made.url}/")
    monkeypatch.setenv("VLMGUARD_CACHE", str(tmp_path / "cache"))
    yield made
    made.server.shutdown()
    made.server.server_close()


def refused(call: Callable[[], object]) -> str:
    """The sentence, on one line; the cache is empty or was never made."""
    with pytest.raises(GuardError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert not libraries_folder().exists() or not list(libraries_folder().iterdir())
    return str(caught.value)


def test_a_library_is_fetched_once_and_kept(registry: Registry, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    found = find_libraries(report_progress=lambda *now: told.append(now), libraries=[library(GOOD)])
    path = tmp_path / "cache" / "playground" / "@us+made-1.2.3" / FILE
    assert found == {(NAME, FILE): path} and path.read_bytes() == CONTENT
    assert registry.asked == ["/@us/made/-/made-1.2.3.tgz"]
    assert told[-1] == ("fetching @us/made@1.2.3 (bytes)", len(GOOD), len(GOOD))
    assert find_libraries(libraries=[library(GOOD)]) == found
    assert len(registry.asked) == 1


def test_without_a_cache_a_library_is_kept_as_long_as_the_process_runs(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMGUARD_CACHE", "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "of the system"))
    (tmp_path / "of the system").mkdir()
    left = []
    monkeypatch.setattr("atexit.register", lambda *call, **options: left.append((call, options)))
    libraries._for_this_process.cache_clear()
    found = find_libraries(libraries=[library(GOOD)])
    assert find_libraries(libraries=[library(GOOD)]) == found and len(registry.asked) == 1
    assert found[NAME, FILE].read_bytes() == CONTENT and tmp_path / "of the system" in found[NAME, FILE].parents
    (((remove, folder), options),) = left
    remove(folder, **options)  # as the end of the process does
    assert not list((tmp_path / "of the system").iterdir())
    libraries._for_this_process.cache_clear()


def test_of_an_archive_only_the_listed_files_are_read(registry: Registry, tmp_path: Path) -> None:
    find_libraries(libraries=[library(GOOD)])
    written = [path.relative_to(tmp_path).name for path in tmp_path.rglob("*") if path.is_file()]
    assert written == ["made.mjs"]
    assert not (tmp_path.parent / "outside.mjs").exists() and not Path("/tmp/absolute.mjs").exists()


def test_a_cache_that_was_damaged_is_filled_again(registry: Registry) -> None:
    (path,) = find_libraries(libraries=[library(GOOD)]).values()
    path.write_bytes(b"export const made = 'evil';\n")
    assert find_libraries(libraries=[library(GOOD)])[NAME, FILE].read_bytes() == CONTENT
    assert len(registry.asked) == 2


def test_another_archive_than_the_pinned_one_is_refused(registry: Registry) -> None:
    registry.content = archive((f"package/{FILE}", CONTENT + b"// and more"))
    assert refused(lambda: find_libraries(libraries=[library(GOOD)])) == (
        f"{registry.url}/@us/made/-/made-1.2.3.tgz: is not the @us/made@1.2.3 that is pinned (SHA-512 differs); ask another "
        "registry, or name a node_modules with --assets"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (archive(("package/other.mjs", CONTENT)), "has no such dist/made.mjs as is pinned"),
        (archive((f"package/{FILE}", b"other")), "has no such dist/made.mjs as is pinned"),
        (archive(link=f"package/{FILE}"), "has no such dist/made.mjs as is pinned"),
        (GOOD[: len(GOOD) // 2], "cannot be read (Compressed file ended before the end-of-stream marker was reached)"),
        (b"<html>", "cannot be read (not a gzip file)"),
    ],
)
def test_a_pinned_archive_without_the_file_is_refused(registry: Registry, content: bytes, said: str) -> None:
    registry.content = content
    sentence = refused(lambda: find_libraries(libraries=[library(content)]))
    assert sentence == f"the archive of @us/made@1.2.3 {said}; ask another registry"


def test_no_network_says_what_to_do_instead(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.content = None
    said = refused(lambda: find_libraries(libraries=[library(GOOD)]))
    assert said == (
        f"@us/made@1.2.3 cannot be fetched from {registry.url}/@us/made/-/made-1.2.3.tgz (Not Found); where there is a "
        "network, run `npm install onnxruntime-web@1.30.0 @huggingface/tokenizers@0.2.0 @huggingface/jinja@0.5.11`, and name "
        "its node_modules with --assets"
    )
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    assert "Connection refused" in refused(lambda: find_libraries(libraries=[library(GOOD)]))
    monkeypatch.setenv("npm_config_registry", "file:///etc")
    assert refused(lambda: find_libraries(libraries=[library(GOOD)])) == (
        "npm_config_registry is 'file:///etc'; name a registry that begins with https:// or http://"
    )


def test_a_folder_of_the_users_is_checked_too(registry: Registry, tmp_path: Path) -> None:
    modules = tmp_path / "node_modules"
    path = modules / NAME / FILE
    wanted = [library(GOOD)]
    asked = (
        f"the playground runs on @us/made@1.2.3, and this file {{}}; run `npm install @us/made@1.2.3` beside {modules}"
    )
    assert refused(lambda: find_libraries(modules, libraries=wanted)) == f"{path}: {asked.format('is missing')}"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"another version's")
    sentence = f"{path}: {asked.format('is not that version' + chr(39) + 's')}"
    assert refused(lambda: find_libraries(modules, libraries=wanted)) == sentence
    path.write_bytes(CONTENT)
    assert find_libraries(modules, libraries=wanted) == {(NAME, FILE): path}
    assert registry.asked == []


def test_every_library_is_pinned() -> None:
    for wanted in LIBRARIES:
        assert re.fullmatch(r"\d+\.\d+\.\d+", wanted.version)
        assert len(base64.b64decode(wanted.integrity.removeprefix("sha512-"))) == 64
        assert wanted.files and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in wanted.files.values())
