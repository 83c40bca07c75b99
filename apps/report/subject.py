"""The model of a report: guarded as shipped, unguarded, and both with extra outputs for the figures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ...exporter.extraction.extract import tapped, with_states
from ...exporter.proof.both_sides import BothSides, open_both_sides
from ...exporter.proof.recorded_plan import recorded_directions
from ...graphs.anatomy import DecoderAnatomy
from ...graphs.directions import Directions
from ...graphs.errors import GuardError
from ...graphs.manifest import Manifest, read_manifest
from ...graphs.package import ModelPackage
from ...graphs.plan import GuardPlan
from ...graphs.taps import tap_guard_last_token, tap_last_token
from ...runtime.guarded import GuardedVLM
from ...runtime.vlm import VisionLanguageModel


@dataclass(frozen=True)
class Subject:
    """Both sides of one guarded folder.

    Attributes:
        guarded: the folder's model, as shipped.
        sides: the graphs of its decoder.
        directions: of this decoder.
    """

    guarded: GuardedVLM
    sides: BothSides
    directions: Directions

    @property
    def manifest(self) -> Manifest:
        return self.guarded.manifest

    @property
    def folder(self) -> Path:
        return self.guarded.package.root

    @property
    def anatomy(self) -> DecoderAnatomy:
        return self.sides.anatomy

    @property
    def plan(self) -> GuardPlan:
        return self.sides.plan

    @property
    def source(self) -> ModelPackage | None:
        return self.sides.source

    @cached_property
    def unguarded(self) -> VisionLanguageModel:
        if self.source is not None:
            return VisionLanguageModel(self.source)
        return self.guarded.with_decoder(self.sides.unguarded())

    def unguarded_tapped(self) -> VisionLanguageModel:
        """The unguarded side with one output more: every layer's state at the last token."""
        if self.source is not None:
            return tapped(self.unguarded, self.anatomy)
        return self.guarded.with_decoder(with_states(self.sides.unguarded(), self.anatomy))

    def guarded_tapped(self) -> VisionLanguageModel:
        """The guarded side with the states behind each layer's guard, and what each guard reads."""
        if self.sides.folded:
            graph = self.guarded.package.load_decoder()
            tap_last_token(graph, self.anatomy.sites)
        else:
            graph, report = self.sides.rebuilt(self.plan)
            tap_guard_last_token(graph, self.anatomy.sites, report)
        return self.guarded.with_decoder(graph)

    def with_alpha(self, alpha: float) -> VisionLanguageModel:
        """The guarded side with another strength in every guarded layer."""
        sites = tuple(replace(site, guard=replace(site.guard, alpha=alpha)) for site in self.plan.sites)
        return self.guarded.with_decoder(self.sides.rebuilt(replace(self.plan, sites=sites))[0])


def open_subject(folder: Path | str, source: Path | str | None = None, variant: str | None = None) -> Subject:
    """Open a guarded folder, guarded and unguarded.

    Args:
        folder: guarded folder of graphs.
        source: the unguarded model (file or folder); default: the guard is removed in memory.
        variant: precision variant of the decoder; `None`: the one that runs.

    Raises:
        ManifestMismatch: a file differs from the manifest, or `source` is not the model that was guarded.
        GuardError: the folder holds engines, or the guard is in the weights and `source` is missing.
    """
    folder = Path(folder).absolute()
    if read_manifest(folder).engines:
        raise GuardError(
            f"{folder}: holds engines, whose states cannot be read; report on the guarded folder that they were built "
            "from, and give this one with --engine"
        )
    guarded = GuardedVLM.open(folder, variant=variant)
    manifest = guarded.manifest
    sides = open_both_sides(guarded.package, manifest, manifest.decoders[0], source, "--source")
    return Subject(guarded, sides, recorded_directions(folder, manifest, manifest.decoders[0]))
