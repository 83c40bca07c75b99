"""The proof of a folded graph by running it.

1. Its outputs, prefill and decode, are those of the source with a projection by nodes behind every writer of the stream.
2. At every layer the last token's state has no coordinate along the direction, and in the unguarded model it has one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...graphs.anatomy import prepare
from ...graphs.dtypes import STREAM_DTYPES
from ...graphs.graph_io import load_graph
from ...graphs.lowerings.fold import subspace
from ...graphs.package import ModelPackage
from ...graphs.plan import GuardPlan
from ...graphs.proof.fold_proof import project_explicitly
from ...graphs.proof.structure import Check
from ...graphs.rewrite import GuardReport
from ...graphs.taps import STATES_OUTPUT, tap_last_token
from ...runtime.decoder import open_decoder
from ...runtime.decoder_place import DecoderPlace
from .compare import Comparison
from .headroom import Headroom
from .inputs import ProofInputs
from .limits import TOLERANCE
from .prove_closed import mask_at, roll

Rolled = list[list[Mapping[str, np.ndarray]]]  # per batch, per call


def prove_fold_by_running(
    package: ModelPackage,
    staged: Path,
    plan: GuardPlan,
    report: GuardReport,
    inputs: ProofInputs,
    place: DecoderPlace | None = None,
) -> tuple[Check, ...]:
    """All dynamic checks of a staged folded decoder.

    Args:
        package: the unguarded model.
        staged: the folded decoder's file, as it will ship.
        plan, report: what was planned and done.
        inputs: what to run on.
        place: where decoders are opened, one at a time.
    """
    place = place or DecoderPlace()
    projections = 0

    def reference(model: ir.Model) -> None:
        nonlocal projections
        projections = project_explicitly(model, plan)

    unguarded, _ = _run(package, _source(package, lambda model: None), package.decoder.parent, plan, inputs, place)
    expected, _ = _run(package, _source(package, reference), package.decoder.parent, plan, inputs, place)
    comparison, calls = _run(package, load_graph(staged, trust_links=True), staged.parent, plan, inputs, place)
    place.close()
    limit = _limit(load_graph(staged, trust_links=True), plan, report)
    checks = [
        _same_outputs(limit, report, expected, comparison, unguarded, projections, calls, inputs),
        _no_coordinate(limit, plan, unguarded, comparison, inputs),
    ]
    headroom = Headroom()
    for before, after in _pairs(unguarded, comparison):
        for row, site in enumerate(plan.layers):
            if plan.sites[0].site.dtype == "float16":
                headroom.see(site, before[STATES_OUTPUT][:, row], after[STATES_OUTPUT][:, row])
    return (*checks, headroom.check()) if headroom.layers else tuple(checks)


def _source(package: ModelPackage, change: Callable[[ir.Model], None]) -> ir.Model:
    model = package.load_decoder()
    prepare(model)  # inlines functions and infers types exactly as was done to the graph that was folded
    change(model)
    return model


def _run(
    package: ModelPackage, model: ir.Model, folder: Path, plan: GuardPlan, inputs: ProofInputs, place: DecoderPlace
) -> tuple[Rolled, int]:
    """Every output and the last token's states, prefill and decode, and how many calls that took; one model at a time."""
    tap_last_token(model, [planned.site for planned in plan.sites])
    session = place.open(lambda: open_decoder(package, model, folder=folder, given=inputs.given))
    return [roll(session, batch, None) for batch in inputs.batches], session.calls


def _limit(folded: ir.Model, plan: GuardPlan, report: GuardReport) -> float:
    """That of the coarsest dtype: float16 weights may write a float32 stream, and a fold rounds them again."""
    weights = {folded.graph.initializers[name].dtype for name in report.initializers}
    dtypes = {plan.sites[0].site.dtype, *(STREAM_DTYPES[dtype] for dtype in weights if dtype is not None)}
    return max(TOLERANCE[dtype] for dtype in dtypes)


def _pairs(left: Rolled, right: Rolled) -> list[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]]:
    return [pair for a, b in zip(left, right, strict=True) for pair in zip(a, b, strict=True)]


def _same_outputs(
    limit: float,
    report: GuardReport,
    expected: Rolled,
    found: Rolled,
    unguarded: Rolled,
    projections: int,
    calls: int,
    inputs: ProofInputs,
) -> Check:
    seen, moved = _compared(expected, found, inputs), _compared(unguarded, found, inputs).worst
    note = (
        f"{len(report.initializers)} folded weights against {projections} projections by nodes, {calls} calls of each, "
        f"{inputs.origin}; outputs are up to {moved:.1e} from the unguarded model's"
    )
    note = f"{note}; {seen.note}" if seen.note and not seen.odd else seen.note or note
    ok = seen.compared > 0 and projections > 0 and seen.worst <= limit and moved > 0
    return Check("outputs equal the source's with every writer projected", seen.compared, seen.worst, limit, ok, note)


def _compared(left: Rolled, right: Rolled, inputs: ProofInputs) -> Comparison:
    found = Comparison("the projected source", "the folded model")
    for number, (batch, before, after) in enumerate(zip(inputs.batches, left, right, strict=True)):
        for call, (a, b) in enumerate(zip(before, after, strict=True)):
            found.see(f"batch {number}, call {call}", mask_at(batch, call), a, b)
    return found


def _no_coordinate(limit: float, plan: GuardPlan, unguarded: Rolled, found: Rolled, inputs: ProofInputs) -> Check:
    basis = subspace(plan.sites[0].guard.ssd)
    compared, worst, had = 0, 0.0, 0.0
    for before, after in _pairs(unguarded, found):
        for states, folded in ((before, False), (after, True)):
            h = states[STATES_OUTPUT].astype(np.float64)
            share = float(np.abs(h @ basis.T).max()) / max(float(np.abs(h).max()), 1e-6)
            share = share if np.isfinite(share) else float("inf")  # max() would drop what is not a number
            worst, had = (max(worst, share), had) if folded else (worst, max(had, share))
            compared += h.size if folded else 0
    note = f"largest |c| / |h| over {len(plan.layers)} layers: {had:.1e} unguarded, {worst:.1e} folded, {inputs.origin}"
    ok = compared > 0 and worst <= limit and had > worst
    return Check("no state has a coordinate along the direction", compared, worst, limit, ok, note)
