"""A closed gate, strength 0, and tokens that are not edited: every output equals the unguarded model, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...graphs.graph_io import load_graph
from ...graphs.package import ModelPackage
from ...graphs.plan import GuardPlan
from ...graphs.proof.structure import Check, exact
from ...graphs.reference import (
    NO_SUPERVISOR,
)
from ...graphs.rewrite import GuardReport
from ...graphs.runtime_controls import STRENGTH_INPUT
from ...runtime.decoder import DecoderSession, open_decoder
from ...runtime.decoder_inputs import PromptBatch
from ...runtime.decoder_place import DecoderPlace
from ...runtime.device import SomeRows, Tensor
from .compare import Comparison
from .forced import force_gates
from .inputs import ProofInputs
from .limits import TOLERANCE

DECODE_STEPS = 4
TEXTS = slice(None, None, 2)  # the text-only rows of a batch of pairs
# Strengths that must leave the original; below 0 the guard must not turn round.
_OFF = (0.0, -1.0)


def closed_equals_source(
    package: ModelPackage,
    staged: Path,
    plan: GuardPlan,
    report: GuardReport,
    inputs: ProofInputs,
    place: DecoderPlace | None = None,
) -> Check:
    """Check that closed gates give the unguarded outputs, bit for bit; where the runtime's optimiser changes rounding, exactly
    without the optimiser and within a limit with it.

    Args:
        package: the unguarded model.
        staged: the guarded graph.
        plan, report: of the guard.
        inputs: inputs of the proof.
        place: opens the decoders.
    """
    closed = load_graph(staged, trust_links=True)
    force_gates(closed, plan, report, is_open=False)
    return _equals_source(
        "closed gate equals the original bit for bit", package, closed, staged.parent, plan, inputs, place
    )


def no_strength_equals_source(
    package: ModelPackage,
    staged: Path,
    plan: GuardPlan,
    report: GuardReport,
    inputs: ProofInputs,
    place: DecoderPlace | None = None,
) -> Check:
    """Check that strength 0 gives the unguarded outputs, with every gate open so that only the knob can close the guard.

    Args:
        package, staged, plan, report, inputs, place: as for `closed_equals_source`.
    """
    graph = load_graph(staged, trust_links=True)
    force_gates(graph, plan, report, is_open=True)
    turned = [{STRENGTH_INPUT: np.array(strength, np.float32)} for strength in _OFF]
    name = "strength 0, and below, equals the original bit for bit"
    return _equals_source(name, package, graph, staged.parent, plan, inputs, place, turned)


def unedited_equals_source(
    package: ModelPackage, staged: Path, plan: GuardPlan, inputs: ProofInputs, place: DecoderPlace | None = None
) -> Check:
    """Check the shipped graph without a supervisor, as in a text-only pass and at every token of an answer; of paired rows the
    text-only rows.

    Args:
        package, staged, plan, inputs, place: as for `closed_equals_source`.
    """
    name = "calls without a supervisor equal the original bit for bit"
    rows = slice(None)
    if plan.paired:
        name, rows = "the text-only rows equal the original bit for bit", TEXTS
    return _equals_source(
        name, package, load_graph(staged, trust_links=True), staged.parent, plan, inputs, place, rows=rows
    )


def _equals_source(
    name: str,
    package: ModelPackage,
    closed: ir.Model,
    at: Path,
    plan: GuardPlan,
    inputs: ProofInputs,
    place: DecoderPlace | None,
    turned: Sequence[Mapping[str, np.ndarray]] = ({},),
    rows: slice = slice(None),
) -> Check:
    """`rows`: those of each batch that are compared."""
    runs = partial(_compare_runs, package, closed, at, plan, inputs, place or DecoderPlace(), turned, rows)
    comparison, calls = runs(optimize=True)
    if not comparison.differing and not comparison.odd:
        note = f"{comparison.compared} numbers in {calls}, {inputs.origin}"
        return exact(name, comparison.compared, [], f"{note}; {comparison.note}" if comparison.note else note)
    limit = max(TOLERANCE[site.site.dtype] for site in plan.sites)
    if comparison.odd:
        return Check(name, comparison.compared, comparison.worst, limit, False, comparison.note)
    plain, plain_calls = runs(optimize=False)
    note = (
        f"exact in {plain.compared} numbers without the runtime's optimiser ({plain_calls}); with it ({calls}), "
        f"{comparison.differing} of {comparison.compared} differ by its own rounding (casts and fusions around the guard)"
    )
    if plain.differing or plain.odd:
        note = f"{plain.differing} of {plain.compared} numbers differ even without the runtime's optimiser"
        note += f"; {plain.note or f'worst {comparison.worst:.1e}'}"
    ok = not plain.differing and not plain.odd and comparison.worst <= limit
    return Check(name, comparison.compared, comparison.worst, limit, ok, note)


def _compare_runs(
    package: ModelPackage,
    guarded: ir.Model,
    folder: Path,
    plan: GuardPlan,
    inputs: ProofInputs,
    place: DecoderPlace,
    turned: Sequence[Mapping[str, np.ndarray]],
    rows: slice,
    optimize: bool,
) -> tuple[Comparison, str]:
    """Every output of prefill and decode for every setting of the runtime controls, and the number of calls as text.

    One model after the other: two of them may not fit into memory together.
    """
    session = place.open(lambda: open_decoder(package, optimize=optimize, given=inputs.given))
    left = [roll(session, batch, None) for batch in inputs.batches]
    unguarded_calls = session.calls
    session = place.open(lambda: open_decoder(package, guarded, optimize=optimize, folder=folder, given=inputs.given))
    comparison = Comparison()
    for (number, (batch, expected)), runtime_controls in product(
        enumerate(zip(inputs.batches, left, strict=True)), turned
    ):
        supervisor = no_supervisor(plan, batch.size)
        if (
            supervisor is not None and plan.edits_prompt_end and runtime_controls
        ):  # else it would not be the knob that edits nothing
            supervisor = np.zeros_like(supervisor)
        right = roll(session, batch, supervisor, runtime_controls)
        for call, (before, after) in enumerate(zip(expected, right, strict=True)):
            mask = mask_at(batch, call)[rows]
            if rows != slice(None):
                before, after = SomeRows(before, rows), SomeRows(after, rows)
            comparison.see(f"batch {number}, call {call}", mask, before, after)
    return comparison, f"{unguarded_calls} calls of the original and {session.calls} of the guarded model"


def mask_at(batch: PromptBatch, call: int) -> np.ndarray:
    """1 for the tokens so far, `[batch, prompt + call]`, at a call of `roll`."""
    return np.pad(batch.mask, ((0, 0), (0, call)), constant_values=1)


def roll(
    session: DecoderSession,
    batch: PromptBatch,
    supervisor: Tensor | None,
    runtime_controls: Mapping[str, np.ndarray] | None = None,
    steps: int = DECODE_STEPS,
) -> list[Mapping[str, np.ndarray]]:
    """Outputs of prefill and a few decode steps on fixed tokens, which repeat tokens of the prompt.

    Args:
        session: the decoder.
        batch: the prompts; inputs given by name are a single call.
        supervisor: the text-only coordinates, or `None`.
        runtime_controls: guard inputs by name.
        steps: number of decode steps.
    """
    outputs, state = session.prefill(batch, supervisor, runtime_controls)
    rolled = [session.written(outputs, batch.mask.shape[1])]
    if batch.given is not None or not session.can_step:
        return rolled
    if session.call_length not in (None, 1):  # every call has as many tokens as the first
        return rolled + [session.step(state, batch.ids, batch.embeds) for _ in range(steps)]
    for step in range(1, steps + 1):
        at = -1 - step % batch.ids.shape[1]
        embeds = None if batch.embeds is None else batch.embeds[:, at][:, None]
        outputs = session.step(state, batch.ids[:, at][:, None], embeds)
        rolled.append(session.written(outputs, state.mask.shape[1]))
    return rolled


def no_supervisor(plan: GuardPlan, batch: int) -> np.ndarray | None:
    """Supervisor coordinates of a text-only pass; `None` for modes that take none."""
    if not plan.takes_supervisor:
        return None
    return np.full((batch, len(plan.layers), plan.sites[0].guard.rank), NO_SUPERVISOR, np.float32)
