"""A guarded folder, laid out anew: what goes where, written with a manifest that fits, and proved again where it now lies.

    guarded folder ──► verified ──► arrangement (moved, written, left out) ──► folder ──► guard.json ──► verified ──► DIR

The graphs stay as they are, byte for byte, unless the layout's names for external data force other references to it, or its
runtime feeds other inputs (`genai_pictures`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...graphs.errors import GuardError, ManifestMismatch, ProofFailed
from ...graphs.graph_io import external_files
from ...graphs.manifest import Manifest, PackagedRecord, hash_files, write_manifest
from ...graphs.new_files import Data, create_file
from ...graphs.package import SBOM_NAME, SIGNATURE_NAME, Layout, ModelPackage
from ...graphs.progress import ProgressCallback, ignore_progress
from ...graphs.staging import bring, require_writable, staged
from ...runtime.guarded import package_of
from ..proof.verify import Verification, verify
from ..sources import require_apart


@dataclass(frozen=True)
class FolderLayout:
    """The files of a folder in another layout.

    Attributes:
        layout: name of the layout.
        decoders: old path -> new path of each decoder graph; the first is the one that runs.
        brought: new path -> old path of every file that is kept unchanged, including decoder graphs.
        written: new path -> content of the files created for this layout.
        options: options of the packaging.
        rewritten: old path -> new path of each other graph that the layout has in another form, a file of `written`.
    """

    layout: Layout
    decoders: Mapping[str, str]
    brought: dict[str, str]
    written: Mapping[str, bytes]
    options: Mapping[str, Any] = field(default_factory=dict)
    rewritten: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Packaged:
    """Result of `package`.

    Attributes:
        out: the folder.
        manifest: its `guard.json`.
        proof: of the folder, from its own files.
        notes: what did not come along, in sentences.
    """

    out: Path
    manifest: Manifest
    proof: Verification
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        record = self.manifest.packaged
        assert record is not None
        return {
            "out": str(self.out),
            "layout": self.manifest.layout,
            "mode": self.manifest.plan.get("mode"),
            "layers": self.manifest.plan.get("layers"),
            "files": sorted(self.manifest.files),
            "written": record.written,
            "left_out": record.left_out,
            "notes": list(self.notes),
            "proof": self.proof.to_json(),
        }


Arrange = Callable[[Manifest, ModelPackage], FolderLayout]


def repackage(
    guarded: Path | str,
    out: Path | str,
    arrange: Arrange,
    *,
    data: Data = "link",
    force: bool = False,
    report_progress: ProgressCallback = ignore_progress,
) -> Packaged:
    """Write a guarded folder in another layout.

    Args:
        guarded: the folder, its guard proved in the model or by itself.
        out: the folder to write.
        arrange: which layout.
        data: how big files get there.
        force: replace OUT.
        report_progress: called with `(stage, done, total)`.

    Raises:
        ManifestMismatch: the folder is not guarded, not intact, not proved, or its proof does not hold.
        ProofFailed: the new folder does not hold what it should; nothing was written.
        GuardError: the layout does not take this model, or OUT cannot be written.
    """
    folder, target = Path(guarded).absolute(), Path(out).absolute()
    require_writable(target, force)
    manifest = require_guarded(folder, report_progress)
    package = package_of(folder, manifest)
    require_apart(target, folder, package)
    planned = arrange(manifest, package)
    with staged(target, force) as stage:
        report_progress("writing", 0, 1)
        for here, there in planned.brought.items():
            bring(folder / there, stage / here, data)
        for here, content in planned.written.items():
            (stage / here).parent.mkdir(parents=True, exist_ok=True)
            create_file(stage / here, content)
        written = _record_folder(stage, manifest, planned)
        report_progress("writing", 1, 1)
        proof = verify(stage, report_progress=report_progress)
        broken = next((check for check in proof.checks if not check.ok), None)
        if broken is not None:
            raise ProofFailed(f"{target}: {broken.name} does not hold in the new layout; nothing was written")
    return Packaged(target, written, proof, tuple(_notes(folder, written)))


def require_guarded(folder: Path, report_progress: ProgressCallback) -> Manifest:
    """The manifest of a folder whose proof holds, redone from its files.

    Raises:
        ManifestMismatch: it does not, or was never completed by a run.
    """
    found = verify(folder, report_progress=report_progress)
    broken = next((check for check in found.checks if not check.ok), None)
    if broken is not None:
        raise ManifestMismatch(f"{folder}: {broken.name} does not hold; export it again before you package it")
    if found.manifest.proved == "structure":
        raise ManifestMismatch(
            f"{folder}: only the structure of its guard was proved; run `vlmguard verify --run --source MODEL` on it first"
        )
    if found.manifest.packaged is not None:
        raise ManifestMismatch(
            f"{folder}: was packaged already; give the guarded folder that it was made from, as `vlmguard-export` wrote it"
        )
    return found.manifest


def require_other_layout(package: ModelPackage, layout: Layout, runtime: str) -> None:
    """There is something to lay out anew, and it is graphs.

    Raises:
        GuardError: the folder has that layout already, or holds engines.
    """
    if package.layout == layout:
        raise GuardError(f"{package.root}: has the {layout} layout already; use it as it is")
    if package.layout == "engines":
        raise GuardError(
            f"{package.root}: holds TensorRT engines, which {runtime} cannot run; give the guarded ONNX folder"
        )


def loose_files(manifest: Manifest, package: ModelPackage) -> list[str]:
    """Files of a guarded folder besides graphs and their data, relative paths, sorted; without its bill of materials."""
    graphs = [path for path in (package.root / name for name in manifest.files) if path.suffix == ".onnx"]
    data = {path.relative_to(package.root).as_posix() for graph in graphs for path in external_files(graph)}
    engines = {engine.path for engine in manifest.engines}
    return sorted(
        name
        for name in manifest.files
        if name not in data | engines and name not in (SBOM_NAME, SIGNATURE_NAME) and not name.endswith(".onnx")
    )


def with_data(graph: Path, root: Path, here: str) -> dict[str, str]:
    """A graph and its external data, at another path: path here -> path there. The graph's references stay as they are."""
    folder = Path(here).parent
    found = {here: graph.relative_to(root).as_posix()}
    for data in external_files(graph):
        found[(folder / data.relative_to(graph.parent)).as_posix()] = data.relative_to(root).as_posix()
    return found


def _record_folder(stage: Path, source: Manifest, planned: FolderLayout) -> Manifest:
    by_path = {record.path: record for record in source.decoders}
    # with their data named otherwise, perhaps
    came = {here: there for there, here in {**planned.decoders, **planned.rewritten}.items()}
    known = {*planned.brought.values(), *planned.decoders, *planned.rewritten}
    manifest = source.model_copy(
        update={
            "files": hash_files(stage),
            "decoders": [by_path[there].model_copy(update={"path": here}) for there, here in planned.decoders.items()],
            "layout": planned.layout,
            "packaged": PackagedRecord(
                layout=source.layout,
                moved={here: there for here, there in (planned.brought | came).items() if here != there},
                written=sorted(planned.written),
                left_out=sorted(name for name in source.files if name not in known),
                options=dict(planned.options),
            ),
        }
    )
    write_manifest(stage, manifest)
    return manifest


def _notes(folder: Path, manifest: Manifest) -> list[str]:
    record = manifest.packaged
    assert record is not None
    notes = [f"left out, this layout has no use for them: {', '.join(record.left_out)}"] if record.left_out else []
    if (folder / SIGNATURE_NAME).is_file():
        notes.append("the signature covers the old folder and was left out; sign the new one with `vlmguard sign`")
    return notes
