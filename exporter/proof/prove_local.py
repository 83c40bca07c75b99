"""The proof of each guard on its own: its nodes, cut out of the staged file, run against the numpy reference.

No weights of the decoder are loaded, so it takes seconds and megabytes at any model size. Together with the proof of the
structure (every path through the decoder passes these nodes, and nothing else changed) it shows what the guard computes in the
model. It does not run the decoder around it; `prove` does.

1. Each guard reads only its own stream, the inputs that mark the last token, and the guard's own inputs.
2. Guarded states equal the numpy reference: states from zero to the dtype's limit, outlier channels, scores just above
   and below the threshold; masks whole, padded, static and behind a past; all supervisors, knobs and held gates; paired
   rows also in a decode step, with an odd number of rows, and where a row has no token in the call.
3. A closed gate, strength 0 or less, a pass without a supervisor, and every token outside the positions return the stream's
bits.
4. Coordinates, scores and gates that the guard outputs equal the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...graphs.errors import ModelUnreadable, RunFailed
from ...graphs.graph_io import graph_bytes, load_graph
from ...graphs.plan import GuardPlan
from ...graphs.proof.cut_out import Cut, cut_out
from ...graphs.proof.structure import Check
from ...graphs.rewrite import GuardReport
from ...runtime.runners import open_runner
from .forced import force_gates
from .local_calls import call_feeds, call_part, guard_streams, local_calls
from .local_findings import LocalFindings

# Numbers of guards in one session; more sites than that are cut out in several parts.
_MOST_NUMBERS = 32 << 20


def prove_locally(staged: Path, plan: GuardPlan, report: GuardReport) -> tuple[Check, ...]:
    """All checks of the guards of a staged decoder, each body of it.

    Args:
        staged: the guarded decoder's file, as it will ship.
        plan, report: what was planned and done; a lowering that writes nodes.
    """
    return prove_graph_locally(load_graph(staged, trust_links=True), plan, report)


def prove_graph_locally(graph: ir.Model, plan: GuardPlan, report: GuardReport) -> tuple[Check, ...]:
    """`prove_locally` of a graph in memory, which is not changed."""
    found = LocalFindings(plan)
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


def _prove_part(
    graph: ir.Model, plan: GuardPlan, report: GuardReport, body: str, layers: Sequence[int], found: LocalFindings
) -> None:
    cut = cut_out(graph, plan, report, body, layers, outputs=bool(plan.added_outputs))
    found.reads += len(cut.inputs)
    found.foreign += cut.foreign
    found.sites += len(cut.sites)
    if cut.foreign or cut.model is None:
        return
    states = guard_streams(cut, plan)
    for forced in (None, True, False):
        calls = [call for call in local_calls(plan, layers) if call.forced is forced]
        if not calls:
            continue
        if forced is not None:
            cut = cut_out(graph, plan, report, body, layers, outputs=bool(plan.added_outputs))
            assert cut.model is not None
            force_gates(cut.model, plan, report, is_open=forced)
        for optimize in (True, False):  # as apps run it, and exactly as it is written
            try:
                run = _CutRunner(cut, optimize)
                for call in calls:
                    here = call_part(states, call.mask)
                    found.see(cut, call, here, run(call_feeds(cut, plan, call, here)))
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


class _CutRunner:
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
