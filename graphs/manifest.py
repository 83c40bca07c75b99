"""`guard.json`: the record of a guarded folder, and the check that the folder still matches it.

Schema `vlmguard.guard/2`: size and digest of every file; for every decoder graph the source's digest, the plan, the changes
and the proof; the spec and the versions. `files` covers everything in the folder except the manifest itself. In a folder of
engines, `engines` records how each was built, and `decoders` the graphs that they were built from.
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
# Suffixes of files that a runtime would run.
_EXECUTED = (".onnx", ".ort", ".engine", ".plan")

# How much of the proof was done: `full` (the model was run), `local` (each guard was run by itself), or `structure` alone
# (nothing was run). The structure is part of each.
Proved = Literal["full", "local", "structure"]


class FileRecord(BaseModel):
    """One file of the folder.

    Attributes:
        size: bytes.
        modified_ns: time of the last change in nanoseconds, as in `os.stat`; 0: not kept, and the file is hashed at each
            opening.
        sha256: hex digest; `None` for a big file that was not hashed (`--no-digest`).
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
        directions: file of a precision variant whose numbers were fitted to its own states, relative to the folder; `None`:
            the folder's `directions.safetensors`.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str
    source: dict[str, Any]
    plan: dict[str, Any]
    report: dict[str, Any]
    proof: list[dict[str, Any]]
    directions: str | None = None


class EngineRecord(BaseModel):
    """One TensorRT engine, and what it was built from.

    Attributes:
        path: relative to the folder.
        role: which part of the model it is; `decode_step`: the decoder for calls of one token, if it has an engine of its own.
        source: name and SHA-256 of the ONNX graph that was built; for a decoder the guarded one, and the digest of the graph
            that was derived from it, if that was built.
        backend, version: the builder's.
        capabilities: compute capabilities that it was built for; empty: the GPU of the machine that built it.
        profiles: per optimisation profile its name and, by input, smallest, typical and largest shape.
        layers: what the builder made, in numbers (`EngineLayers.to_json`).
        pads: of a decoder: whether rows of different lengths may share a batch.
        proof: of the derived graph.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str
    role: Literal["decoder", "decode_step", "vision_encoder", "embed_tokens"]
    source: dict[str, str]
    backend: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    capabilities: list[str]
    profiles: list[dict[str, Any]]
    layers: dict[str, Any]
    pads: bool = False
    proof: list[dict[str, Any]] = []

    @property
    def is_decoder(self) -> bool:
        """Whether the guard is in it."""
        return self.role in ("decoder", "decode_step")


class PackagedRecord(BaseModel):
    """How `vlmguard package` laid out a folder.

    Attributes:
        layout: of the guarded folder that it was made from.
        moved: new path -> old path, of every file whose path changed.
        written: paths of files created for this layout.
        left_out: old paths of files that this layout does not use.
        options: options of the packaging.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    layout: str
    moved: dict[str, str]
    written: list[str]
    left_out: list[str]
    options: dict[str, Any] = {}

    def before(self, path: str) -> str:
        """Old path of a file of this folder."""
        return self.moved.get(path, path)


class Manifest(BaseModel):
    """The content of `guard.json`.

    Attributes:
        files: path relative to the folder -> its record.
        decoders: every decoder graph of the folder; the first is the one that runs.
        layout: of the folder.
        proved: level of the proof.
        proved_because: reason for this level.
        versions: of vlmguard and of the software that wrote and proved the graphs.
        spec: the requested guard.
        calibration: measurements of the calibration, if it ran.
        choice: the tried modes, if the mode was left open.
        refusals: harmful prompts refused without and with the guard, per setting; `None`: there were no prompts.
        engines: the engines of a folder built from a guarded one; empty for a folder of graphs.
        packaged: how the folder was packaged, if it was.
        export_parity: difference between the exported graphs and the checkpoint in torch; only for checkpoints.
        variants: decoder path -> refusals of this precision variant without and with the guard, and its calibration if it has
            one of its own; only where there are several.
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
    variants: dict[str, dict[str, Any]] | None = None
    proved_because: str = ""

    @property
    def decoder(self) -> str:
        """The decoder that runs, relative to the folder."""
        return self.decoders[0].path

    @property
    def plan(self) -> dict[str, Any]:
        """Of the decoder that runs; the others have the same mode and layers, and its numbers or numbers of their own."""
        return self.decoders[0].plan

    def seen_from(self, path: str) -> Manifest:
        """The manifest with this decoder first, and what was measured for it.

        Args:
            path: of the decoder, relative to the folder.
        """
        decoders = sorted(self.decoders, key=lambda record: record.path != path)
        row = (self.variants or {}).get(path, {})
        measured = {
            "refusals": row.get("harmful", self.refusals),
            "calibration": row.get("calibration", self.calibration),
        }
        return self.model_copy(update={"decoders": decoders, **measured})

    @property
    def calibrations(self) -> list[dict[str, Any]]:
        """Records of what the folder's guards were calibrated on: the guard's, and those of variants."""
        rows = (self.variants or {}).values()
        kept = (self.calibration, self.choice, *(row.get("calibration") for row in rows))
        return [record for record in kept if record is not None]

    def to_text(self) -> str:
        content = self.model_dump()
        for name in ("packaged", "export_parity", "variants"):  # so that older versions can read all other folders
            if content[name] is None:
                del content[name]
        for record in content["decoders"]:
            if record["directions"] is None:
                del record["directions"]
        return to_strict_json({"schema": content.pop("schema_"), **content}, indent=2, ensure_ascii=False) + "\n"


def record_files(
    folder: Path, names: Iterable[str], digests: dict[str, str], keeps_times: bool = True
) -> dict[str, FileRecord]:
    """The records of files for `guard.json`. Modification times are kept only for big files.

    Args:
        folder: the guarded folder.
        names: paths relative to it.
        digests: hex digests by path; files without one are recorded without a digest.
        keeps_times: whether to record modification times.
    """
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
            schema = content.get("schema")
            raise ManifestMismatch(f"{path}: schema is {schema!r}, this version reads {SCHEMA!r}; export again")
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
    """Check every file against the manifest, reject any extra file that a runtime would load, and return the number of files.

    Args:
        folder: the guarded folder.
        manifest: of the folder.
        again: hash every file. Otherwise a big file with the recorded size and modification time is not hashed again, because
            opening a 14 GB model must not read it twice.
        report_count: called with `(done, total)` bytes.
        besides: pattern of files that may have been added.

    Raises:
        ManifestMismatch: a file is missing, changed or extra.
    """
    where = folder / MANIFEST_NAME
    runs = [engine.path for engine in manifest.engines if engine.is_decoder] if manifest.engines else None
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
    hashes = sha256_files((folder / name for name in hashed), report_count)
    for name, record in hashed.items():
        if hashes[folder / name] != record.sha256:
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
