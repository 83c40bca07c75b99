"""One decoder of a guarded folder, unguarded and guarded, with a guard that is written anew.

The unguarded decoder is the source model if given; otherwise the guard is removed from the shipped graph in memory. Only a new
guard can output what its gates read, or have another strength. A check ensures that it equals the shipped guard node for
node and bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ...graphs.anatomy import DecoderAnatomy, dissect
from ...graphs.errors import GuardError, ManifestMismatch
from ...graphs.lowerings.fold import FOLD
from ...graphs.manifest import DecoderRecord, Manifest
from ...graphs.package import ModelPackage
from ...graphs.plan import GuardPlan
from ...graphs.proof.strip import strip_guard
from ...graphs.proof.structure import same_graph
from ...graphs.rewrite import GuardReport, rewrite
from ..packaging.regenerate import load_restored
from .recorded_plan import originals_of, plan_again


@dataclass(frozen=True)
class BothSides:
    """One decoder, unguarded and guarded.

    Attributes:
        package: the folder, with this decoder first.
        source: the unguarded model, if given.
        anatomy: of the unguarded decoder.
        plan: the plan recorded in the manifest, planned anew.
    """

    package: ModelPackage
    source: ModelPackage | None
    anatomy: DecoderAnatomy
    plan: GuardPlan

    @property
    def folded(self) -> bool:
        """Whether the guard is in the weights: then there is no node to look at, and nothing to take out."""
        return self.plan.lowering == FOLD

    def unguarded(self) -> ir.Model:
        """The source's graph, or the shipped one without its guard."""
        return self.source.load_decoder() if self.source is not None else stripped(self.package)

    def rebuilt(self, plan: GuardPlan) -> tuple[ir.Model, GuardReport]:
        """The shipped graph with another guard in place of its own."""
        graph = stripped(self.package)
        dissect(graph, self.package.declared_layers)  # infers the types that the rewrite copies
        return graph, rewrite(graph, plan)

    def _require_shipped(self, shipped: ir.Model) -> None:
        """Require that the new guard equals the shipped one; a guard in the weights is not written anew.

        Args:
            shipped: the guarded decoder, without what its layout inserted.

        Raises:
            ManifestMismatch: the shipped guard differs from the one of the folder's plan and directions.
        """
        if self.folded:
            return
        check = same_graph("", self.rebuilt(self.plan)[0], shipped)
        if not check.ok:
            raise ManifestMismatch(
                f"{self.package.decoder}: its guard is not what its plan and directions make ({check.note}); run "
                "`vlmguard verify`"
            )


def open_both_sides(
    package: ModelPackage, manifest: Manifest, record: DecoderRecord, source: Path | str | None, option: str
) -> BothSides:
    """Open one decoder of a guarded folder, unguarded and guarded.

    Args:
        package: the folder, with this decoder first.
        manifest: of the folder.
        record: the decoder's record in the manifest.
        source: the unguarded model (file or folder), if available.
        option: the option that names the source, for errors.

    Raises:
        ManifestMismatch: the source is not the guarded model's, or the guard differs from plan and directions.
        GuardError: the guard is in the weights, and there is no source.
    """
    folder = package.root
    original = originals_of(source, manifest)[record.path] if source is not None else None
    if original is None and record.plan.get("lowering") == FOLD:
        raise GuardError(f"{folder}: its guard is folded into weights and cannot be taken out; give the {option} model")
    graph = original.load_decoder() if original is not None else stripped(package)
    anatomy = dissect(graph, package.declared_layers)
    sides = BothSides(package, original, anatomy, plan_again(folder, manifest, record, graph, anatomy))
    sides._require_shipped(load_restored(manifest, package))
    return sides


def stripped(package: ModelPackage) -> ir.Model:
    graph = package.load_decoder()
    strip_guard(graph)
    return graph
