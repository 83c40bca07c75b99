"""Compares each guard, run on its own, with the numpy reference, call by call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ...graphs.lowerings.gate import LARGEST_HALF_EDIT
from ...graphs.modes import guard_mode
from ...graphs.plan import COORDINATES_OUTPUT, GuardPlan
from ...graphs.proof.cut_out import Cut, CutSite
from ...graphs.proof.structure import Check, exact
from ...graphs.reference import (
    LayerGuard,
    RuntimeControls,
    gate,
    last_index,
    last_token,
    paired_rows,
    score,
    text_coordinates,
    text_rows,
    weights,
)
from ...graphs.runtime_controls import (
    PRESENT_GATE_OUTPUT,
    SCORES_OUTPUT,
)
from .forced import forced_threshold
from .limits import TOLERANCE
from .local_calls import LocalCall, call_positions
from .prove_gate import summed
from .site_states import Masked

READS = "each guard reads its stream and the guard's inputs, nothing else"
STATES = "each guard, cut out, equals the numpy reference"
BITS = "each guard, cut out, gives the stream's bits back where it is closed"
GUARD_OUTPUTS = "what each guard, cut out, outputs of itself equals the numpy reference"


@dataclass(frozen=True)
class TokenPlaces:
    """Positions of the tokens of a call, as far as the graph's inputs show them.

    Attributes:
        last: `[rows, tokens, 1]` of 0 and 1, the last tokens.
        read: `[rows]`, the token that outputs are read at.
        paired: `[rows, 1, 1]` of 0 and 1, the rows that are edited where rows are paired.
    """

    last: np.ndarray
    read: np.ndarray
    paired: np.ndarray

    @classmethod
    def of(cls, cut: Cut, masked: Masked) -> TokenPlaces:
        calls = cut.calls
        if calls.mask is None:
            whole = np.ones((masked.rows, masked.tokens), np.int64)
            return cls(last_token(whole), last_index(whole), paired_rows(whole))
        past = masked.past if calls.cache is not None else 0
        positions = call_positions(masked) if calls.positions is not None else None
        known = masked.mask, masked.tokens, past
        return cls(last_token(*known, positions), last_index(*known, positions), paired_rows(*known))


@dataclass
class LocalFindings:
    """Results of all calls: numbers of compared values, largest deviations, faults."""

    plan: GuardPlan
    reads: int = 0
    sites: int = 0
    foreign: list[str] = field(default_factory=list)
    calls: int = 0
    states: int = 0
    compared: int = 0
    worst: float = 0.0
    opened: int = 0
    closed: int = 0
    undecided: int = 0
    beyond: int = 0
    bits: int = 0
    outputs_compared: int = 0
    outputs_worst: float = 0.0
    evaluated: bool = False
    wrong: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    wrong_outputs: list[str] = field(default_factory=list)

    @property
    def limit(self) -> float:
        return max(TOLERANCE[site.site.dtype] for site in self.plan.sites)

    def see(
        self, cut: Cut, call: LocalCall, states: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
    ) -> None:
        """Compare one call of one cut.

        Args:
            cut: the guard's graph.
            call: its inputs besides the stream.
            states: stream inputs by name.
            outputs: of the call.
        """
        self.calls += 1
        for site in cut.sites:
            with np.errstate(all="ignore"):
                self._see_site(cut, site, call, states, outputs)

    def _see_site(
        self,
        cut: Cut,
        site: CutSite,
        call: LocalCall,
        states: Mapping[str, np.ndarray],
        outputs: Mapping[str, np.ndarray],
    ) -> None:
        mode, number = self.plan.mode, site.done.layer_index
        row, limit = self.plan.layers.index(number), TOLERANCE[site.planned.site.dtype]
        layer = site.planned.guard
        if call.forced is not None and not self.plan.paired:
            layer = replace(layer, threshold=forced_threshold(self.plan, call.forced))
        base = states[site.stream]
        total = base if not site.residual else states[site.residual] + base
        total = (total + states[site.bias] if site.bias else total).astype(np.float64)
        supervisor = call.supervisors.get(number)
        a = None if supervisor is None else supervisor[:, None].astype(np.float64)
        held = None if call.held is None else call.held[:, row][:, None, None]
        strength = 1.0 if call.strength is None else call.strength
        runtime_controls = RuntimeControls(strength, 0.0 if call.offset is None else call.offset, held)
        places = TokenPlaces.of(cut, call.mask)
        ends = places.last
        selected = ends if self.plan.edits_last else np.ones_like(ends)
        copied = None
        if self.plan.paired:
            a = text_coordinates(layer, total, places.read)
            selected = np.zeros_like(ends) if call.forced is False else ends * places.paired
            copied = total[text_rows(len(total)), places.read[text_rows(len(total))]]
        delta = weights(mode, layer, total, a, runtime_controls) @ layer.ssd.astype(np.float64)
        if site.planned.site.dtype == "float16":
            delta = np.clip(delta, -LARGEST_HALF_EDIT, LARGEST_HALF_EDIT)
        delta = np.where(selected > 0, delta, 0.0)
        expected, guarded = base.astype(np.float64) + delta, outputs[site.guarded].astype(np.float64)
        if guarded.shape != expected.shape:
            self.wrong.append(f"layer {number}: shape {list(guarded.shape)}, expected {list(expected.shape)}")
            return
        opened = np.ones(ends.shape) if guard_mode(mode).gate is None else gate(mode, layer, total, a, runtime_controls)
        opened = np.broadcast_to(opened, ends.shape)[..., 0] * selected[..., 0] > 0
        unsure = self._unsure(mode, layer, total, a, runtime_controls, limit, call, held)
        edits = opened & (strength > 0)
        self._compare_bits(number, base.astype(np.float64), guarded, ~edits & ~(unsure & (selected[..., 0] > 0)))
        sure = ~unsure | (selected[..., 0] == 0)
        self._compare_states(site, number, total, base, expected, guarded, sure, copied)
        self.opened += int((edits & sure).sum())
        self.closed += int((~opened & (ends if self.plan.paired else selected)[..., 0].astype(bool) & sure).sum())
        self.undecided += int((~sure).sum())
        if self.plan.added_outputs:
            at = np.arange(total.shape[1])[None, :] == places.read[:, None]
            self._compare_outputs(
                cut, row, layer, total[at], None if a is None else a[:, 0], runtime_controls, outputs, unsure[at]
            )

    @staticmethod
    def _unsure(
        mode: str,
        layer: LayerGuard,
        total: np.ndarray,
        a: np.ndarray | None,
        runtime_controls: RuntimeControls,
        limit: float,
        call: LocalCall,
        held: np.ndarray | None,
    ) -> np.ndarray:
        """`[KINDS, TOKENS]` bool: scores within rounding of the threshold, where the score decides."""
        row = guard_mode(mode).score_row(layer)
        if row is None or call.forced is not None:
            return np.zeros(total.shape[:2], bool)
        rounding = limit * np.linalg.norm(total * row, axis=-1)
        close = (
            np.abs(score(mode, layer, total, a)[..., 0] - layer.threshold - runtime_controls.threshold_offset)
            < rounding
        )
        return close if held is None else close & ~(held[..., 0] >= 0)

    def _compare_bits(self, number: int, base: np.ndarray, found: np.ndarray, closed: np.ndarray) -> None:
        self.bits += int(closed.sum()) * base.shape[-1]
        if not np.array_equal(base[closed], found[closed]):
            self.changed.append(f"layer {number}: {int((base[closed] != found[closed]).sum())} numbers differ")

    def _compare_states(
        self,
        site: CutSite,
        number: int,
        total: np.ndarray,
        base: np.ndarray,
        expected: np.ndarray,
        found: np.ndarray,
        sure: np.ndarray,
        copied: np.ndarray | None,
    ) -> None:
        """Each token by its own largest number: an outlier of one must not excuse another. Where rows are paired, also by the
        largest of the state that its coordinates are copied from, `copied` `[rows, d]`."""
        largest = 65504.0 if site.planned.site.dtype == "float16" else 3e38
        beyond = (np.abs(expected) > 0.99 * largest).any(axis=-1) & (
            np.abs(base.astype(np.float64)) != np.abs(expected)
        ).any(axis=-1)
        self.beyond += int((sure & beyond).sum())
        sure = sure & ~beyond
        scale = np.maximum.reduce([np.abs(x).max(axis=-1) for x in (total, base.astype(np.float64), expected)])
        if copied is not None:
            scale = np.maximum(scale, np.abs(copied).max(axis=-1, keepdims=True))
        off = np.abs(found - expected).max(axis=-1) / np.maximum(scale, 1e-30)
        off = np.where(np.isnan(off), np.inf, off)[sure]
        self.states += int(sure.sum())
        self.compared += int(sure.sum()) * expected.shape[-1]
        worst = float(off.max(initial=0.0))
        if worst > TOLERANCE[site.planned.site.dtype]:
            row, token = np.argwhere(sure)[int(off.argmax())]
            place = f"layer {number}{f' of {site.done.body}' if site.done.body else ''}, row {row}, token {token}"
            what = "" if np.isfinite(found[row, token]).all() else ", NaN or infinity"
            self.wrong.append(f"{place}: off by {worst:.1e} of its largest number{what}")
        self.worst = max(self.worst, worst)

    def _compare_outputs(
        self,
        cut: Cut,
        row: int,
        layer: LayerGuard,
        last: np.ndarray,
        a: np.ndarray | None,
        runtime_controls: RuntimeControls,
        outputs: Mapping[str, np.ndarray],
        unsure: np.ndarray,
    ) -> None:
        """Coordinates, scores and gates at the last token, `[KINDS, ...]`."""
        mode, number = self.plan.mode, self.plan.layers[row]

        def compare(name: str, off: np.ndarray) -> None:
            worst = float(np.where(np.isnan(off), np.inf, off).max(initial=0.0))
            self.outputs_compared, self.outputs_worst = self.outputs_compared + off.size, max(self.outputs_worst, worst)
            if worst > self.limit:
                self.wrong_outputs.append(f"layer {number}: {name} off by {worst:.1e}")

        at = (
            runtime_controls
            if runtime_controls.held is None
            else replace(runtime_controls, held=runtime_controls.held[:, 0])
        )
        for name, here in cut.outputs.items():
            actual = outputs[here].astype(np.float64)
            if actual.shape[1:2] != (len(self.plan.layers),):
                self.wrong_outputs.append(f"{name} has shape {list(actual.shape)}")
            elif name == COORDINATES_OUTPUT:
                own = last @ layer.ssd.T.astype(np.float64)
                length = np.maximum(np.linalg.norm(last, axis=-1, keepdims=True), 1e-6)
                compare(name, np.abs(actual[:, row] - own) / length)
            elif name == SCORES_OUTPUT:
                expected = score(mode, layer, last, a)
                compare(name, np.abs(actual[:, row : row + 1] - expected) / summed(mode, layer, last, a))
            else:
                assert name == PRESENT_GATE_OUTPUT, name
                gates = gate(mode, layer, last, a, at)
                compare(name, np.abs(actual[:, row : row + 1] - gates)[~unsure] * 1e30)

    def checks(self) -> tuple[Check, ...]:
        """The records for the manifest."""
        plan, bodies = self.plan, len(self.plan.bodies)
        planned = len(plan.sites)
        wrong = [*dict.fromkeys(self.foreign)]
        if self.sites != planned:
            wrong.append(f"{self.sites} of {planned} guards were cut out")
        results = [
            exact(READS, self.reads, wrong, f"{self.sites} guards in {bodies} {'bodies' if bodies > 1 else 'body'}")
        ]
        gated = guard_mode(plan.mode).gate is not None
        note = f"{self.states} states of {self.sites} guards in {self.calls} calls, {self.opened} edited"
        note += f", {self.closed} with a closed gate" if gated else ""
        note += f"; {self.undecided} too close to the threshold to call" if self.undecided else ""
        note += f"; {self.beyond} beyond the dtype's range once edited, not compared" if self.beyond else ""
        note += "; run by ONNX's evaluator, the runtime has no bfloat16 here" if self.evaluated else ""
        wrong = [*dict.fromkeys(self.wrong)]
        ok = not wrong and self.compared > 0 and self.opened > 0 and (self.closed > 0 or not gated)
        ok = ok and self.worst <= self.limit
        text = "; ".join(wrong[:3]) + (" ..." if len(wrong) > 3 else "") if wrong else note
        results.append(Check(STATES, self.compared, self.worst, self.limit, ok, text))
        if gated or plan.edits_last or plan.knobs:  # else nothing is ever closed
            results.append(exact(BITS, self.bits, [*dict.fromkeys(self.changed)], f"{self.calls} calls"))
        if plan.added_outputs:
            wrong = [*dict.fromkeys(self.wrong_outputs)]
            ok = self.outputs_compared > 0 and not wrong
            text = "; ".join(wrong[:3]) or f"{', '.join(plan.added_outputs)} at the last token, {self.calls} calls"
            results.append(Check(GUARD_OUTPUTS, self.outputs_compared, self.outputs_worst, self.limit, ok, text))
        return tuple(results)
