"""Writes the guarded folder: weights and companions are copied or linked, the manifest comes last."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...graphs.anatomy import DecoderAnatomy
from ...graphs.clock import Stamp, to_text
from ...graphs.digests import sha256_files
from ...graphs.directions import DIRECTIONS_FILE, Directions
from ...graphs.graph_io import external_files
from ...graphs.manifest import SCHEMA, DecoderRecord, Manifest, may_go_unhashed, record_files, write_manifest
from ...graphs.new_files import Data, create_file
from ...graphs.package import SBOM_NAME, ModelPackage
from ...graphs.plan import GuardPlan
from ...graphs.progress import ProgressCallback
from ...graphs.proof.structure import Check
from ...graphs.rewrite import GuardReport
from ...graphs.spec import GuardSpec
from ...graphs.staging import bring
from ..calibration.attempts import Choice
from ..calibration.refusal_regression import Refusals
from ..calibration.results import Calibration
from ..proof.level import ProofLevel
from ..variants import VariantRow
from .sbom import bill_of_materials


@dataclass(frozen=True)
class GuardedDecoder:
    """One decoder graph on its way into the folder.

    Attributes:
        package: the unguarded model, seen from this graph.
        anatomy, plan: of it.
        report, proof: what was done to it and why to believe it; none before that.
        directions: its own, where its numbers were fitted to its own states.
    """

    package: ModelPackage
    anatomy: DecoderAnatomy
    plan: GuardPlan
    report: GuardReport | None = None
    proof: tuple[Check, ...] = ()
    directions: Directions | None = None

    @property
    def directions_file(self) -> str | None:
        """The file of its own directions, relative to the folder."""
        return f"{self.path.removesuffix('.onnx')}.{DIRECTIONS_FILE}" if self.directions is not None else None

    @property
    def path(self) -> str:
        """Relative to the folder, the unguarded one as the guarded one."""
        return self.package.decoder.relative_to(self.package.root).as_posix()

    def to_json(self) -> dict[str, Any]:
        return {
            "decoder": self.path,
            "plan": self.plan.to_json(),
            "report": self.report.to_json() if self.report is not None else None,
            "proof": [check.to_json() for check in self.proof],
        }


def bring_weights(package: ModelPackage, stage: Path, data: Data) -> None:
    """The decoder's external data, referenced by the guarded graph under the same relative names."""
    for path in external_files(package.decoder):
        destination = stage / path.relative_to(package.root)
        if not destination.exists():  # variants may share a file
            bring(path, destination, data)


def bring_companions(package: ModelPackage, stage: Path, data: Data) -> None:
    for path, relative in package.files():
        if not (stage / relative).exists():
            bring(path, stage / relative, data)


def notes_on_files(package: ModelPackage) -> Iterator[str]:
    graphs = [name for name in package.left_out if name.endswith(".onnx")]
    if graphs:
        yield f"left out, because they would be unguarded decoders: {', '.join(graphs)}"


def notes_on_runtime(package: ModelPackage, plan: GuardPlan) -> Iterator[str]:
    """What the layout's own runtime cannot do with this guard."""
    required = [name for name in plan.added_inputs if name not in plan.knobs]
    if package.layout == "genai" and package.vision_encoder is not None and required:
        yield (
            f"onnxruntime-genai does not feed {' and '.join(required)} to the decoder of a picture pipeline and stops with an "
            "error; for genai choose mode restore, or align with --supervisor rows, without --gate prompt"
        )


def record_export(
    stage: Path,
    decoders: Sequence[GuardedDecoder],
    spec: GuardSpec,
    measured: Calibration | Choice | None,
    refusals: Refusals | None,
    proved: ProofLevel,
    digests: bool,
    report_progress: ProgressCallback,
    stamped: Stamp,
    sbom: bool = False,
    parity: Sequence[Check] = (),
    variants: Sequence[VariantRow] = (),
) -> None:
    """Hash the files of the stage and of the source, each content once, and write `guard.json`.

    Args:
        stage: the folder that becomes the guarded folder.
        decoders: each decoder with its plan, report and proof.
        spec: the requested guard.
        measured: measurements of the calibration or the choice of the mode.
        refusals: harmful prompts refused without and with the guard.
        proved: level of the proof.
        digests: whether big weights are hashed.
        report_progress: called with `(stage, done, total)`.
        stamped: the time of the folder.
        sbom: also write the bill of materials, before the manifest.
        parity: comparison of a checkpoint's export with torch.
        variants: refusals of each precision variant, where there are several.
    """
    files = [path for path in sorted(stage.rglob("*")) if path.is_file()]
    sources = {path for decoder in decoders for path in _source_files(decoder)}
    hashed = [path for path in (*files, *sources) if digests or not may_go_unhashed(path.name, path.stat().st_size)]
    hashes = sha256_files(hashed, lambda done, total: report_progress("hashing (bytes)", done, total))
    names = {path.relative_to(stage).as_posix(): path for path in files}
    if sbom:
        listed = {name: hashes.get(path) for name, path in names.items()}
        graphs = {decoder.package.decoder.name: hashes[decoder.package.decoder] for decoder in decoders}
        content = bill_of_materials(decoders[0].package.name, listed, graphs, versions(), stamped)
        names[SBOM_NAME] = stage / SBOM_NAME
        create_file(names[SBOM_NAME], content)
        hashes |= sha256_files([names[SBOM_NAME]])
    choice = measured if isinstance(measured, Choice) else None
    calibrated = measured.calibration if isinstance(measured, Choice) else measured
    manifest = Manifest(
        schema_=SCHEMA,
        created=to_text(stamped.created),
        files=record_files(
            stage, names, {name: hashes[path] for name, path in names.items() if path in hashes}, stamped.keeps_times
        ),
        decoders=[_record(decoder, hashes) for decoder in decoders],
        layout=decoders[0].package.layout,
        proved=proved.level,
        proved_because=proved.why,
        versions=versions(),
        spec=_plain(asdict(spec)),
        calibration=calibrated.to_json() if calibrated is not None else None,
        choice=choice.to_json() if choice is not None else None,
        refusals=refusals.to_json() if refusals is not None else None,
        export_parity=[check.to_json() for check in parity] or None,
        variants={row.decoder: row.to_json() for row in variants} or None,
    )
    write_manifest(stage, manifest)


def _source_files(done: GuardedDecoder) -> list[Path]:
    return [done.package.decoder, *external_files(done.package.decoder)]


def _record(done: GuardedDecoder, digests: dict[Path, str]) -> DecoderRecord:
    decoder = done.package.decoder
    assert done.report is not None and done.proof
    return DecoderRecord(
        path=done.path,
        source={
            "decoder": decoder.name,
            "sha256": digests[decoder],
            "external_data": {path.name: digests.get(path) for path in external_files(decoder)},
        },
        plan=done.plan.to_json(),
        report=done.report.to_json(),
        proof=[check.to_json() for check in done.proof],
        directions=done.directions_file,
    )


def versions() -> dict[str, str]:
    """Of what wrote and proved a graph."""
    found = {}
    for name in ("vlmguard", "onnx", "onnx-ir", "numpy", "onnxruntime", "onnxruntime-gpu", "torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _plain(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in spec.items()}
