"""`guard.json`: what a guarded folder promises, and the check that the folder still keeps it.

Schema `vlmguard.guard/2`: every file with its size and digest; for every decoder graph the source's digest, the plan, what
was changed and the proof; the spec and the versions. `files` covers everything in the folder but the manifest itself. In a
folder of engines `engines` says how each was built, and `decoders` what is said of the graphs that they were built from.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from .digests import BIG, sha256_files
from .errors import ManifestMismatch
from .inventory import require_nothing_beside, require_plain_names
from .json_files import LARGEST_JSON
from .new_files import create_file
from .places import require_guarded_folder
from .progress import CountCallback
from .regular_files import read_regular
from .staging import write_file
from .strict_json import from_strict_json, to_strict_json

MANIFEST_NAME = "guard.json"
SCHEMA = "vlmguard.guard/2"
# What a runtime would run, were it put into the folder.
_EXECUTED = (".onnx", ".ort", ".engine", ".plan")

# How much of the proof was done: `full` (the model was run), `local` (each guard was run by itself), or `structure` alone
# (nothing was run). The structure is part of each.
Proved = Literal["full", "local", "structure"]


class FileRecord(BaseModel):
    """One file of the folder.

    Attributes:
        size: bytes.
        modified_ns: time of its last change, as `os.stat` gives it; 0: not kept, and the file is hashed at each opening.
        sha256: hex digest; `None` for a big file that was not hashed because that was asked (`--no-digest`).
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    size: int
    modified_ns: int
    sha256: str | None


class DecoderRecord(BaseModel):
    """One guarded decoder graph.

    Attributes:
        path: relative to the folder.
        source: name and SHA-256 of the unguarded graph file, and of its external data (`None`: not hashed).
        plan, report, proof: as their `to_json` give them.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str
    source: dict[str, Any]
    plan: dict[str, Any]
    report: dict[str, Any]
    proof: list[dict[str, Any]]


class EngineRecord(BaseModel):
    """One TensorRT engine, and what it was built from.

    Attributes:
        path: relative to the folder.
        role: which part of the model it is.
        source: name and SHA-256 of the ONNX graph that was built; for a decoder the guarded one.
        backend, version: the builder's.
        capabilities: compute capabilities that it was built for; empty: the GPU of the machine that built it.
        profiles: per optimisation profile its name and, by input, smallest, typical and largest shape.
        layers: what the builder made, in numbers (`EngineLayers.to_json`).
        pads: of a decoder: whether rows of different lengths may share a batch.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str
    role: Literal["decoder", "vision_encoder", "embed_tokens"]
    source: dict[str, str]
    backend: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    capabilities: list[str]
    profiles: list[dict[str, Any]]
    layers: dict[str, Any]
    pads: bool = False


class PackagedRecord(BaseModel):
    """How a folder was laid out anew (`vlmguard package`).

    Attributes:
        layout: of the guarded folder that it was made from.
        moved: path here -> path there, of every file that has another one.
        written: paths of files that were made for this layout.
        left_out: paths there of files that this layout has no use for.
        options: what was asked for.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    layout: str
    moved: dict[str, str]
    written: list[str]
    left_out: list[str]
    options: dict[str, Any] = {}

    def before(self, path: str) -> str:
        """Where a file of this folder was."""
        return self.moved.get(path, path)


class Manifest(BaseModel):
    """The content of `guard.json`.

    Attributes:
        files: path relative to the folder -> what is known of it.
        decoders: every decoder graph of the folder; the first is the one that runs.
        layout: of the folder.
        proved: how much of the proof was done.
        proved_because: why that much.
        versions: of vlmguard and of what wrote and proved the graphs.
        spec: what was asked for.
        calibration: what the calibrator measured, if it ran.
        choice: what was tried before a mode was chosen, if it was left open.
        refusals: harmful prompts refused without and with the guard, per setting; `None`: no prompts were at hand.
        engines: the engines of a folder that was built from a guarded one; empty for a folder of graphs.
        packaged: how it was laid out anew, if it was.
        export_parity: how far the exported graphs are from the checkpoint in torch; of a model that was a checkpoint.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    schema_: str
    created: str
    files: dict[str, FileRecord]
    decoders: list[DecoderRecord]
    layout: str
    proved: Proved
    versions: dict[str, str]
    spec: dict[str, Any]
    calibration: dict[str, Any] | None = None
    choice: dict[str, Any] | None = None
    refusals: dict[str, Any] | None = None
    engines: list[EngineRecord] = []
    packaged: PackagedRecord | None = None
    export_parity: list[dict[str, Any]] | None = None
    proved_because: str = ""

    @property
    def decoder(self) -> str:
        """The decoder that runs, relative to the folder."""
        return self.decoders[0].path

    @property
    def plan(self) -> dict[str, Any]:
        """Of the decoder that runs; the others have the same mode, layers and numbers."""
        return self.decoders[0].plan

    def to_text(self) -> str:
        content = self.model_dump()
        for name in ("packaged", "export_parity"):  # versions that know nothing of them read all other folders
            if content[name] is None:
                del content[name]
        return to_strict_json({"schema": content.pop("schema_"), **content}, indent=2, ensure_ascii=False) + "\n"


def record_files(
    folder: Path, names: Iterable[str], digests: dict[str, str], keeps_times: bool = True
) -> dict[str, FileRecord]:
    """What `guard.json` says of these files; those without a digest get none. Times are kept of big files, which need them."""
    found = {}
    for name in sorted(names):
        status = (folder / name).stat()
        modified = status.st_mtime_ns if keeps_times and status.st_size >= BIG else 0
        found[name] = FileRecord(size=status.st_size, modified_ns=modified, sha256=digests.get(name))
    return found


def hash_files(folder: Path) -> dict[str, FileRecord]:
    """The records of everything that a folder holds, each file with its digest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): digest for path, digest in sha256_files(files).items()}
    return record_files(folder, digests, digests)


def write_manifest(folder: Path, manifest: Manifest, replace: bool = False) -> None:
    """Write `guard.json`, the last file of a folder.

    Args:
        folder: the folder, or the stage that becomes it.
        manifest: what it contains.
        replace: a guarded folder gets a new manifest. Otherwise there must be none: a file of this name in a stage is one
            of the model's own.

    Raises:
        OutputRefused: it cannot be written.
    """
    (write_file if replace else create_file)(folder / MANIFEST_NAME, manifest.to_text().encode())


def may_go_unhashed(name: str, size: int) -> bool:
    """Whether a file's digest may be left out (`--no-digest`): of big weights only, never of what is run or read."""
    return size >= BIG and not name.lower().endswith((*_EXECUTED, ".json", ".jinja"))


def read_manifest(folder: Path) -> Manifest:
    """Read and validate `guard.json`.

    Raises:
        ManifestMismatch: there is none (so the folder is not guarded), it is malformed, or of another schema.
    """
    path = folder / MANIFEST_NAME
    require_guarded_folder(folder, MANIFEST_NAME)
    if path.stat().st_size > LARGEST_JSON:
        raise ManifestMismatch(f"{path}: is malformed ({path.stat().st_size} bytes); export again")
    try:
        content = from_strict_json(read_regular(path, LARGEST_JSON).decode())
        if not isinstance(content, dict):
            raise ManifestMismatch(
                f"{path}: is malformed (holds {type(content).__name__}, not an object); export again"
            )
        if content.get("schema") != SCHEMA:
            found = content.get("schema")
            raise ManifestMismatch(f"{path}: schema is {found!r}, this version reads {SCHEMA!r}; export again")
        return Manifest.model_validate({"schema_": content.pop("schema"), **content})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ManifestMismatch(f"{path}: is malformed ({where}: {first['msg']}); export again") from None
    except OSError as error:
        raise ManifestMismatch(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, RecursionError) as error:
        raise ManifestMismatch(f"{path}: is malformed ({error}); export again") from None


def require_intact(
    folder: Path, manifest: Manifest, again: bool = True, report_count: CountCallback | None = None, besides: str = ""
) -> int:
    """Every file is there as the manifest says, and none besides that is run or gone by; how many were compared.

    Args:
        again: hash every file. Otherwise a big file whose size and time of change are the recorded ones keeps the digest
            that the manifest has: opening a 14 GB model must not read it twice.
        besides: pattern of files that may have been added.

    Raises:
        ManifestMismatch: a file is missing, changed, or one was added that matters.
    """
    where = folder / MANIFEST_NAME
    runs = [engine.path for engine in manifest.engines if engine.role == "decoder"] if manifest.engines else None
    runs = [record.path for record in manifest.decoders] if runs is None else runs
    unlisted = next((path for path in runs if path not in manifest.files), None)
    if not manifest.decoders or not runs or unlisted is not None:
        raise ManifestMismatch(f"{where}: does not list the decoder {unlisted!r}; export again")
    require_plain_names(folder, where, manifest.files)
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ManifestMismatch(f"{folder}: {name} is missing; export again")
        if record.sha256 is None and not may_go_unhashed(name, record.size):
            raise ManifestMismatch(f"{where}: has no digest of {name}, which only big weights may lack; export again")
        if record.sha256 is None and path.stat().st_size != record.size:
            raise ManifestMismatch(f"{folder}: {name} is not the file that was proved (its size differs); export again")
    hashed = {name: r for name, r in manifest.files.items() if r.sha256 is not None}
    if not again:
        hashed = {name: record for name, record in hashed.items() if not _unchanged(folder / name, record)}
    found = sha256_files((folder / name for name in hashed), report_count)
    for name, record in hashed.items():
        if found[folder / name] != record.sha256:
            raise ManifestMismatch(f"{folder}: {name} is not the file that was proved (SHA-256 differs); export again")
    require_nothing_beside(folder, manifest.files, besides)
    return len(manifest.files)


def _unchanged(path: Path, record: FileRecord) -> bool:
    status = path.stat()
    return (
        record.size >= BIG
        and path.suffix not in (".engine", ".plan")
        and (status.st_size, status.st_mtime_ns) == (record.size, record.modified_ns)
    )
