"""The proof by running the staged file. Each check records how much it compared.

1. Closed gate (or zero strength): every original output, prefill and decode, equals the unguarded model's bit for bit
   (`prove_closed`). For a guard that edits only the end of the prompt, so does every call without a supervisor: each token of
   an answer.
2. Guarded hidden states equal the numpy reference, with the gates as the inputs set them and with every gate forced open.
3. Tokens outside the positions are unchanged, bit for bit.
4. In a float16 graph: how close the states come to float16's limit (`headroom`).
   Paired rows: even rows, and with them rows that stand alone, equal the original bit for bit, decode steps of odd rows too.
5. Where the graph has runtime controls (`graphs.runtime_controls`): strength 0, and below, equals the original bit for bit;
   states at other settings equal the reference; its scores and gates are the reference's (`prove_gate`); a held gate
   outlasts later scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ...graphs.errors import RunFailed
from ...graphs.graph_io import load_graph
from ...graphs.modes import guard_mode
from ...graphs.package import ModelPackage
from ...graphs.plan import COORDINATES_OUTPUT, GuardPlan
from ...graphs.proof.structure import Check, exact
from ...graphs.reference import (
    LayerGuard,
    RuntimeControls,
    guard,
    last_index,
    last_token,
    paired_rows,
    score,
    text_coordinates,
)
from ...graphs.rewrite import GuardReport
from ...graphs.runtime_controls import OFFSET_INPUT, PAST_GATE_INPUT, PRESENT_GATE_OUTPUT, STRENGTH_INPUT
from ...graphs.taps import tap_guard
from ...runtime.decoder import DecoderSession, open_decoder
from ...runtime.decoder_inputs import can_pad
from ...runtime.decoder_place import DecoderPlace
from .compare import first_no_number, padded, relative
from .forced import force_gates, forced_threshold
from .headroom import Headroom
from .inputs import ProofInputs, paired_inputs
from .limits import TOLERANCE
from .prove_closed import (
    DECODE_STEPS,
    closed_equals_source,
    mask_at,
    no_strength_equals_source,
    no_supervisor,
    roll,
    unedited_equals_source,
)
from .prove_gate import GateOutputs

# A threshold offset that opens every gate, and is cut nowhere.
_LOWERED = -1.0e9


def prove_by_running(
    package: ModelPackage,
    staged: Path,
    plan: GuardPlan,
    report: GuardReport,
    inputs: ProofInputs,
    place: DecoderPlace | None = None,
) -> tuple[Check, ...]:
    """All dynamic checks of a staged guarded decoder.

    Args:
        package: the unguarded model.
        staged: the guarded decoder's file, as it will ship.
        plan, report: what was planned and done.
        inputs: what to run on.
        place: where decoders are opened, one at a time.
    """
    place = place or DecoderPlace()
    if plan.paired:
        inputs = paired_inputs(inputs, can_pad(package.load_decoder().graph))
    try:
        return (
            closed_equals_source(package, staged, plan, report, inputs, place),
            *([no_strength_equals_source(package, staged, plan, report, inputs, place)] if plan.knobs else ()),
            *([unedited_equals_source(package, staged, plan, inputs, place)] if plan.edits_prompt_end else ()),
            *_states_equal_reference(package, staged, plan, report, inputs, place),
        )
    except RunFailed as failure:
        raise RunFailed(
            f"{failure}; give inputs that it runs on with --proof-inputs, or, if this machine cannot run the model at all, "
            "prove each guard by itself with --proof local"
        ) from None
    finally:
        place.close()


def _states_equal_reference(
    package: ModelPackage,
    staged: Path,
    plan: GuardPlan,
    report: GuardReport,
    inputs: ProofInputs,
    place: DecoderPlace,
) -> tuple[Check, ...]:
    """Raw states through the numpy reference against the graph's guarded states, prefill and decode."""
    checks = []
    supervisors = _supervisors(package, staged, plan, inputs, place)
    headroom, gate_outputs = Headroom(), GateOutputs(plan, max(TOLERANCE[site.site.dtype] for site in plan.sites))
    for setting in _settings(plan):
        graph = load_graph(staged, trust_links=True)
        if setting.forced is not None:
            force_gates(graph, plan, report, is_open=setting.forced)
        names = tap_guard(graph, plan, report)
        session = place.open(partial(open_decoder, package, graph, folder=staged.parent, given=inputs.given))
        checks.append(_against_reference(session, plan, names, inputs, supervisors, setting, headroom, gate_outputs))
    checks += gate_outputs.checks()
    if headroom.layers:
        checks.append(headroom.check())
    checks += _unedited_tokens(package, staged, plan, report, inputs, supervisors, place)
    return tuple(checks)


@dataclass(frozen=True)
class _Setting:
    """Gates and runtime controls of one run.

    Attributes:
        name: for the check's; "" for the graph as it ships, called as an app calls it.
        what: in words.
        forced: every gate open, or closed, by its threshold.
        moves: whether some state must be edited; `None`: as the inputs have it.
        strength, offset, held: values of the runtime controls; `held` applies to every gate.
        without_supervisor: no supervisor is given, as in the text-only pass; nothing may be edited.
    """

    name: str
    what: str
    forced: bool | None = None
    moves: bool | None = None
    strength: float | None = None
    offset: float | None = None
    held: float | None = None
    without_supervisor: bool = False

    def feeds(self, plan: GuardPlan, batch: int) -> dict[str, np.ndarray]:
        knobs = {STRENGTH_INPUT: self.strength, OFFSET_INPUT: self.offset}
        fed = {name: np.array(value, np.float32) for name, value in knobs.items() if value is not None}
        held = self.held
        return fed if held is None else fed | {PAST_GATE_INPUT: np.full((batch, len(plan.layers)), held, np.float32)}

    def layer(self, layer: LayerGuard, plan: GuardPlan) -> LayerGuard:
        """The layer's numbers, as the graph has them now."""
        return layer if self.forced is None else replace(layer, threshold=forced_threshold(plan, self.forced))

    def runtime_controls(self, held: np.ndarray | None) -> RuntimeControls:
        strength = 1.0 if self.strength is None else self.strength
        return RuntimeControls(strength, 0.0 if self.offset is None else self.offset, held)


def _settings(plan: GuardPlan) -> list[_Setting]:
    """Every run of the proof."""
    row = guard_mode(plan.mode)
    gated = row.gate is not None
    if row.gate == "any text":
        found = [_Setting("", "the text-only coordinates at the prompt's end", moves=True)]
    else:
        found = [_Setting("", "gates as the inputs set them", moves=None if gated else True)]
    if row.gate not in (None, "any text"):
        found.append(_Setting(" (gates forced open)", "every gate forced open", True, True))
    if plan.takes_supervisor:
        found.append(_Setting(" (no supervisor)", "no supervisor", moves=False, without_supervisor=True))
    if OFFSET_INPUT in plan.knobs:
        what = f"strength 0.5, every threshold lowered by {-_LOWERED:g}"
        found.append(_Setting(" (knobs turned)", what, None, True, 0.5, _LOWERED))
    elif plan.knobs:
        found.append(_Setting(" (knobs turned)", "strength 0.5", None, True, 0.5))
    if plan.gate == "prompt":  # the thresholds contradict the held decision
        found.append(_Setting(" (held closed)", "held closed, every score above its threshold", True, False, held=0.0))
        found.append(_Setting(" (held open)", "held open, every score below its threshold", False, True, held=1.0))
    return found


def _held(
    plan: GuardPlan, setting: _Setting, rolled: Sequence[Mapping[str, np.ndarray]], number: int
) -> np.ndarray | None:
    """The gates that go into call `number`, `[batch, layers]`, or `None` where they are decided in it."""
    if plan.gate != "prompt" or (setting.held is None and number == 0):
        return None
    first = rolled[0][PRESENT_GATE_OUTPUT]
    return first if setting.held is None else np.full_like(first, setting.held)


def _against_reference(
    session: DecoderSession,
    plan: GuardPlan,
    names: list[tuple[str, str]],
    inputs: ProofInputs,
    supervisors: Sequence[np.ndarray | None],
    setting: _Setting,
    headroom: Headroom,
    gate_outputs: GateOutputs,
) -> Check:
    halves = {site.layer_index for site in plan.sites if site.site.dtype == "float16"}
    limit = max(TOLERANCE[site.site.dtype] for site in plan.sites)
    compared, moved, states, undecided, worst = 0, 0, 0, 0, 0.0
    odd: list[str] = []
    for which, (batch, text_supervisor) in enumerate(zip(inputs.batches, supervisors, strict=True)):
        prompts = no_supervisor(plan, batch.size) if setting.without_supervisor else text_supervisor
        rolled = roll(session, batch, prompts, setting.feeds(plan, batch.size))
        for number, outputs in enumerate(rolled):
            supervisor = prompts if number == 0 or not plan.edits_prompt_end else no_supervisor(plan, batch.size)
            # a cached decode step is one token long; without a cache the whole sequence comes again
            mask = mask_at(batch, number * (session.call_length or 1))[:, -_length(outputs, names) :]
            ends = last_token(mask)
            selected = ends if plan.edits_last else None
            if plan.paired:
                selected = ends * paired_rows(mask)
            all_held = _held(plan, setting, rolled, number)
            for row, (guard_of_layer, (raw_name, guarded_name)) in enumerate(zip(plan.guards, names, strict=True)):
                raw, guarded = outputs[raw_name].astype(np.float64), outputs[guarded_name].astype(np.float64)
                layer = setting.layer(guard_of_layer, plan)
                a = None if supervisor is None else supervisor[:, row : row + 1, :].astype(np.float64)
                if plan.paired:
                    a = text_coordinates(layer, raw, last_index(mask))
                held = None if all_held is None else all_held[:, row : row + 1]
                runtime_controls = setting.runtime_controls(None if held is None else held[:, None])
                expected = guard(plan.mode, layer, raw, a, selected, runtime_controls)
                last = raw[ends[..., 0] == 1]
                gate_outputs.see(
                    row,
                    layer,
                    last,
                    None if supervisor is None or a is None else a[:, 0],
                    setting.runtime_controls(held),
                    outputs,
                )
                real = mask.astype(bool)
                if plan.layers[row] in halves:
                    headroom.see(plan.layers[row], raw[real], guarded[real])
                for what, values in (("before", raw), ("behind", guarded)):
                    if place := first_no_number(values, real):
                        odd.append(
                            f"the state {what} layer {plan.layers[row]}'s guard, batch {which}, call {number}: {place}"
                        )
                # by rounding alone such a gate may open here and not there; held or forced open, it is compared
                if setting.forced is None and setting.offset is None and held is None:
                    close = _close_calls(plan.mode, layer, raw, a, limit) & real
                    real, undecided = real & ~close, undecided + int(close.sum())
                compared += int(real.sum()) * raw.shape[-1]
                worst = max(worst, relative(expected[real], guarded[real]))
                moved += int((expected[real] != raw[real]).any(axis=-1).sum())
                states += int(real.sum())
                if supervisor is not None:  # the text-only pass outputs the coordinates of this layer
                    own = last @ layer.ssd.T.astype(np.float64)
                    shown = outputs[COORDINATES_OUTPUT][:, row].astype(np.float64)
                    off = np.abs(own - shown).max() / max(float(np.abs(last).max()), 1e-6)
                    worst = max(worst, float(off) if np.isfinite(off) else float("inf"))
                    compared += own.size
    note = f"{moved} of {states} states edited in {session.calls} calls, {setting.what}, {inputs.origin}"
    note += f"; {undecided} too close to the threshold to call" if undecided else ""
    ok = compared > 0 and worst <= limit and setting.moves in (None, moved > 0) and not odd
    worst, note = (float("inf"), "; ".join(odd[:3])) if odd else (worst, note)
    return Check(f"guarded states equal the numpy reference{setting.name}", compared, worst, limit, ok, note)


def _close_calls(
    mode: str, layer: LayerGuard, raw: np.ndarray, supervisor: np.ndarray | None, limit: float
) -> np.ndarray:
    """`[batch, sequence]` bool: states whose score is within rounding of the threshold.

    Each state by its own summands: one outlier channel of one token, which real models have, must not excuse the others.
    """
    row = guard_mode(mode).score_row(layer)
    if row is None:  # no gate, or one that compares numbers that it was given
        return np.zeros(raw.shape[:2], bool)
    rounding = limit * np.linalg.norm(raw * row, axis=-1)
    return np.abs(score(mode, layer, raw, supervisor)[..., 0] - layer.threshold) <= rounding


def _length(outputs: Mapping[str, np.ndarray], names: list[tuple[str, str]]) -> int:
    """Tokens of this call."""
    return outputs[names[0][0]].shape[1]


def _unedited_tokens(
    package: ModelPackage,
    staged: Path,
    plan: GuardPlan,
    report: GuardReport,
    inputs: ProofInputs,
    supervisors: Sequence[np.ndarray | None],
    place: DecoderPlace,
) -> list[Check]:
    """With positions `last`, the states of all other tokens are unchanged, bit for bit, with gates open or closed; no check
    if a
    call has no other token."""
    name = "tokens outside the positions are untouched bit for bit"
    if not plan.edits_last:
        return []
    graph = load_graph(staged, trust_links=True)
    force_gates(graph, plan, report, is_open=True)
    names = tap_guard(graph, plan, report)
    session = place.open(lambda: open_decoder(package, graph, optimize=False, folder=staged.parent, given=inputs.given))
    if session.one_token:
        return []
    compared, wrong = 0, []
    for batch, supervisor in zip(inputs.batches, supervisors, strict=True):
        # paired rows: no token of a decode step is edited either
        calls = roll(session, batch, supervisor, steps=DECODE_STEPS if plan.paired else 0)
        for call, outputs in enumerate(calls):
            mask = mask_at(batch, call * (session.call_length or 1))[:, -_length(outputs, names) :]
            others = (last_token(mask) * (paired_rows(mask) if plan.paired else 1))[..., 0] == 0
            for layer, (raw, guarded) in zip(plan.layers, names, strict=True):
                compared += int(others.sum()) * plan.width
                left, right = outputs[raw], outputs[guarded]
                nothing = np.isnan(left) & np.isnan(right) & padded(left, mask)
                if not ((left == right) | nothing)[others].all():
                    wrong.append(f"layer {layer}")
                compared -= int(nothing[others].sum())
    return [exact(name, compared, wrong, f"{session.calls} calls")]


def _supervisors(
    package: ModelPackage, staged: Path, plan: GuardPlan, inputs: ProofInputs, place: DecoderPlace
) -> list[np.ndarray | None]:
    """The text-only pass of each batch, through the graph as it ships: because a graph with forced gates would edit it."""
    if not plan.takes_supervisor:
        return [None for _ in inputs.batches]
    graph = load_graph(staged, trust_links=True)
    session = place.open(lambda: open_decoder(package, graph, folder=staged.parent, given=inputs.given))
    found: list[np.ndarray | None] = []
    for text in inputs.texts:
        outputs, _ = session.prefill(text, no_supervisor(plan, text.size))
        found.append(outputs[COORDINATES_OUTPUT])
    return found
