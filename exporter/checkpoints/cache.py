"""Exports of checkpoints, kept for the next command: `inspect`, `directions`, `export` and `convert` of
one checkpoint export it once.

    CACHE/exports/KEY/model/         the model folder, as the exporter wrote it
    CACHE/exports/KEY/export.json    the checkpoint, its comparison with torch, size and time of change of every file

CACHE is the user's cache folder (`graphs.user_cache`). KEY is a digest of
the names, sizes and times of the checkpoint's files, of the options, and of the versions of everything that exports. When the
cache is larger than `VLMGUARD_CACHE_SIZE` (default 20G), the exports that were used longest ago are removed; those in use stay.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ...graphs.clock import wall_clock
from ...graphs.errors import GuardError
from ...graphs.progress import ProgressCallback, ignore_progress
from ...graphs.proof.structure import Check
from ...graphs.staging import bring
from ...graphs.user_cache import cache_folder
from .convert import locate
from .exporters import DEFAULT_EXPORTER, EXPORTERS, export_checkpoint

try:
    import fcntl
except ImportError:  # Windows: an export that was used today stays
    fcntl = None

CACHE_SIZE = "VLMGUARD_CACHE_SIZE"
DEFAULT_SIZE = "20G"
_SCHEMA = "vlmguard.cached-export/1"
_RECORD = "export.json"
_NEW = ".new-"  # what is being exported; a killed run leaves it behind
_DAY = 24 * 3600.0  # seconds
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_EXPORTING = (
    "huggingface-hub",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-genai",
    "onnxscript",
    "optimum-onnx",
    "torch",
    "transformers",
    "vlmguard",
)


@dataclass(frozen=True)
class Exported:
    """A checkpoint as a model folder.

    Attributes:
        folder: with its graphs; gone, or free to go, when the context ends.
        parity: the comparison with torch, where the exporter makes one.
        cached: whether an earlier command made it.
    """

    folder: Path
    parity: tuple[Check, ...]
    cached: bool = False


@contextlib.contextmanager
def exported(
    checkpoint: str | Path,
    exporter: str | None = None,
    dtype: str | None = None,
    opset: int | None = None,
    report_progress: ProgressCallback = ignore_progress,
    cache: bool = True,
) -> Iterator[Exported]:
    """A checkpoint's export, from the cache or made now.

    Args:
        checkpoint: a folder, or a hub id.
        exporter: a row of `exporters.EXPORTERS`; `None` is the default one.
        dtype: precision of the graphs; `None` is the exporter's own.
        opset: ONNX opset; `None` is the exporter's own.
        report_progress: called with `(stage, done, total)`.
        cache: whether to look into the cache and to keep the export there.

    Raises:
        GuardError: it cannot be exported, as `export_checkpoint` reports it.
    """
    exports = _exports() if cache else None
    if exports is None:
        with tempfile.TemporaryDirectory(prefix="vlmguard-") as temporary:
            folder = Path(temporary) / "exported"
            yield Exported(
                folder, export_checkpoint(checkpoint, folder, exporter, dtype, opset, report_progress=report_progress)
            )
        return
    entry = exports / key_of(locate(checkpoint), exporter, dtype, opset)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_in_use(entry))
        parity = _parity_of(entry)
        if cached := parity is not None:
            report_progress(f"using the export of {checkpoint} in {exports}", 0, 1)
        else:
            parity = _export(entry, checkpoint, exporter, dtype, opset, report_progress)
            stack.enter_context(_in_use(entry))
            _make_room(exports, _largest_size(), keep=entry)
        with contextlib.suppress(OSError):
            os.utime(entry)
        yield Exported(entry / "model", parity, cached)


def export_to(
    out: Path,
    checkpoint: str | Path,
    exporter: str | None = None,
    dtype: str | None = None,
    opset: int | None = None,
    report_progress: ProgressCallback = ignore_progress,
    cache: bool = True,
) -> tuple[Check, ...]:
    """A checkpoint's export as a folder of its own; big files share their bytes with the cache where the system can.

    Args:
        out: the folder to write, new or empty.
        checkpoint: a folder, or a hub id.
        exporter: a row of `exporters.EXPORTERS`; `None` is the default one.
        dtype: precision of the graphs; `None` is the exporter's own.
        opset: ONNX opset; `None` is the exporter's own.
        report_progress: called with `(stage, done, total)`.
        cache: whether to look into the cache and to keep the export there.

    Returns:
        The comparison with torch, where the exporter makes one.

    Raises:
        GuardError: it cannot be exported, as `export_checkpoint` reports it.
    """
    if not cache or _exports() is None:
        return export_checkpoint(checkpoint, out, exporter, dtype, opset, report_progress=report_progress)
    with exported(checkpoint, exporter, dtype, opset, report_progress) as export:
        for path in sorted(path for path in export.folder.rglob("*") if path.is_file()):
            bring(path, out / path.relative_to(export.folder), "link")
        return export.parity


def key_of(folder: Path, exporter: str | None, dtype: str | None, opset: int | None) -> str:
    """Digest of everything that an export depends on.

    Args:
        folder: the checkpoint; names, sizes and modification times of its files count, their contents are not read.
        exporter: the requested exporter.
        dtype: the requested precision.
        opset: the requested opset.
    """
    name, files = exporter or DEFAULT_EXPORTER, []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            status = path.stat()  # of what a link leads to: the hub's cache consists of links
            files.append([path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns])
    about = {
        "schema": _SCHEMA,
        "folder": str(folder.resolve()),
        "files": files,
        "options": [name, dtype or (EXPORTERS[name].dtypes[0] if name in EXPORTERS else None), opset],
        "versions": {name: _version(name) for name in _EXPORTING},
        "code": _code(),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def _code() -> str:
    """Digest of the modules that export: in a checkout they change without a new version."""
    here = Path(__file__).parent
    found = hashlib.sha256()
    for path in sorted([*here.glob("*.py"), *(here.parent / "families").glob("*.py")]):
        found.update(path.read_bytes())
    return found.hexdigest()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _exports() -> Path | None:
    """The folder of exports, made if need be; `None` where it cannot be."""
    root = cache_folder()
    if root is None:
        return None
    try:
        (root / "exports").mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    return root / "exports" if os.access(root / "exports", os.W_OK) else None


def _export(
    entry: Path,
    checkpoint: str | Path,
    exporter: str | None,
    dtype: str | None,
    opset: int | None,
    report_progress: ProgressCallback,
) -> tuple[Check, ...]:
    """Export into a folder beside the entry, which takes its place when it is complete."""
    new = Path(tempfile.mkdtemp(prefix=_NEW, dir=entry.parent))
    try:
        parity = export_checkpoint(checkpoint, new / "model", exporter, dtype, opset, report_progress=report_progress)
        record = {
            "schema": _SCHEMA,
            "checkpoint": str(checkpoint),
            "parity": [asdict(check) for check in parity],
            "files": _stamps(new / "model"),
        }
        (new / _RECORD).write_text(json.dumps(record), encoding="utf-8")
        shutil.rmtree(entry, ignore_errors=True)  # a damaged one
        with contextlib.suppress(OSError):  # another command was as quick, and wrote the same
            new.rename(entry)
        return parity
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _parity_of(entry: Path) -> tuple[Check, ...] | None:
    """The comparison with torch of an entry that is complete and unchanged; `None` where it is not."""
    try:
        record: dict[str, Any] = json.loads((entry / _RECORD).read_text(encoding="utf-8"))
        if record["schema"] != _SCHEMA or record["files"] != _stamps(entry / "model"):
            return None
        return tuple(Check(**check) for check in record["parity"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Relative path -> size and time of change: a folder made from the entry may share its big files by hard links."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


@contextlib.contextmanager
def _in_use(entry: Path) -> Iterator[None]:
    """While it lasts, no other command removes the entry, if it is there."""
    try:
        descriptor = os.open(entry, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _make_room(exports: Path, limit: int, keep: Path) -> None:
    """Remove the entries that were used longest ago until the rest fits; and what killed runs left."""
    now, entries = wall_clock().timestamp(), []
    for path in exports.iterdir():
        with contextlib.suppress(OSError):
            used = path.stat().st_mtime
            if path.name.startswith(_NEW):
                if now - used > 2 * _DAY:
                    shutil.rmtree(path, ignore_errors=True)
            else:
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                entries.append((used, size, path))
    total = sum(size for _, size, _ in entries)
    for used, size, path in sorted(entries):
        if total <= limit:
            return
        if path != keep and _is_free(path, now - used):
            shutil.rmtree(path, ignore_errors=True)
            total -= size


def _is_free(entry: Path, unused: float) -> bool:
    """Whether no command uses an entry; `unused`: seconds since one began to."""
    if fcntl is None:
        return unused > _DAY
    try:
        descriptor = os.open(entry, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _largest_size() -> int:
    """Bytes that the cache may have.

    Raises:
        GuardError: `VLMGUARD_CACHE_SIZE` is no size.
    """
    text = os.environ.get(CACHE_SIZE) or DEFAULT_SIZE
    found = re.fullmatch(r"(\d{1,15})([KMGT]?)", text.strip(), re.IGNORECASE)
    if found is None:
        raise GuardError(f"{CACHE_SIZE} is {text!r}; set it to a size such as 20G")
    return int(found[1]) * _UNITS[found[2].upper()]
