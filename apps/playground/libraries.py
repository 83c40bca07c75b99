"""The JavaScript that the page runs on and that is not ours: pinned, fetched once from the npm registry, checked, kept.

It is not in our wheel: onnxruntime-web's WebAssembly alone is larger than all of vlmguard. Each package is pinned by the
registry's own SHA-512 of its archive, and each file that is served by its SHA-256, so that a mirror, a cache or a
`node_modules` folder need not be trusted. Of an archive only the listed files are read, by name; nothing is unpacked.
"""

from __future__ import annotations

import atexit
import base64
import hashlib
import http.client
import io
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ...graphs.digests import sha256_file
from ...graphs.errors import GuardError, OutputRefused, first_line
from ...graphs.new_files import create_file
from ...graphs.progress import ProgressCallback, ignore_progress
from ...graphs.staging import staged
from ...graphs.user_cache import cache_folder

REGISTRY = "https://registry.npmjs.org"
_REGISTRY_NAMES = ("npm_config_registry", "NPM_CONFIG_REGISTRY")  # npm reads both
_SECONDS = 30  # without a byte
_LARGEST = 128 << 20  # bytes, of an archive and of a file in it
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Library:
    """One npm package at one version.

    Attributes:
        name, version: in the registry.
        integrity: SHA-512 of the archive, base64, in the format of lock files.
        files: path in the package -> SHA-256, of the files that the page uses.
    """

    name: str
    version: str
    integrity: str
    files: Mapping[str, str]

    @property
    def archive(self) -> str:
        """The archive's path below the registry."""
        return f"{self.name}/-/{self.name.rpartition('/')[2]}-{self.version}.tgz"

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


# For another version, run `npm view NAME@VERSION dist.integrity` and `sha256sum`.
LIBRARIES = (
    Library(
        "onnxruntime-web",
        "1.30.0",
        "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        {
            "dist/ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
            "dist/ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
            "dist/ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
            "dist/ort.webgpu.min.mjs": "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0",
            "dist/ort-wasm-simd-threaded.asyncify.mjs": "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28",
            "dist/ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
        },
    ),
    Library(
        "@huggingface/tokenizers",
        "0.2.0",
        "sha512-LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
        {"dist/tokenizers.min.mjs": "258e46332101335ce8d95aed7745b19ac3b46d37f3e159a89cf894c2ea9b1d3a"},
    ),
    Library(
        "@huggingface/jinja",
        "0.5.11",
        "sha512-YzEzwM5oQf4r0vs7ifWQ+yuVR1YkAHrjERQ+a8WRsStHHp4NRBg+NesjiFc+X2AFUpRvvrIeHDS1xFy9jY/IjQ==",
        {"dist/index.js": "c8871915dfa68f976c11540c33fc9341c0810ebe29adb7027b8d51f2a8044936"},
    ),
)


def find_libraries(
    folder: Path | None = None,
    report_progress: ProgressCallback = ignore_progress,
    libraries: Sequence[Library] = LIBRARIES,
) -> dict[tuple[str, str], Path]:
    """Return the files of the libraries, with checked digests; missing packages are downloaded to the cache.

    Args:
        folder: a `node_modules` folder with the packages; nothing is downloaded then. `None`: the user's cache.
        report_progress: called with `(stage, done, total)`, in bytes.
        libraries: the packages.

    Returns:
        `(package, path in it)` -> file.

    Raises:
        GuardError: the folder lacks a file or has another version; an archive cannot be downloaded, or its digest differs from
            the pinned one.
    """
    files = {}
    for library in libraries:
        home = folder / library.name if folder is not None else _cached(library, report_progress)
        for name, digest in library.files.items():
            path = home / name
            if not _is(
                path, digest
            ):  # only of a folder that the user named: the cache was checked, or written just now
                what = "is not that version's" if path.is_file() else "is missing"
                raise GuardError(
                    f"{path}: the playground runs on {library}, and this file {what}; "
                    f"run `npm install {library}` beside {folder}"
                )
            files[library.name, name] = path
    return files


@cache
def _for_this_process() -> Path:
    """A folder that goes when the process ends."""
    made = Path(tempfile.mkdtemp(prefix="vlmguard-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def libraries_folder() -> Path:
    """Folder of downloaded libraries: `playground` in the user's cache, or temporary without a cache."""
    folder = cache_folder()
    return _for_this_process() if folder is None else folder / "playground"


def registry() -> str:
    """URL of the registry, or of the mirror in npm's environment variables."""
    named = next(filter(None, map(os.environ.get, _REGISTRY_NAMES)), REGISTRY)
    if not named.startswith(("https://", "http://")):
        raise GuardError(f"npm_config_registry is {named!r}; name a registry that begins with https:// or http://")
    return named.rstrip("/")


def _cached(library: Library, report_progress: ProgressCallback) -> Path:
    home = libraries_folder() / f"{library.name.replace('/', '+')}-{library.version}"
    if _complete(home, library):
        return home
    content = _fetch(library, report_progress)
    files = _read_archive(library, content)
    shutil.rmtree(home, ignore_errors=True)  # damaged, if it is there at all
    try:
        with staged(home) as stage:
            for name, body in files.items():
                (stage / name).parent.mkdir(parents=True, exist_ok=True)
                create_file(stage / name, body)
    except OutputRefused as error:
        if not _complete(home, library):  # another process may have written it meanwhile
            raise GuardError(
                f"{home}: cannot be written ({first_line(error)}); set VLMGUARD_CACHE, or name a node_modules with --assets"
            ) from None
    return home


def _complete(home: Path, library: Library) -> bool:
    return all(_is(home / name, digest) for name, digest in library.files.items())


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_file(path) == digest


def _fetch(library: Library, report_progress: ProgressCallback) -> bytes:
    """The archive, against its integrity."""
    url = f"{registry()}/{library.archive}"
    received = io.BytesIO()
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
            total = int(answer.headers.get("Content-Length") or 0)
            while chunk := answer.read(_CHUNK):
                received.write(chunk)
                if received.tell() > _LARGEST:
                    raise GuardError(
                        f"{url}: has more than {_LARGEST} bytes, which {library} has not; ask another registry"
                    )
                report_progress(f"fetching {library} (bytes)", received.tell(), max(total, received.tell()))
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise GuardError(
            f"{library} cannot be fetched from {url} ({first_line(Exception(reason))}); where there is a network, run "
            "`npm install " + " ".join(map(str, LIBRARIES)) + "`, and name its node_modules with --assets"
        ) from None
    digest = base64.b64encode(hashlib.sha512(received.getvalue()).digest()).decode()
    if f"sha512-{digest}" != library.integrity:
        raise GuardError(
            f"{url}: is not the {library} that is pinned (SHA-512 differs); ask another registry, or name a node_modules "
            "with --assets"
        )
    return received.getvalue()


def _read_archive(library: Library, content: bytes) -> dict[str, bytes]:
    """The listed files, by their names in npm's archive; links, devices and other entries are ignored."""
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for member in archive:
                name = member.name.removeprefix("package/")
                if name in library.files and member.isreg() and member.size <= _LARGEST:
                    file = archive.extractfile(member)
                    assert file is not None
                    found[name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise GuardError(
            f"the archive of {library} cannot be read ({first_line(error)}); ask another registry"
        ) from None
    for name, digest in library.files.items():
        if name not in found or hashlib.sha256(found[name]).hexdigest() != digest:
            raise GuardError(f"the archive of {library} has no such {name} as is pinned; ask another registry")
    return found
