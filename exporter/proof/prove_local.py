"""The proof of each guard by itself: its own nodes, cut out of the staged file, run against the numpy reference.

No weight of the decoder is loaded, so it takes seconds and megabytes at any size. With the proof of the structure (every
path through the decoder passes these nodes, and nothing else changed) it says what the guard computes wherever it stands.
What it does not run is the decoder around it: `prove` does.

1. Each guard reads its own stream, the inputs that show which token is last, and the guard's own inputs. Nothing else.
2. Guarded states equal the numpy reference: states from zero to the dtype's limit, outlier channels, scores just above
   and below the threshold; masks whole, padded, static and behind a past; all supervisors, knobs and held gates; paired
   rows also in a decode step, with an odd number of rows, and where a row has no token in the call.
3. A closed gate, strength 0 or less, a listening pass and every token outside the positions give the stream's bits back.
4. Coordinates, scores and gates that the guard outputs are the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...graphs.call_inputs import GrowingCache
from ...graphs.errors import ModelUnreadable, RunFailed
from ...graphs.graph_io import graph_bytes, load_graph
from ...graphs.lowerings.gate import LARGEST_HALF_EDIT
from ...graphs.node_builder import NUMPY_DTYPES
from ...graphs.plan import COORDINATES_OUTPUT, SUPERVISOR_INPUTS, GuardPlan
from ...graphs.proof.cut_out import Cut, CutSite, cut_out
from ...graphs.proof.structure import Check, exact
from ...graphs.reference import (
    Dials,
    LayerGuard,
    call_end,
    gate,
    last_index,
    last_token,
    paired_rows,
    score,
    text_coordinates,
    text_rows,
    weights,
)
from ...graphs.rewrite import GuardReport
from ...graphs.runtime_controls import (
    OFFSET_INPUT,
    PAST_GATE_INPUT,
    PRESENT_GATE_OUTPUT,
    SCORES_OUTPUT,
    STRENGTH_INPUT,
)
from ...graphs.spec import MODES_TOWARD_TEXT
from ...runtime.runners import open_runner
from .forced import force_gates, forced_threshold
from .limits import TOLERANCE
from .prove_gate import summed
from .site_states import KINDS, TOKENS, Aim, Masked, listening, masks, paired_masks, site_states, supervisor_of

READS = "each guard reads its stream and the guard's inputs, nothing else"
STATES = "each guard, cut out, equals the numpy reference"
BITS = "each guard, cut out, gives the stream's bits back where it is closed"
TOLD = "what each guard, cut out, outputs of itself equals the numpy reference"
# Numbers of guards in one session; more sites than that are cut out in several parts.
_MOST_NUMBERS = 32 << 20


def prove_locally(staged: Path, plan: GuardPlan, report: GuardReport) -> tuple[Check, ...]:
    """All checks of the guards of a staged decoder, each body of it.

    Args:
        staged: the guarded decoder's file, as it will ship.
        plan, report: what was planned and done; a lowering that writes nodes.
    """
    graph = load_graph(staged, vouched=True)
    found = _Findings(plan)
    for body in plan.bodies:
        for layers in _parts(plan):
            _prove_part(graph, plan, report, body, layers, found)
    return found.checks()


def _parts(plan: GuardPlan) -> Iterator[Sequence[int]]:
    """Layers that are cut out together: all of them where the guard has outputs of its own."""
    rank = max(guard.rank for guard in plan.guards)
    numbers = plan.width * (plan.width if plan.lowering == "dense" else 3 * (rank + 1))
    size = len(plan.layers) if plan.added_outputs else max(1, _MOST_NUMBERS // numbers)
    for start in range(0, len(plan.layers), size):
        yield plan.layers[start : start + size]


@dataclass(frozen=True)
class _Call:
    """One call of a cut.

    Attributes:
        mask: of the whole sequence.
        supervisors: by layer, `[KINDS, m]`; empty for modes without one.
        forced: every gate open or closed, by its threshold.
        strength, offset: knobs that are fed.
        held: gates that come in, `[KINDS, layers]`.
    """

    mask: Masked
    supervisors: Mapping[int, np.ndarray] = field(default_factory=dict)
    forced: bool | None = None
    strength: float | None = None
    offset: float | None = None
    held: np.ndarray | None = None


def _calls(plan: GuardPlan, layers: Sequence[int]) -> Iterator[_Call]:
    """Every call of the proof; the graph as it ships first, then with its gates forced."""
    guards = dict(zip(plan.layers, plan.guards, strict=True))
    supervised, gated = plan.takes_supervisor, plan.mode != "project"

    def told(turned: int) -> dict[int, np.ndarray]:
        chosen = plan.layers if supervised else ()
        return {number: supervisor_of(number, plan.mode, guards[number], turned) for number in chosen}

    silent = {number: listening(guards[number].rank) for number in plan.layers if supervised}
    whole, *others = masks() if plan.mask else masks()[:1]
    others += paired_masks() if plan.paired else []
    undecided = np.full((KINDS, len(plan.layers)), -1, np.float32) if plan.gate == "prompt" else None
    plain = _Call(whole, told(0), held=undecided)
    yield plain
    for number, mask in enumerate((*others, whole) if supervised else others, start=1):
        yield replace(plain, mask=mask, supervisors=told(number))
    if supervised:
        yield replace(plain, supervisors=silent)
    if plan.knobs:
        yield from (replace(plain, strength=strength) for strength in (0.0, -1.0, 0.5, 3.0))
    if OFFSET_INPUT in plan.knobs:
        yield from (replace(plain, strength=0.5, offset=offset) for offset in (-1e9, 1e9))
        if supervised:  # an offset beyond all bounds does not open a listening pass
            yield replace(plain, supervisors=silent, offset=-3e38)
    if undecided is not None:
        states = np.array([-1, 0, 1, np.nan, 0.5], np.float32)
        turns = np.arange(KINDS)[:, None] + np.arange(len(plan.layers))
        yield from (replace(plain, held=states[(turns + turned) % len(states)]) for turned in range(3))
    if gated:
        yield from (replace(plain, forced=forced, supervisors=told(0)) for forced in (True, False))


def _prove_part(
    graph: ir.Model, plan: GuardPlan, report: GuardReport, body: str, layers: Sequence[int], found: _Findings
) -> None:
    cut = cut_out(graph, plan, report, body, layers, outputs=bool(plan.added_outputs))
    found.reads += len(cut.inputs)
    found.foreign += cut.foreign
    found.sites += len(cut.sites)
    if cut.foreign or cut.model is None:
        return
    states = _streams(cut, plan)
    for forced in (None, True, False):
        calls = [call for call in _calls(plan, layers) if call.forced is forced]
        if not calls:
            continue
        if forced is not None:
            cut = cut_out(graph, plan, report, body, layers, outputs=bool(plan.added_outputs))
            assert cut.model is not None
            force_gates(cut.model, plan, is_open=forced)
        for optimize in (True, False):  # as apps run it, and exactly as it is written
            try:
                run = _Executor(cut, optimize)
                for call in calls:
                    here = _part_of(states, call.mask)
                    found.see(cut, call, here, run(_feeds(cut, plan, call, here)))
            except (ModelUnreadable, RunFailed) as error:
                found.foreign.append(f"the guard does not run: {error}")
                return
            if run.evaluated:  # there is no optimiser
                found.evaluated = True
                break


_Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


def _evaluator(model: ir.Model) -> _Run:
    from onnx.reference import ReferenceEvaluator

    names = [str(value.name) for value in model.graph.outputs]
    evaluator = ReferenceEvaluator(ir.to_proto(model))

    def run(feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return dict(zip(names, map(np.asarray, evaluator.run(None, dict(feeds))), strict=True))

    return run


class _Executor:
    """The runtime; where it has no bfloat16 arithmetic, ONNX's own evaluator."""

    def __init__(self, cut: Cut, optimize: bool) -> None:
        assert cut.model is not None
        self.evaluated = False
        try:
            self._run: _Run = open_runner(graph_bytes(cut.model), Path.cwd(), optimize=optimize).run
        except ModelUnreadable:
            if all(site.planned.site.dtype != "bfloat16" for site in cut.sites):
                raise
            self.evaluated, self._run = True, _evaluator(cut.model)

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        with np.errstate(all="ignore"):
            return self._run(feeds)


def _streams(cut: Cut, plan: GuardPlan) -> dict[str, np.ndarray]:
    """States for every stream that the cut reads; at a skip-norm the summands of such states."""
    limit, found = TOLERANCE, {}
    for site in cut.sites:
        dtype, layer = site.planned.site.dtype, site.planned.guard
        total = site_states(site.done.layer_index, layer, Aim.of(plan.mode, layer, limit[dtype]), dtype)
        if not site.residual:
            found[site.stream] = total
            continue
        shares = np.random.default_rng([site.done.layer_index, 3]).uniform(0.25, 0.75, total.shape)
        found[site.residual] = (total.astype(np.float64) * shares).astype(total.dtype)
        found[site.stream] = (total.astype(np.float64) - found[site.residual].astype(np.float64)).astype(total.dtype)
        if site.bias:
            random = np.random.default_rng([site.done.layer_index, 5])
            found[site.bias] = random.normal(0, 0.01, plan.width).astype(total.dtype)
    return found


def _part_of(states: Mapping[str, np.ndarray], masked: Masked) -> dict[str, np.ndarray]:
    """The rows and tokens of a call; a bias has neither."""
    return {name: v if v.ndim == 1 else v[: masked.rows, : masked.tokens] for name, v in states.items()}


def _feeds(cut: Cut, plan: GuardPlan, call: _Call, states: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    fed: dict[str, np.ndarray] = {}
    for name, value in cut.inputs.items():
        if name in states:
            fed[name] = states[name]
        elif name in SUPERVISOR_INPUTS:
            fed[name] = np.stack([call.supervisors[number] for number in plan.layers], axis=1)
        elif name == PAST_GATE_INPUT:
            assert call.held is not None
            fed[name] = call.held
        elif name in (STRENGTH_INPUT, OFFSET_INPUT):
            number = call.strength if name == STRENGTH_INPUT else call.offset
            if number is not None:
                fed[name] = np.array(number, np.float32)
        elif cut.calls.mask is not None and name == cut.calls.mask.name:
            fed[name] = call.mask.mask.astype(_numpy(value))
        elif cut.calls.positions is not None and name == cut.calls.positions.name:
            fed[name] = _positions(call.mask).astype(_numpy(value))
        elif cut.calls.cache is not None and name == cut.calls.cache.value.name:
            fed[name] = _empty_cache(cut.calls.cache, value, call.mask)
        else:  # the first residual, of which only the sizes are read
            sizes = call.mask.rows, call.mask.tokens, plan.width
            fed[name] = np.zeros(sizes, NUMPY_DTYPES[cut.sites[0].planned.site.dtype])
    return fed


def _positions(masked: Masked) -> np.ndarray:
    """Position ids of the call's tokens, `[rows, tokens]`, as an app counts them."""
    end = call_end(masked.mask, masked.tokens, masked.past)
    return np.maximum(np.cumsum(masked.mask, axis=1) - 1, 0)[:, end - masked.tokens : end]


def _empty_cache(cache: GrowingCache, value: ir.Value, masked: Masked) -> np.ndarray:
    """A cache of so many tokens, of which only the sizes are read; other sizes that are not known are 1."""
    sizes = [int(size) if isinstance(size, int) else 1 for size in value.shape or ()]
    sizes[0], sizes[cache.axis] = masked.rows, masked.past
    return np.zeros(tuple(sizes), _numpy(value))


def _numpy(value: ir.Value) -> np.dtype:
    assert value.dtype is not None
    return value.dtype.numpy()


@dataclass(frozen=True)
class _Places:
    """Where the tokens of a call are, as a graph with these inputs can know it.

    Attributes:
        last: `[rows, tokens, 1]` of 0 and 1, the last tokens.
        read: `[rows]`, the token that outputs are read at.
        paired: `[rows, 1, 1]` of 0 and 1, the rows that are edited where rows are paired.
    """

    last: np.ndarray
    read: np.ndarray
    paired: np.ndarray

    @classmethod
    def of(cls, cut: Cut, masked: Masked) -> _Places:
        calls = cut.calls
        if calls.mask is None:
            whole = np.ones((masked.rows, masked.tokens), np.int64)
            return cls(last_token(whole), last_index(whole), paired_rows(whole))
        past = masked.past if calls.cache is not None else 0
        positions = _positions(masked) if calls.positions is not None else None
        known = masked.mask, masked.tokens, past
        return cls(last_token(*known, positions), last_index(*known, positions), paired_rows(*known))


@dataclass
class _Findings:
    """What the calls showed, in numbers and places."""

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
    told: int = 0
    told_worst: float = 0.0
    evaluated: bool = False
    wrong: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    mistold: list[str] = field(default_factory=list)

    @property
    def limit(self) -> float:
        return max(TOLERANCE[site.site.dtype] for site in self.plan.sites)

    def see(self, cut: Cut, call: _Call, states: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """One call of one cut."""
        self.calls += 1
        for site in cut.sites:
            with np.errstate(all="ignore"):
                self._see_site(cut, site, call, states, outputs)

    def _see_site(
        self,
        cut: Cut,
        site: CutSite,
        call: _Call,
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
        told = call.supervisors.get(number)
        a = None if told is None else told[:, None].astype(np.float64)
        held = None if call.held is None else call.held[:, row][:, None, None]
        strength = 1.0 if call.strength is None else call.strength
        dials = Dials(strength, 0.0 if call.offset is None else call.offset, held)
        places = _Places.of(cut, call.mask)
        ends = places.last
        selected = ends if self.plan.edits_last else np.ones_like(ends)
        copied = None
        if self.plan.paired:
            a = text_coordinates(layer, total, places.read)
            selected = np.zeros_like(ends) if call.forced is False else ends * places.paired
            copied = total[text_rows(len(total)), places.read[text_rows(len(total))]]
        delta = weights(mode, layer, total, a, dials) @ layer.ssd.astype(np.float64)
        if site.planned.site.dtype == "float16":
            delta = np.clip(delta, -LARGEST_HALF_EDIT, LARGEST_HALF_EDIT)
        delta = np.where(selected > 0, delta, 0.0)
        expected, found = base.astype(np.float64) + delta, outputs[site.guarded].astype(np.float64)
        if found.shape != expected.shape:
            self.wrong.append(f"layer {number}: shape {list(found.shape)}, expected {list(expected.shape)}")
            return
        opened = np.ones(ends.shape) if mode == "project" else gate(mode, layer, total, a, dials)
        opened = np.broadcast_to(opened, ends.shape)[..., 0] * selected[..., 0] > 0
        unsure = self._unsure(mode, layer, total, a, dials, limit, call, held)
        edits = opened & (strength > 0)
        self._compare_bits(number, base.astype(np.float64), found, ~edits & ~(unsure & (selected[..., 0] > 0)))
        sure = ~unsure | (selected[..., 0] == 0)
        self._compare_states(site, number, total, base, expected, found, sure, copied)
        self.opened += int((edits & sure).sum())
        self.closed += int((~opened & (ends if self.plan.paired else selected)[..., 0].astype(bool) & sure).sum())
        self.undecided += int((~sure).sum())
        if self.plan.added_outputs:
            at = np.arange(TOKENS)[None, :] == places.read[:, None]
            self._compare_told(cut, row, layer, total[at], None if a is None else a[:, 0], dials, outputs, unsure[at])

    @staticmethod
    def _unsure(
        mode: str,
        layer: LayerGuard,
        total: np.ndarray,
        a: np.ndarray | None,
        dials: Dials,
        limit: float,
        call: _Call,
        held: np.ndarray | None,
    ) -> np.ndarray:
        """`[KINDS, TOKENS]` bool: scores within rounding of the threshold, where the score decides."""
        if mode == "project" or mode in MODES_TOWARD_TEXT or call.forced is not None:
            return np.zeros(total.shape[:2], bool)
        row = (layer.ssd[0] if mode == "steer" else layer.readout).astype(np.float64)
        rounding = limit * np.linalg.norm(total * row, axis=-1)
        close = np.abs(score(mode, layer, total, a)[..., 0] - layer.threshold - dials.threshold_offset) < rounding
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

    def _compare_told(
        self,
        cut: Cut,
        row: int,
        layer: LayerGuard,
        last: np.ndarray,
        a: np.ndarray | None,
        dials: Dials,
        outputs: Mapping[str, np.ndarray],
        unsure: np.ndarray,
    ) -> None:
        """Coordinates, scores and gates at the last token, `[KINDS, ...]`."""
        mode, number = self.plan.mode, self.plan.layers[row]

        def compare(name: str, off: np.ndarray) -> None:
            worst = float(np.where(np.isnan(off), np.inf, off).max(initial=0.0))
            self.told, self.told_worst = self.told + off.size, max(self.told_worst, worst)
            if worst > self.limit:
                self.mistold.append(f"layer {number}: {name} off by {worst:.1e}")

        at = dials if dials.held is None else replace(dials, held=dials.held[:, 0])
        for name, here in cut.outputs.items():
            found = outputs[here].astype(np.float64)
            if found.shape[1:2] != (len(self.plan.layers),):
                self.mistold.append(f"{name} has shape {list(found.shape)}")
            elif name == COORDINATES_OUTPUT:
                own = last @ layer.ssd.T.astype(np.float64)
                length = np.maximum(np.linalg.norm(last, axis=-1, keepdims=True), 1e-6)
                compare(name, np.abs(found[:, row] - own) / length)
            elif name == SCORES_OUTPUT:
                expected = score(mode, layer, last, a)
                compare(name, np.abs(found[:, row : row + 1] - expected) / summed(mode, layer, last, a))
            else:
                assert name == PRESENT_GATE_OUTPUT, name
                wanted = gate(mode, layer, last, a, at)
                compare(name, np.abs(found[:, row : row + 1] - wanted)[~unsure] * 1e30)

    def checks(self) -> tuple[Check, ...]:
        """The records for the manifest."""
        plan, bodies = self.plan, len(self.plan.bodies)
        planned = len(plan.sites)
        wrong = [*dict.fromkeys(self.foreign)]
        if self.sites != planned:
            wrong.append(f"{self.sites} of {planned} guards were cut out")
        made = [
            exact(READS, self.reads, wrong, f"{self.sites} guards in {bodies} {'bodies' if bodies > 1 else 'body'}")
        ]
        gated = plan.mode != "project"
        note = f"{self.states} states of {self.sites} guards in {self.calls} calls, {self.opened} edited"
        note += f", {self.closed} with a closed gate" if gated else ""
        note += f"; {self.undecided} too close to the threshold to call" if self.undecided else ""
        note += f"; {self.beyond} beyond the dtype's range once edited, not compared" if self.beyond else ""
        note += "; run by ONNX's evaluator, the runtime has no bfloat16 here" if self.evaluated else ""
        wrong = [*dict.fromkeys(self.wrong)]
        ok = not wrong and self.compared > 0 and self.opened > 0 and (self.closed > 0 or not gated)
        ok = ok and self.worst <= self.limit
        said = "; ".join(wrong[:3]) + (" ..." if len(wrong) > 3 else "") if wrong else note
        made.append(Check(STATES, self.compared, self.worst, self.limit, ok, said))
        if gated or plan.edits_last or plan.knobs:  # else nothing is ever closed
            made.append(exact(BITS, self.bits, [*dict.fromkeys(self.changed)], f"{self.calls} calls"))
        if plan.added_outputs:
            wrong = [*dict.fromkeys(self.mistold)]
            ok = self.told > 0 and not wrong
            said = "; ".join(wrong[:3]) or f"{', '.join(plan.added_outputs)} at the last token, {self.calls} calls"
            made.append(Check(TOLD, self.told, self.told_worst, self.limit, ok, said))
        return tuple(made)
