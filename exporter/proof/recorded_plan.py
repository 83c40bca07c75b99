"""Reads a guarded folder's records: the sources of its decoders, and its plan, planned anew from directions and spec."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from ...graphs.anatomy import DecoderAnatomy
from ...graphs.digests import sha256_file
from ...graphs.directions import DIRECTIONS_FILE, Directions, read_directions
from ...graphs.errors import GuardError, ManifestMismatch
from ...graphs.layouts import open_package
from ...graphs.manifest import DecoderRecord, Manifest
from ...graphs.package import ModelPackage
from ...graphs.plan import GuardPlan
from ...graphs.planner import plan_guard
from ...graphs.spec import GuardSpec


def originals_of(source: Path | str, manifest: Manifest) -> dict[str, ModelPackage]:
    """The unguarded decoder of every record; by its place in the folder, or by digest where a file was given."""
    package = open_package(source)
    views = {view.decoder.relative_to(view.root).as_posix(): view for view in package.views()}
    by_digest = {sha256_file(view.decoder): view for view in views.values()} if len(views) > 1 else {}
    found = {}
    for record in manifest.decoders:
        original = views.get(record.path) or by_digest.get(str(record.source.get("sha256")), package)
        found[record.path] = original
        if sha256_file(original.decoder) != record.source.get("sha256"):
            raise ManifestMismatch(
                f"{original.decoder}: is not the model that {record.path} was made from (SHA-256 differs); give that one"
            )
    return found


def recorded_directions(folder: Path, manifest: Manifest, record: DecoderRecord) -> Directions:
    """The directions of one decoder: its own, if its numbers were fitted to its own states, else the folder's.

    Args:
        folder: the guarded folder.
        manifest: of the folder.
        record: the decoder's record in the manifest.

    Raises:
        ManifestMismatch: the record names a file that is none of the manifest's.
        DirectionMismatch: the file cannot be read.
    """
    name = record.directions or DIRECTIONS_FILE
    if record.directions is not None and name not in manifest.files:
        raise ManifestMismatch(
            f"{folder}: {record.path} has its directions in {name!r}, which the manifest does not list; export again"
        )
    return read_directions(folder / name)


# Of a plan: what was measured or remarked at export. It decides nothing, and cannot be made again from the folder's files.
_FOR_READERS = ("notes", "separation")


def plan_again(
    folder: Path, manifest: Manifest, record: DecoderRecord, stripped: ir.Model, anatomy: DecoderAnatomy
) -> GuardPlan:
    """Plan the guard anew from the folder's directions and the manifest's spec; it must equal the recorded plan.

    Args:
        folder: the guarded folder.
        manifest: of the folder.
        record: the decoder's record in the manifest.
        stripped: the decoder without its guard.
        anatomy: of that decoder.
    """
    recorded = record.plan
    settings = dict(manifest.spec)
    try:
        if settings.get("layers") is not None:
            settings["layers"] = tuple(settings["layers"])
        spec = GuardSpec(**settings)
    except TypeError as error:
        raise ManifestMismatch(f"{folder}: the manifest's spec cannot be read ({error}); export again") from None
    directions = recorded_directions(folder, manifest, record)
    try:
        plan = plan_guard(stripped, anatomy, directions, spec)
    except GuardError as error:
        raise ManifestMismatch(
            f"{folder}: the manifest's spec and the directions beside it give no guard ({error}); export again"
        ) from None
    planned = plan.to_json()
    differing = [key for key in planned if key not in _FOR_READERS and planned[key] != recorded.get(key)]
    if differing:
        raise ManifestMismatch(
            f"{folder}: the manifest's plan is not what its spec and directions give ({', '.join(differing)} differ); "
            "export again"
        )
    return plan
