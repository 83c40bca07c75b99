"""The matrix: what is asked of every graph of the zoo, whoever exported it. `test_matrix.py` runs it.

    graph          states      hidden states of every layer equal torch's
    graph x case   prefill     guarded logits equal torch's with hooks
                   decode      the same, one token at a time on the KV cache
                   reference   the graph's guarded states equal the numpy reference on the graph's own unguarded ones
                   closed      with the gate closed, every output equals the unguarded graph's bit for bit
    graph x layer  export      `vlmguard.export` with its own proof

A case is a layer (the middle one, the last one), a mode (one without a gate, one with) and the positions. Everything is
asked through `ZooModel`'s feeds, so a graph with inputs of its own needs no code here.

Torch sees prompt and new tokens as ONE sequence without a cache, so a graph that fills or reads its cache wrongly cannot
agree. Float16 graphs are compared with torch in float32 on the same half-rounded weights: half precision on a CPU rounds
after each operation, which makes it a second approximation and not a reference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from random_directions import random_layer, write_directions
from zoo.cases import Case
from zoo.model import TOLERANCES, ZooModel

from vlmguard.exporter.export_result import ExportResult
from vlmguard.exporter.pipeline import export
from vlmguard.exporter.proof.forced import force_gates
from vlmguard.exporter.proof.limits import TOLERANCE
from vlmguard.graphs import reference
from vlmguard.graphs.anatomy import DecoderAnatomy, dissect
from vlmguard.graphs.directions import Directions
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.graph_io import graph_bytes
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.plan import GuardPlan
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.proof.structure import Check
from vlmguard.graphs.reference import last_token
from vlmguard.graphs.rewrite import GuardReport, rewrite
from vlmguard.graphs.spec import GuardSpec
from vlmguard.graphs.taps import STATES_OUTPUT, tap_guard, tap_last_token
from vlmguard.runtime.runners import open_runner

Arrays = dict[str, np.ndarray]
Execute = Callable[[Arrays], Arrays]

STEPS = 3
RANK = 2
# Relative to the largest number compared.
LIMITS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
# No score may come nearer to its threshold than this, or rounding would decide on which side of the gate it is.
MARGINS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
# How much farther from torch than the unguarded graph a guarded one may be, where that is more than the limit: one float16
# graph (Qwen3.5's linear attention) is 1e-2 from torch by itself.
OWN_NOISE = 1.5
# What a guard changes, and how far a layer is from the next one, in limits: else agreement would mean nothing.
TELLING = 4


@dataclass(frozen=True)
class Call:
    """One run of a decoder: a prompt, or one more token per row."""

    feeds: Arrays
    outputs: Arrays


class Subject:
    """A graph of the zoo, and what the cases of one graph share."""

    def __init__(self, model: ZooModel) -> None:
        self.model = model
        self.package = open_package(model.path)

    @property
    def quantized(self) -> bool:
        """Whether weights or activations are rounded to a few bits, so that torch is only near."""
        return not self.model.has_torch or self.model.tolerance > TOLERANCES["fp16"]

    @property
    def truth(self) -> str:
        return "reference" if self.quantized else "torch"

    @property
    def cached(self) -> bool:
        return bool(self.model.cache)

    @property
    def logits(self) -> str:
        """Name of the output with the logits."""
        outputs = list(self.unguarded[0][0].outputs)
        return "logits" if "logits" in outputs else outputs[0]

    @property
    def limit(self) -> float:
        return max(LIMITS[self.model.dtype], LIMITS[self.model.stream_dtype])

    @property
    def margin(self) -> float:
        return max(MARGINS[self.model.dtype], MARGINS[self.model.stream_dtype])

    @cached_property
    def weights(self) -> str:
        """How the matrices are stored, from the operators that read them."""
        nodes = list(self.load().graph.all_nodes())
        kinds = {node.op_type for node in nodes}
        found = {
            f"int{node.attributes['bits'].as_int()} MatMulNBits" for node in nodes if node.op_type == "MatMulNBits"
        }
        if kinds & {"MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}:
            found.add("int8 dynamic")
        if "DequantizeLinear" in kinds:
            stored = {
                node.inputs[0].dtype.name.lower()
                for node in nodes
                if node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].is_initializer()
            }
            found.add(f"{'/'.join(sorted(stored))} {'QDQ' if 'QuantizeLinear' in kinds else 'DequantizeLinear'}")
        return ", ".join(sorted(found)) or self.model.dtype

    @cached_property
    def anatomy(self) -> DecoderAnatomy:
        return dissect(self.load(), self.model.layers)

    def load(self) -> ir.Model:
        return self.package.load_decoder()

    def open(self, graph: ir.Model | None = None, optimize: bool = True) -> Execute:
        """The package's decoder, or another graph in its place."""
        content = self.package.decoder if graph is None else graph_bytes(graph)
        return open_runner(content, self.package.decoder.parent, optimize=optimize).run

    @cached_property
    def prompts(self) -> list[tuple[Arrays, int]]:
        """Feeds of padded prefills, and how many steps follow. Rows of GroupQueryAttention are padded on the right, and
        torch has no truth for a step behind padding: there the steps follow an unpadded prompt."""
        steps = STEPS if self.cached else 0
        padded = self.model.make_feeds(3, 7, 2)
        if self.model.padding == "left":
            return [(padded, steps)]
        return [(padded, 0), (self.model.make_feeds(3, 6), steps)]

    def roll(self, execute: Execute) -> list[list[Call]]:
        """Every prompt with the steps after it, on the graph's own cache. The tokens are the same for every graph."""
        rolled = []
        for feeds, steps in self.prompts:
            calls = [Call(feeds, execute(feeds))]
            for _ in range(steps):
                following = self.model.next_feeds(calls[-1].feeds, calls[-1].outputs)
                calls.append(Call(following, execute(following)))
            rolled.append(calls)
        return rolled

    @cached_property
    def unguarded(self) -> list[list[Call]]:
        return self.roll(self.open())

    @cached_property
    def unguarded_plainly(self) -> list[list[Call]]:
        """Without the runtime's optimiser."""
        return self.roll(self.open(optimize=False))

    # Torch

    @cached_property
    def reference_model(self) -> ZooModel:
        """Torch's side in float32."""
        pair = copy.deepcopy((self.model.torch_model, self.model.torch_decoder))  # the decoder is a part of the model
        return replace(self.model, torch_model=pair[0].float(), torch_decoder=pair[1])

    @cached_property
    def whole_feeds(self) -> list[Arrays]:
        """For torch: every prompt and its steps as one sequence on an empty cache."""
        return [self._joined([call.feeds for call in calls]) for calls in self.unguarded]

    def _joined(self, feeds: Sequence[Arrays]) -> Arrays:
        whole = {}
        for name, first in feeds[0].items():
            if name == "attention_mask":
                array = feeds[-1][name]
            elif name in self.model.cache or first.ndim < 2 or all(np.array_equal(first, one[name]) for one in feeds):
                array = first  # the empty cache, a switch, or what no step changes
            else:  # of every token: [batch, tokens, ...], or positions of several axes [axes, batch, tokens]
                array = np.concatenate([one[name] for one in feeds], axis=-1 if name == "position_ids" else 1)
            whole[name] = array.astype(np.float32) if array.dtype == np.float16 else array
        return whole

    @cached_property
    def torch_states(self) -> list[np.ndarray]:
        """Per prompt, the unguarded states `[layers, batch, tokens, width]`."""
        return [np.stack(self.reference_model.hidden_states(feeds)) for feeds in self.whole_feeds]

    @cached_property
    def torch_logits(self) -> list[np.ndarray]:
        return [self.reference_model.logits(feeds) for feeds in self.whole_feeds]

    def torch_guarded(self, plan: GuardPlan) -> list[np.ndarray]:
        """Per prompt, the logits `[batch, tokens, vocabulary]` of torch with hooks at what the graph would edit."""
        from zoo.hooks import SelectedGuard

        guards = dict(zip(plan.layers, plan.guards, strict=True))
        found = []
        for feeds, calls in zip(self.whole_feeds, self.unguarded, strict=True):
            selected = np.concatenate([self.selected(call, plan.positions) for call in calls], axis=1)
            with SelectedGuard(guards, plan.mode, selected[..., 0] == 1).attached(
                self.reference_model.torch_decoder.layers
            ):
                found.append(self.reference_model.logits(feeds))
        return found

    def counted(self, call: Call) -> np.ndarray:
        """`[batch, sequence]` bool: the tokens of a call that are none of padding."""
        return self.model.counted(call.feeds)

    def selected(self, call: Call, positions: str) -> np.ndarray:
        """`[batch, sequence, 1]` of 0 and 1: the tokens of a call that a guard edits."""
        counted = self.counted(call)
        return last_token(counted) if positions == "last" else np.ones((*counted.shape, 1), np.float32)

    # The guard

    def guarded(self, case: Case) -> Guarded:
        layer = case.layer(self.anatomy.layer_count)
        directions = random_layer(layer, self.anatomy.width, RANK)
        if case.mode == "restore":
            directions = replace(directions, threshold=self._threshold(layer, case, directions.readout))
        found = Directions(self.anatomy.width, {layer: directions})
        return self.guard(found, GuardSpec(case.mode, positions=case.positions))

    def guard(self, directions: Directions, spec: GuardSpec) -> Guarded:
        """A fresh copy of the graph with this guard."""
        graph = self.load()
        plan = plan_guard(graph, dissect(graph, self.model.layers), directions, spec)
        return Guarded(graph, plan, rewrite(graph, plan), directions, spec)

    def own_states(self, layer: int) -> list[list[np.ndarray]]:
        """The graph's states of a layer, `[batch, sequence, d]` of every call: what a guard there will read.

        With one guarded layer and fixed tokens the guard has no say in them: they are those of the unguarded model.
        """
        if layer not in self._own_states:
            directions = Directions(self.anatomy.width, {layer: random_layer(layer, self.anatomy.width, RANK)})
            calls, ((raw, _),) = self._tapped(self.guard(directions, GuardSpec("project", positions="all")))
            self._own_states[layer] = [[call.outputs[raw] for call in rolled] for rolled in calls]
        return self._own_states[layer]

    @cached_property
    def _own_states(self) -> dict[int, list[list[np.ndarray]]]:
        return {}

    def _tapped(self, guarded: Guarded) -> tuple[list[list[Call]], list[tuple[str, str]]]:
        graph = guarded.graph.clone()
        names = tap_guard(graph, guarded.plan, guarded.report)
        return self.roll(self.open(graph)), names

    def _threshold(self, layer: int, case: Case, readout: np.ndarray) -> float:
        """In the widest gap of the scores that lies between the rows of the first prompt: one row opens, one does not."""
        scores, later, ends = [], [], None
        for calls, states in zip(self.unguarded, self.own_states(layer), strict=True):
            for number, (call, state) in enumerate(zip(calls, states, strict=True)):
                score = state.astype(np.float64) @ readout
                if ends is None:
                    ends = score[last_token(self.counted(call))[..., 0] == 1]
                scores.append(score[(self.selected(call, case.positions)[..., 0] == 1) & self.counted(call)])
                later += [scores[-1]] * (number > 0)
        assert ends is not None
        ordered = np.unique(np.concatenate(scores))
        low, high = ordered[:-1], ordered[1:]
        between = (low >= ends.min()) & (high <= ends.max())
        at_a_step = between & (high <= np.concatenate(later).max()) if later else between
        between = at_a_step if at_a_step.any() else between  # so that a step opens the gate too
        middle = slice(len(low) // 4, len(low) - len(low) // 4)  # there, so that many tokens are on either side
        central = np.zeros_like(between)
        central[middle] = between[middle]
        widest = int(np.argmax(np.where(central if central.any() else between, high - low, 0)))
        if high[widest] - low[widest] <= 2 * self.margin:
            raise AssertionError(
                f"{self.model.name}: the rows' scores are too near to each other; take other directions"
            )
        return float(np.float32((low[widest] + high[widest]) / 2))

    # The checks

    def check_states(self) -> Check:
        """Every layer at the last token of each call, prompt and steps, against torch's hooked layers."""
        graph = self.load()
        anatomy = dissect(graph, self.model.layers)
        tap_last_token(graph, anatomy.sites)
        compared, worst, neighbour = 0, 0.0, np.inf
        for calls, states in zip(self.roll(self.open(graph)), self.torch_states, strict=True):
            start = 0
            for call in calls:
                chosen = last_token(self.counted(call))[..., 0] == 1
                here = states[:, :, start : start + chosen.shape[1]]
                start += chosen.shape[1]
                expected, found = here[:, chosen], call.outputs[STATES_OUTPUT].swapaxes(0, 1)
                if expected.shape != found.shape:
                    return _failed("states", f"the graph gives {found.shape}, torch {expected.shape}")
                compared += found.size
                for layer, (one, other) in enumerate(zip(expected, found, strict=True)):
                    worst = max(worst, relative(one, other))
                    if layer:
                        neighbour = min(neighbour, relative(expected[layer - 1], other))
        note = f"the nearest other layer is {neighbour:.1e} away"
        ok = compared > 0 and worst <= self.limit and neighbour > TELLING * self.limit
        return Check("states", compared, worst, self.limit, ok, note)

    @cached_property
    def own_noise(self) -> float:
        """How far the UNGUARDED graph's logits are from torch's: what its exporter and float16 do without any guard."""
        worst = 0.0
        for calls, unhooked in zip(self.unguarded, self.torch_logits, strict=True):
            start = 0
            for call in calls:
                real, here = self.counted(call), slice(start, start + self.counted(call).shape[1])
                start += real.shape[1]
                found = call.outputs[self.logits].astype(np.float32)
                worst = max(worst, relative(unhooked[:, here][real], found[real]))
        return worst

    def check_logits(self, guarded: Guarded) -> list[Check]:
        """The guarded graph as it ships, against torch with hooks: prompts, then steps."""
        limit = max(self.limit, OWN_NOISE * self.own_noise)
        rolled = self.roll(self.open(guarded.graph))
        expected = self.torch_guarded(guarded.plan)
        parts: dict[str, list[float]] = {"prefill": [], "decode": []}
        compared, changed = {"prefill": 0, "decode": 0}, {"prefill": 0.0, "decode": 0.0}
        for calls, hooked, unhooked in zip(rolled, expected, self.torch_logits, strict=True):
            start = 0
            for number, call in enumerate(calls):
                part, real = "decode" if number else "prefill", self.counted(call)
                found, here = call.outputs[self.logits].astype(np.float32), slice(start, start + real.shape[1])
                start += real.shape[1]
                if found.shape != hooked[:, here].shape:
                    return [_failed(part, f"the graph gives {found.shape}, torch {hooked[:, here].shape}")]
                parts[part].append(relative(hooked[:, here][real], found[real]))
                compared[part] += found[real].size
                changed[part] = max(changed[part], relative(unhooked[:, here][real], hooked[:, here][real]))
        return [
            Check(
                part,
                compared[part],
                max(found),
                limit,
                max(found) <= limit and changed[part] > max(limit, TELLING * max(found)) and compared[part] > 0,
                f"the guard changes the logits by {changed[part]:.1e}",
            )
            for part, found in parts.items()
            if found
        ]

    def check_reference(self, guarded: Guarded) -> Check:
        """The graph's states behind the guard, against the numpy reference on those before it."""
        rolled, names = self._tapped(guarded)
        (layer,), ((raw_name, guarded_name),) = guarded.plan.guards, names
        limit = TOLERANCE[guarded.plan.sites[0].site.dtype]
        compared, worst, rows, wrong = 0, 0.0, [0, 0], []
        for calls in rolled:
            for number, call in enumerate(calls):
                real, selected = self.counted(call), self.selected(call, guarded.plan.positions)
                raw = call.outputs[raw_name].astype(np.float64)
                expected = reference.guard(guarded.plan.mode, layer, raw, selected=selected)
                worst = max(worst, relative(expected[real], call.outputs[guarded_name].astype(np.float64)[real]))
                compared += int(real.sum()) * raw.shape[-1]
                ends = last_token(real)[..., 0] == 1
                edited = (expected != raw).any(axis=-1)[ends]
                rows[0] += int(edited.sum())
                rows[1] += edited.size
                if (
                    guarded.plan.mode == "restore"
                    and calls is rolled[0]
                    and number == 0
                    and edited.all() == edited.any()
                ):
                    wrong.append("the rows of the first prompt are all on one side of the gate")
        if not rows[0]:
            wrong.append("no row was edited")
        note = "; ".join(wrong) or f"{rows[0]} of {rows[1]} last tokens edited"
        return Check("reference", compared, worst, limit, compared > 0 and worst <= limit and not wrong, note)

    def check_closed(self, guarded: Guarded) -> Check:
        """Every output of every call, bit for bit; where the runtime's own rounding moves, exact without its optimiser.

        That exception, and its bound, is what the product's own proof allows (`vlmguard.exporter.proof.prove`).
        """
        closed = guarded.graph.clone()
        force_gates(closed, guarded.plan, guarded.report, is_open=False)
        compared, differing, worst = _bitwise(self.unguarded, self.roll(self.open(closed)))
        if not differing:
            return Check("closed", compared, 0.0, 0.0, compared > 0, "")
        _, plainly, _ = _bitwise(self.unguarded_plainly, self.roll(self.open(closed, optimize=False)))
        limit = TOLERANCE[guarded.plan.sites[0].site.dtype]
        note = f"{differing} of {compared} numbers differ by onnxruntime's own rounding; exact without its optimiser"
        if plainly:
            note = f"{differing} of {compared} numbers differ, {plainly} even without onnxruntime's optimiser"
        return Check("closed", compared, worst, limit, not plainly and worst <= limit, note)

    def check_export(self, guarded: Guarded, scratch: Path) -> Check:
        """What a user does: `vlmguard.export`, whose proof runs on the staged file."""
        path = write_directions(scratch / "given.safetensors", guarded.directions)
        try:
            result = self._exported(guarded, path, scratch)
        except GuardError as refusal:
            return _failed("export", str(refusal))
        compared = sum(check.compared for check in result.proof)
        ok = result.written and compared > 0 and all(check.ok and check.compared for check in result.proof)
        worst = max(check.worst / check.limit for check in result.proof if check.limit)
        return Check("export", compared, worst, 1.0, ok, f"{len(result.proof)} checks of its own proof")

    def _exported(self, guarded: Guarded, directions: Path, scratch: Path) -> ExportResult:
        """On prompts, or where the decoder wants more than those: on inputs by name, as its refusal says.

        The directions are random: whether a gate opens for the built-in prompts is not what is asked here.
        """
        wish: dict[str, Any] = {"spec": guarded.spec, "directions": directions, "allow_no_effect": True}
        try:
            return export(self.model.path, scratch / "guarded", **wish)
        except GuardError as refusal:
            if "--proof-inputs" not in str(refusal):
                raise
        given = scratch / "given.npz"
        np.savez(given, **self.model.make_feeds(batch=2, sequence=7, pad=2))
        return export(self.model.path, scratch / "guarded", **wish, proof_inputs=[given])


@dataclass(frozen=True)
class Guarded:
    """A guarded graph, in memory."""

    graph: ir.Model
    plan: GuardPlan
    report: GuardReport
    directions: Directions
    spec: GuardSpec


def relative(expected: np.ndarray, found: np.ndarray) -> float:
    """Largest difference, relative to the largest number expected; infinite where something is not finite."""
    if not (np.isfinite(expected).all() and np.isfinite(found).all()):
        return float("inf")
    scale = max(float(np.abs(expected).max()), 1e-6)
    return float(np.abs(expected.astype(np.float64) - found.astype(np.float64)).max()) / scale


def _bitwise(expected: list[list[Call]], found: list[list[Call]]) -> tuple[int, int, float]:
    """Numbers compared, numbers that differ, and the largest relative difference of an output."""
    compared, differing, worst = 0, 0, 0.0
    for one, other in zip(expected, found, strict=True):
        for before, after in zip(one, other, strict=True):
            for name, value in before.outputs.items():
                seen = after.outputs[name]
                different = int((value != seen).sum()) - int((np.isnan(value) & np.isnan(seen)).sum())
                compared, differing = compared + value.size, differing + different
                if different:
                    worst = max(worst, relative(value, seen))
    return compared, differing, worst


def _failed(name: str, note: str) -> Check:
    return Check(name, 0, float("inf"), 0.0, False, note)
