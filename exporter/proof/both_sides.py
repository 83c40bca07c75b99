"""One decoder of a guarded folder from both sides: without its guard, and with one that is put in afresh.

The unguarded side is the source model if it is at hand; otherwise the guard is taken out of the shipped graph in memory.
Only a guard that is put in afresh shows what its gates read, and can be given another strength. That it is the shipped one,
node for node and bit for bit, is checked before anything is said of it.
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
from .recorded_plan import originals_of, plan_again


@dataclass(frozen=True)
class BothSides:
    """One decoder, without its guard and with it.

    Attributes:
        package: the folder, with that decoder first.
        source: the unguarded model's package, if it was given.
        anatomy: of the decoder without the guard.
        plan: what the manifest says was done, planned afresh.
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

    def _require_shipped(self) -> None:
        """What is put in here is what was shipped; where it is in the weights, nothing is put in.

        Raises:
            ManifestMismatch: the shipped guard is not the one that the folder's plan and directions make.
        """
        if self.folded:
            return
        check = same_graph("", self.rebuilt(self.plan)[0], self.package.load_decoder())
        if not check.ok:
            raise ManifestMismatch(
                f"{self.package.decoder}: its guard is not what its plan and directions make ({check.note}); run "
                "`vlmguard verify`"
            )


def open_both_sides(
    package: ModelPackage, manifest: Manifest, record: DecoderRecord, source: Path | str | None, option: str
) -> BothSides:
    """Look at one decoder of an opened guarded folder from both sides.

    Args:
        package: the folder, with that decoder first.
        record: what the manifest says of that decoder.
        source: the unguarded model (file or folder), if at hand.
        option: by which a person gives it, for the error.

    Raises:
        ManifestMismatch: the source is not what the folder was made from, or the guard not what plan and directions make.
        GuardError: the guard is in the weights, and there is no source.
    """
    folder = package.root
    original = originals_of(source, manifest)[record.path] if source is not None else None
    if original is None and record.plan.get("lowering") == FOLD:
        raise GuardError(f"{folder}: its guard is folded into weights and cannot be taken out; give the {option} model")
    graph = original.load_decoder() if original is not None else stripped(package)
    anatomy = dissect(graph, package.declared_layers)
    sides = BothSides(package, original, anatomy, plan_again(folder, manifest, record, graph, anatomy))
    sides._require_shipped()
    return sides


def stripped(package: ModelPackage) -> ir.Model:
    graph = package.load_decoder()
    strip_guard(graph)
    return graph
