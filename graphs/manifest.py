"""`guard.json`: what a guarded folder promises, and the check that the folder still keeps it.

Schema `vlmguard.guard/1`: the digest of every file, the source's digest, versions, the spec, the plan, what was changed
and the proof. `files` covers everything in the folder but the manifest itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ManifestMismatch
from .package import sha256_file

MANIFEST_NAME = "guard.json"
SCHEMA = "vlmguard.guard/1"


class Manifest(BaseModel):
    """The content of `guard.json`.

    Attributes:
        files: path relative to the folder -> SHA-256.
        decoder: the guarded graph's path, relative to the folder.
        source: name and SHA-256 of the unguarded decoder file and of its external data.
        versions: of vlmguard and of what wrote and proved the graph.
        spec, plan, report, proof: as their `to_json` give them.
        calibration: what the calibrator measured, if it ran.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    schema_: str
    created: str
    files: dict[str, str]
    decoder: str
    layout: str
    source: dict[str, Any]
    versions: dict[str, str]
    spec: dict[str, Any]
    plan: dict[str, Any]
    report: dict[str, Any]
    proof: list[dict[str, Any]]
    calibration: dict[str, Any] | None = None

    def to_text(self) -> str:
        content = self.model_dump()
        return json.dumps({"schema": content.pop("schema_"), **content}, indent=2, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and validate `guard.json`.

    Raises:
        ManifestMismatch: there is none (so the folder is not guarded), it is malformed, or of another schema.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ManifestMismatch(f"{folder}: has no {MANIFEST_NAME}, so nothing says that it is guarded; export it first")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
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
    except (ValueError, RecursionError, OSError) as error:
        raise ManifestMismatch(f"{path}: is malformed ({error}); export again") from None


def require_intact(folder: Path, manifest: Manifest) -> int:
    """Every file is there with the digest that the manifest says, and no graph besides; how many were compared.

    Raises:
        ManifestMismatch: a file is missing, changed, or a graph was added.
    """
    if not manifest.files or manifest.decoder not in manifest.files:
        raise ManifestMismatch(
            f"{folder / MANIFEST_NAME}: does not list the decoder {manifest.decoder!r}; export again"
        )
    for name, digest in manifest.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ManifestMismatch(f"{folder / MANIFEST_NAME}: lists a file outside the folder ({name}); export again")
        if not path.is_file():
            raise ManifestMismatch(f"{folder}: {name} is missing; export again")
        if sha256_file(path) != digest:
            raise ManifestMismatch(f"{folder}: {name} is not the file that was proved (SHA-256 differs); export again")
    graphs = {path.relative_to(folder).as_posix() for path in folder.rglob("*.onnx")}
    added = sorted(graphs - set(manifest.files))
    if added:
        raise ManifestMismatch(f"{folder}: {added[0]} was added after the proof; remove it, or export again")
    return len(manifest.files)
