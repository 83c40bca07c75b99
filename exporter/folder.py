"""The guarded folder: weights and companions brought along, the manifest written last."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..graphs.manifest import MANIFEST_NAME, SCHEMA, Manifest
from ..graphs.package import ModelPackage, external_files, sha256_file
from ..graphs.plan import GuardPlan
from ..graphs.rewrite import GuardReport
from ..graphs.spec import GuardSpec
from ..graphs.staging import link_or_copy
from ..graphs.static_proof import Check
from .calibrate import Calibration


def bring_weights(package: ModelPackage, stage: Path) -> None:
    """The decoder's external data, referenced by the guarded graph under the same relative names."""
    for path in external_files(package.decoder):
        link_or_copy(path, stage / path.relative_to(package.root))


def bring_companions(package: ModelPackage, stage: Path) -> None:
    for path, relative in package.files():
        if not (stage / relative).exists():
            link_or_copy(path, stage / relative)


def notes_on_files(package: ModelPackage) -> Iterator[str]:
    graphs = [name for name in package.left_out if name.endswith(".onnx")]
    if graphs:
        yield f"left out, because they would be unguarded decoders: {', '.join(graphs)}"


def write_manifest(
    stage: Path,
    package: ModelPackage,
    decoder: Path,
    spec: GuardSpec,
    plan: GuardPlan,
    report: GuardReport,
    proof: Sequence[Check],
    calibrated: Calibration | None,
) -> None:
    files = {p.relative_to(stage).as_posix(): sha256_file(p) for p in sorted(stage.rglob("*")) if p.is_file()}
    manifest = Manifest(
        schema_=SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=files,
        decoder=decoder.relative_to(stage).as_posix(),
        layout=package.layout,
        source={
            "decoder": package.decoder.name,
            "sha256": sha256_file(package.decoder),
            "external_data": {path.name: sha256_file(path) for path in external_files(package.decoder)},
        },
        versions=versions(),
        spec=_plain(asdict(spec)),
        plan=plan.to_json(),
        report=report.to_json(),
        proof=[check.to_json() for check in proof],
        calibration=calibrated.to_json() if calibrated is not None else None,
    )
    (stage / MANIFEST_NAME).write_text(manifest.to_text(), encoding="utf-8")


def versions() -> dict[str, str]:
    """Of what wrote and proved a graph."""
    found = {}
    for name in ("vlmguard", "onnx", "onnx-ir", "numpy", "onnxruntime", "onnxruntime-gpu", "torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _plain(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in spec.items()}
