"""The result of an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..graphs.anatomy import DecoderAnatomy
from ..graphs.plan import GuardPlan
from ..graphs.proof.structure import Check
from ..graphs.rewrite import GuardReport
from .artifact.guarded_folder import GuardedDecoder
from .calibration.attempts import Choice
from .calibration.refusal_regression import Refusals
from .calibration.results import Calibration
from .proof.level import ProofLevel
from .variants import VariantRow


@dataclass(frozen=True)
class ExportResult:
    """Result of `export`; with `dry_run`, of its planning.

    Attributes:
        out: the folder; not written with `dry_run`.
        decoders: every decoder graph of the folder, the one that runs first.
        proved: how much was proved, and why that much.
        calibration: what the calibrator measured, if it ran.
        refusals: harmful prompts refused without and with the guard, where prompts were at hand.
        choice: of the mode, where it was left open.
        written: whether `out` was written.
        parity: how far a checkpoint's exported graphs are from torch; empty for a model that was ONNX already.
        variants: what each precision variant of the decoder refuses, where there are several.
        found: what was found beside the model and used -> its absolute path. Not in the manifest, which others read.
    """

    out: Path
    decoders: tuple[GuardedDecoder, ...]
    proved: ProofLevel
    calibration: Calibration | None = None
    refusals: Refusals | None = None
    choice: Choice | None = None
    written: bool = False
    found: Mapping[str, Path] = field(default_factory=dict)
    parity: tuple[Check, ...] = ()
    variants: tuple[VariantRow, ...] = ()

    def __repr__(self) -> str:
        written = "" if self.written else ", not written"
        guard = f"{self.plan.mode} on layers {self.plan.layers}"
        return f"ExportResult({str(self.out)!r}, {guard}, proved {self.proved.level}{written})"

    @property
    def anatomy(self) -> DecoderAnatomy:
        """Of the decoder that runs."""
        return self.decoders[0].anatomy

    @property
    def plan(self) -> GuardPlan:
        """Of the decoder that runs."""
        return self.decoders[0].plan

    @property
    def report(self) -> GuardReport | None:
        """Of the decoder that runs; `None` with `dry_run`."""
        return self.decoders[0].report

    @property
    def proof(self) -> tuple[Check, ...]:
        """Of the decoder that runs; empty with `dry_run`."""
        return self.decoders[0].proof

    def to_json(self) -> dict[str, Any]:
        """The content of `--json`."""
        return {
            "out": str(self.out),
            "written": self.written,
            "decoders": [decoder.to_json() for decoder in self.decoders],
            "proved": self.proved.level,
            "proved_because": self.proved.why,
            "calibration": self.calibration.to_json() if self.calibration is not None else None,
            "refusals": self.refusals.to_json() if self.refusals is not None else None,
            "choice": self.choice.to_json() if self.choice is not None else None,
            "found": {what: str(path) for what, path in self.found.items()},
            "variants": {row.decoder: row.to_json() for row in self.variants} or None,
            "export_parity": [check.to_json() for check in self.parity] or None,
        }
