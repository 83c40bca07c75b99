"""Both decoders of a guarded folder for the page: without the guard, and with the guard and its gates' scores as outputs.

The shipped graph may lack these outputs; the graph served here has them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from ...exporter.proof.both_sides import BothSides, open_both_sides
from ...graphs.errors import GuardError
from ...graphs.modes import guard_mode
from ...graphs.package import ModelPackage
from ...graphs.plan import GuardPlan
from ...runtime.guarded import open_manifest, open_variant


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
        variant: precision variant of the decoder (`fp16`, `q4`, ...); `None`: the one that runs.

    Raises:
        ManifestMismatch: the folder is not guarded, differs from its manifest, or the source is not the guarded model.
        GuardError: it holds engines, no such variant, or a guard in the weights and no source.
    """
    manifest = open_manifest(folder)
    if manifest.engines:
        raise GuardError(
            f"{folder}: holds engines, no browser runs those; name the guarded folder that they were built from"
        )
    view, manifest = open_variant(folder, manifest, variant)
    both = open_both_sides(view, manifest, manifest.decoders[0], source, "--base")
    return Sides(
        package=view,
        plan=both.plan,
        base=both.unguarded(),
        base_home=(both.source or view).decoder.parent,
        from_source=both.source is not None,
        guarded=_telling(both),
    )


def _telling(both: BothSides) -> ir.Model:
    """The shipped graph, and its gates' scores."""
    if both.folded:
        return both.package.load_decoder()
    return both.rebuilt(replace(both.plan, telemetry=guard_mode(both.plan.mode).has_threshold))[0]
