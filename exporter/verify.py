"""`verify`: redo the proof of a guarded folder from its files alone, and against the source model where it is at hand.

From the files: digests; the guard is taken out of the shipped graph again (`strip_guard`), planned afresh from the
folder's own directions and spec, put back in, and must be the shipped graph node for node and number for number; the
guard dominates. With the source: the stripped graph must be the source's, with its inputs, outputs and weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..graphs.anatomy import dissect
from ..graphs.directions import read_directions
from ..graphs.errors import ManifestMismatch
from ..graphs.manifest import Manifest, read_manifest, require_intact
from ..graphs.package import external_files, load_graph, open_package, sha256_file
from ..graphs.plan import GuardPlan, plan_guard
from ..graphs.rewrite import rewrite
from ..graphs.spec import GuardSpec
from ..graphs.static_proof import (
    Check,
    exact,
    guard_dominates,
    initializers_untouched,
    same_graph,
    signature_unchanged,
    sites_guarded_once,
)
from ..graphs.strip import strip_guard
from ..runtime.guarded import open_guarded_package


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        manifest: of the folder.
        checks: each with what it compared.
    """

    manifest: Manifest
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "mode": self.manifest.plan.get("mode"),
            "layers": self.manifest.plan.get("layers"),
            "checks": [check.to_json() for check in self.checks],
        }


def verify(folder: Path | str, source: Path | str | None = None) -> Verification:
    """Redo the proof.

    Args:
        folder: a guarded folder.
        source: the unguarded model (file or folder), if at hand.

    Raises:
        ManifestMismatch: no manifest, a changed file, or a source that is not the one that the manifest names.
    """
    folder = Path(folder).absolute()
    manifest = read_manifest(folder)
    files = require_intact(folder, manifest)
    checks = [exact("every file has the manifest's SHA-256", files, [])]
    package = open_guarded_package(folder, manifest)
    shipped, stripped = load_graph(package.decoder), load_graph(package.decoder)
    strip_guard(stripped)
    anatomy = dissect(stripped, package.expected_layers)
    plan = _plan_again(folder, manifest, stripped, anatomy)
    again = load_graph(package.decoder)
    strip_guard(again)
    dissect(again, package.expected_layers)
    report = rewrite(again, plan)
    checks += [
        same_graph("the guard is what the manifest's plan and directions make", again, shipped),
        sites_guarded_once(shipped, plan, report),
        guard_dominates(shipped, anatomy, plan, report),
    ]
    if source is not None:
        original = open_package(source)
        digest = sha256_file(original.decoder)
        if digest != manifest.source.get("sha256"):
            raise ManifestMismatch(
                f"{original.decoder}: is not the model that {folder.name} was made from (SHA-256 differs); give that one"
            )
        graph = original.load_decoder()
        dissect(graph)
        checks += [
            same_graph("without its guard it is the source, node for node", stripped, graph),
            signature_unchanged(graph, shipped, plan),
            initializers_untouched(graph, shipped),
            *_same_external_data(original.decoder, package.decoder),
        ]
    return Verification(manifest, tuple(checks))


def _same_external_data(source: Path, shipped: Path) -> list[Check]:
    """Weights outside the graph are compared as files: inside it there are only references to them."""
    before, after = (
        {path.name: sha256_file(path) for path in external_files(decoder)} for decoder in (source, shipped)
    )
    wrong = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    return [exact("external weights are the source's files", len(before), sorted(wrong))] if before or after else []


def _plan_again(folder: Path, manifest: Manifest, stripped: ir.Model, anatomy: Any) -> GuardPlan:
    """The plan, from the folder's own directions and the manifest's decisions; it must say what the manifest says."""
    recorded = manifest.plan
    wished = dict(manifest.spec)
    try:
        if wished.get("layers") is not None:
            wished["layers"] = tuple(wished["layers"])
        spec = GuardSpec(**wished)
    except TypeError as error:
        raise ManifestMismatch(f"{folder}: the manifest's spec cannot be read ({error}); export again") from None
    plan = plan_guard(stripped, anatomy, read_directions(folder / "directions.safetensors"), spec)
    made = plan.to_json()
    differing = [key for key in made if key != "notes" and made[key] != recorded.get(key)]
    if differing:
        raise ManifestMismatch(
            f"{folder}: the manifest's plan is not what its spec and directions give ({', '.join(differing)} differ); "
            "export again"
        )
    return plan
