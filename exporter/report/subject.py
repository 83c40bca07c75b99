"""What a report is about: a guarded folder, its unguarded side, and the plan that leads from one to the other.

The unguarded side is the source model if it is at hand; otherwise the guard is taken out of the shipped graph in memory.
The guard is also planned and put in afresh: only such a graph shows what its gates read, and it can be given another
strength. That it is the shipped graph, node for node and bit for bit, is checked before anything is reported of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from ...graphs.anatomy import DecoderAnatomy, dissect
from ...graphs.directions import DIRECTIONS_FILE, Directions, read_directions
from ...graphs.errors import GuardError, ManifestMismatch
from ...graphs.fold import FOLD
from ...graphs.manifest import Manifest, read_manifest
from ...graphs.package import ModelPackage
from ...graphs.plan import GuardPlan
from ...graphs.rewrite import GuardReport, rewrite
from ...graphs.static_proof import same_graph
from ...graphs.strip import strip_guard
from ...graphs.taps import tap_guard_last_token, tap_last_token
from ...runtime.guarded import GuardedVLM
from ...runtime.vlm import VisionLanguageModel
from ..extraction.extract import tapped
from ..proof.verify import originals_of, plan_again


@dataclass(frozen=True)
class Subject:
    """Both sides of one guarded folder.

    Attributes:
        guarded: the folder's model, as shipped.
        anatomy: of its decoder without the guard.
        plan: what the manifest says was done, planned afresh.
        directions: the folder's own.
        source: the unguarded model's package, if it was given.
    """

    guarded: GuardedVLM
    anatomy: DecoderAnatomy
    plan: GuardPlan
    directions: Directions
    source: ModelPackage | None

    @property
    def manifest(self) -> Manifest:
        return self.guarded.manifest

    @property
    def folder(self) -> Path:
        return self.guarded.package.root

    @property
    def folded(self) -> bool:
        """Whether the guard is in the weights: then there is no node to look at, and nothing to take out."""
        return self.plan.lowering == FOLD

    @cached_property
    def unguarded(self) -> VisionLanguageModel:
        if self.source is not None:
            return VisionLanguageModel(self.source)
        return self.guarded.with_decoder(self._stripped())

    def unguarded_tapped(self) -> VisionLanguageModel:
        """The unguarded side with one output more: every layer's state at the last token."""
        if self.source is not None:
            return tapped(self.unguarded, self.anatomy)
        graph = self._stripped()
        tap_last_token(graph, self.anatomy.sites)
        return self.unguarded.with_decoder(graph)

    def guarded_tapped(self) -> VisionLanguageModel:
        """The guarded side with the states behind each layer's guard, and what each guard reads."""
        if self.folded:
            graph = self.guarded.package.load_decoder()
            tap_last_token(graph, self.anatomy.sites)
        else:
            graph, report = self._rebuilt(self.plan)
            tap_guard_last_token(graph, self.anatomy.sites, report)
        return self.guarded.with_decoder(graph)

    def with_alpha(self, alpha: float) -> VisionLanguageModel:
        """The guarded side with another strength in every guarded layer."""
        sites = tuple(replace(site, guard=replace(site.guard, alpha=alpha)) for site in self.plan.sites)
        return self.guarded.with_decoder(self._rebuilt(replace(self.plan, sites=sites))[0])

    def require_shipped(self) -> None:
        """What is looked at here is what was shipped.

        Raises:
            ManifestMismatch: the shipped guard is not the one that the folder's plan and directions make.
        """
        if self.folded:
            return
        check = same_graph("", self._rebuilt(self.plan)[0], self.guarded.package.load_decoder())
        if not check.ok:
            raise ManifestMismatch(
                f"{self.folder}: its decoder's guard is not what its plan and directions make ({check.note}); run "
                "`vlmguard verify`"
            )

    def _stripped(self) -> ir.Model:
        graph = self.guarded.package.load_decoder()
        strip_guard(graph)
        return graph

    def _rebuilt(self, plan: GuardPlan) -> tuple[ir.Model, GuardReport]:
        graph = self._stripped()
        dissect(graph, self.guarded.package.expected_layers)  # infers the types that the rewrite copies
        return graph, rewrite(graph, plan)


def open_subject(folder: Path | str, source: Path | str | None = None) -> Subject:
    """Open a guarded folder, and look at it from both sides.

    Args:
        folder: of graphs; the decoder that runs is the one that is reported on.
        source: the unguarded model (file or folder), if at hand.

    Raises:
        ManifestMismatch: the folder is not what its manifest says, or the source is not what it was made from.
        GuardError: it holds engines, or a guard in the weights and no source.
    """
    folder = Path(folder).absolute()
    if read_manifest(folder).engines:
        raise GuardError(
            f"{folder}: holds engines, whose states nobody can look at; report on the guarded folder that they were built "
            "from, and give this one with --engine"
        )
    guarded = GuardedVLM.open(folder)
    manifest, package = guarded.manifest, guarded.package
    original = originals_of(source, manifest)[manifest.decoder] if source is not None else None
    if original is None and manifest.plan.get("lowering") == FOLD:
        raise GuardError(f"{folder}: its guard is folded into weights and cannot be taken out; give the --source model")
    graph = package.load_decoder() if original is None else original.load_decoder()
    if original is None:
        strip_guard(graph)
    anatomy = dissect(graph, package.expected_layers)
    plan = plan_again(folder, manifest, manifest.decoders[0], graph, anatomy)
    subject = Subject(guarded, anatomy, plan, read_directions(folder / DIRECTIONS_FILE), original)
    subject.require_shipped()
    return subject
