"""`ExportJob`: what is known of an export, and which stage finds it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..graphs.clock import Stamp
from ..graphs.directions import Directions
from ..graphs.progress import ProgressCallback
from ..graphs.spec import GuardSpec
from .artifact.guarded_folder import GuardedDecoder
from .calibration.guard_config import GuardConfig
from .calibration.refusal_regression import Refusals
from .effect_check import EffectBaseline
from .export_result import ExportResult
from .opened_decoder import OpenedDecoder
from .options import ExportOptions
from .proof.inputs import ProofInputs
from .proof.level import ProofLevel
from .resolve import ResolvedDirections
from .session import Session
from .sources import Source, above
from .variants import VariantRow


@dataclass
class ExportJob:
    """One export. The first fields are the request; each of the others is set by the stage that is named with it.

    Attributes:
        options: of the export.
        requested: the requested guard, from the options or `config`.
        config: the `guard.toml` that was given, if one was.
        source: the unguarded model.
        target: the folder to write.
        stamp: the time of the folder.
        key: private key to sign the folder with; `None` leaves it unsigned.
        report_progress: called with `(stage, done, total)`.
        graphs: `read_decoders`: the decoder graphs in memory, the one that runs first.
        session: `read_decoders`: the model that runs, notes, and files found beside the model.
        resolved: `resolve_guard`: the directions, and what was measured for them.
        directions: `resolve_guard`: the directions with the config's numbers.
        spec: `resolve_guard`: the request with the gate of the chosen mode.
        planned: `plan_guards`: each decoder with its plan, without a report and a proof.
        proved: `choose_proof`: how much is proved, and why that much.
        inputs: `choose_proof`: what each decoder file is proved on; empty where the proof does not run the model.
        baseline: `ask_unguarded`: the unguarded model's answers; `None` if a calibration measured them.
        folder: the hidden folder that becomes `target` when everything holds.
        decoders: `write_guarded`: each decoder with its plan, its report and its proof.
        refusals: `ask_guarded`: harmful prompts refused without and with the guard.
        variants: `ask_variants`: what each precision variant refuses; empty where there is one variant.
    """

    options: ExportOptions
    requested: GuardSpec
    config: GuardConfig | None
    source: Source
    target: Path
    stamp: Stamp
    key: Path | None
    report_progress: ProgressCallback
    graphs: tuple[OpenedDecoder, ...] = field(init=False)
    session: Session = field(init=False)
    resolved: ResolvedDirections = field(init=False)
    directions: Directions = field(init=False)
    spec: GuardSpec = field(init=False)
    planned: tuple[GuardedDecoder, ...] = field(init=False)
    proved: ProofLevel = field(init=False)
    inputs: Mapping[Path, ProofInputs] = field(init=False)
    baseline: EffectBaseline | None = field(init=False)
    folder: Path = field(init=False)
    decoders: tuple[GuardedDecoder, ...] = field(init=False)
    refusals: Refusals | None = field(init=False)
    variants: tuple[VariantRow, ...] = field(init=False)

    def result(self, written: bool) -> ExportResult:
        """The result for the caller.

        Args:
            written: whether all stages ran; after the planning stages alone there are plans without reports and proofs.
        """
        return ExportResult(
            out=self.target.absolute(),
            decoders=self.decoders if written else self.planned,
            proved=self.proved,
            calibration=self.resolved.calibration,
            refusals=self.refusals if written else None,
            choice=self.resolved.choice,
            written=written,
            found=self.session.found | above(self.source.package),
            parity=self.source.parity,
            variants=self.variants if written else (),
        )
