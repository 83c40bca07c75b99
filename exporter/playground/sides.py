"""Both decoders of a guarded folder, as the page runs them: without the guard, and with it and what its gates compare.

The shipped graph need not tell its gates' scores, so the guard is taken out, planned afresh and put in again with
telemetry, in memory. That this is the shipped guard, node for node and bit for bit, is checked first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from ...graphs.anatomy import dissect
from ...graphs.errors import GuardError, ManifestMismatch
from ...graphs.fold import FOLD
from ...graphs.manifest import DecoderRecord, Manifest
from ...graphs.package import ModelPackage
from ...graphs.plan import GuardPlan
from ...graphs.rewrite import rewrite
from ...graphs.spec import MODES_WITH_GATE
from ...graphs.static_proof import same_graph
from ...graphs.strip import strip_guard
from ...runtime.guarded import open_guarded_package, open_manifest
from ..proof.verify import originals_of, plan_again


@dataclass(frozen=True)
class Sides:
    """One decoder of a guarded folder, twice.

    Attributes:
        package: the folder, with that decoder first.
        plan: of its guard.
        base: without the guard.
        base_home: folder of the base's external data.
        from_source: whether the base is the model that the folder was made from, and not the folder's own graph.
        guarded: with the guard, and with telemetry where its mode has a gate.
    """

    package: ModelPackage
    plan: GuardPlan
    base: ir.Model
    base_home: Path
    from_source: bool
    guarded: ir.Model


def open_sides(folder: Path, source: Path | None = None, variant: str | None = None) -> Sides:
    """Open a guarded folder from both sides.

    Args:
        source: the unguarded model, if the base shall be that and not the folder's own graph without its guard.
        variant: of the decoder (`fp16`, `q4`, ...); default: the one that runs.

    Raises:
        ManifestMismatch: the folder is not guarded, not what its manifest says, or the source not what it was made from.
        GuardError: it holds engines, no such variant, or a guard in the weights and no source.
    """
    manifest = open_manifest(folder)
    if manifest.engines:
        raise GuardError(
            f"{folder}: holds engines, no browser runs those; name the guarded folder that they were built from"
        )
    package = open_guarded_package(folder, manifest)
    record = _chosen(folder, manifest, variant)
    view = next(view for view in package.views() if view.decoder == folder / record.path)
    original = originals_of(source, manifest)[record.path] if source is not None else None
    if original is None and record.plan.get("lowering") == FOLD:
        raise GuardError(f"{folder}: its guard is folded into weights and cannot be taken out; give the --base model")
    stripped = view.load_decoder() if original is None else original.load_decoder()
    if original is None:
        strip_guard(stripped)
    anatomy = dissect(stripped, view.expected_layers)
    plan = plan_again(folder, manifest, record, stripped, anatomy)
    return Sides(
        package=view,
        plan=plan,
        base=stripped,
        base_home=(original or view).decoder.parent,
        from_source=original is not None,
        guarded=view.load_decoder() if plan.lowering == FOLD else _telling(view, plan),
    )


def _chosen(folder: Path, manifest: Manifest, variant: str | None) -> DecoderRecord:
    """The decoder of that variant."""
    if variant is None:
        return manifest.decoders[0]
    found = [record for record in manifest.decoders if Path(record.path).stem.endswith(f"_{variant}")]
    if not found:
        known = ", ".join(Path(record.path).name for record in manifest.decoders)
        raise GuardError(f"{folder}: has no decoder of variant {variant!r}, but {known}; name one of theirs")
    return found[0]


def _telling(package: ModelPackage, plan: GuardPlan) -> ir.Model:
    """The shipped graph, and its gates' scores.

    Raises:
        ManifestMismatch: the shipped guard is not the one that the folder's plan and directions make.
    """
    check = same_graph("", _rebuilt(package, plan), package.load_decoder())
    if not check.ok:
        raise ManifestMismatch(
            f"{package.decoder}: its guard is not what its plan and directions make ({check.note}); run `vlmguard verify`"
        )
    return _rebuilt(package, replace(plan, telemetry=plan.mode in MODES_WITH_GATE))


def _rebuilt(package: ModelPackage, plan: GuardPlan) -> ir.Model:
    graph = package.load_decoder()
    strip_guard(graph)
    dissect(graph, package.expected_layers)  # infers the types that the rewrite copies
    rewrite(graph, plan)
    return graph
