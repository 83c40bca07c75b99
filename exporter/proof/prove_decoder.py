"""Every check of one decoder graph, on the file as it will ship."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...graphs.anatomy import prepare
from ...graphs.errors import ProofFailed
from ...graphs.graph_io import load_graph
from ...graphs.lowerings.fold import FOLD
from ...graphs.progress import ProgressCallback
from ...graphs.proof.fold_proof import prove_fold
from ...graphs.proof.structure import Check, prove_structure
from ...graphs.rewrite import GuardReport
from ...runtime.decoder_place import DecoderPlace
from ..artifact.guarded_folder import GuardedDecoder
from .headroom import NAME as HEADROOM
from .inputs import ProofInputs
from .prove import prove_by_running
from .prove_fold import prove_fold_by_running
from .prove_local import prove_locally


def prove_decoder(
    decoder: GuardedDecoder,
    report: GuardReport,
    folder: Path,
    inputs: ProofInputs | None,
    report_progress: ProgressCallback,
    locally: bool = False,
    place: DecoderPlace | None = None,
) -> tuple[Check, ...]:
    """Run every check on the file that will ship.

    Args:
        decoder: the plan and the unguarded model.
        report: what was rewritten.
        folder: folder of the guarded copy.
        inputs: inputs of the proof; `None`: do not run the model.
        report_progress: called with `(stage, done, total)`.
        locally: run each guard on its own.
        place: opens decoders, one at a time.

    Raises:
        ProofFailed: one of them does not hold.
    """
    label = f"proving {decoder.package.decoder.name}"
    report_progress(label, 0, 2)
    path = folder / decoder.path
    source = decoder.package.load_decoder()
    prepare(source)  # inlines functions and infers types exactly as was done to the graph that was rewritten
    structure = prove_fold if decoder.plan.lowering == FOLD else prove_structure
    checks = structure(source, load_graph(path, trust_links=True), decoder.anatomy, decoder.plan, report)
    report_progress(label, 1, 2)
    require_all(checks)
    if locally:
        checks += prove_locally(path, decoder.plan, report)
    if inputs is not None:
        running = prove_fold_by_running if decoder.plan.lowering == FOLD else prove_by_running
        checks += running(decoder.package, path, decoder.plan, report, inputs, place)
    report_progress(label, 2, 2)
    require_all(checks)
    return checks


def require_all(checks: Sequence[Check]) -> None:
    """Raise `ProofFailed` for the first check that does not hold."""
    # The headroom first: if float16 overflows, every other check fails too, with a less useful message.
    for check in sorted(checks, key=lambda check: check.name != HEADROOM):
        if not check.ok:
            raise ProofFailed(
                f"the proof failed at {check.name!r}: worst {check.worst:.2e}, limit {check.limit:.2e}, "
                f"{check.compared} compared ({check.note}); nothing was written"
            )
