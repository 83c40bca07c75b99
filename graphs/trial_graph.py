"""The guard's numbers as overridable initializers: one graph in which every candidate of a calibration can be tried.

An ONNX initializer that is also an input of the graph has a default that a caller may replace in each call. The defaults
here are neutral: they read nothing, write nothing, and close every gate. A caller feeds the numbers that the lowering would
have written, in its units and dtype, so a trial computes what the exported guard computes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from .dtypes import IR_DTYPES
from .lowerings.table import lowering_named
from .lowerings.task import Task
from .modes import guard_mode
from .node_builder import NodeBuilder
from .plan import GuardPlan, SitePlan
from .reference import LayerGuard
from .spec import LARGEST_TAU


def neutral(plan: GuardPlan) -> GuardPlan:
    """The same sites with a guard that does nothing, in any mode."""
    return replace(plan, sites=tuple(replace(site, guard=_neutral(site.guard)) for site in plan.sites))


def widened(guard: LayerGuard, rank: int) -> LayerGuard:
    """The same guard written with more rows: zeros, which read 0 and write 0."""
    more = rank - guard.rank
    assert more >= 0, "a graph for rank m takes guards of rank m and less"
    origin, target = (np.pad(levels, (0, more)) for levels in (guard.origin, guard.target))
    return replace(guard, ssd=np.pad(guard.ssd, ((0, more), (0, 0))), origin=origin, target=target)


def guard_numbers(plan: GuardPlan) -> dict[str, np.ndarray]:
    """Name of each initializer that `rewrite` gives the planned sites -> its array, as the lowering writes it."""
    lowering = lowering_named(plan.lowering)
    assert lowering is not None, plan.lowering
    found: dict[str, np.ndarray] = {}
    for planned in plan.sites:
        # The lowering writes into a temporary graph: only its numbers are used, not its arithmetic.
        scratch = ir.Graph([], [], nodes=[], opset_imports={"": 18})
        builder = NodeBuilder(scratch, f"layer_{planned.layer_index}")
        lowering.correction(builder, ir.Value(name="h"), _task(plan, planned))
        for name in builder.numbers:
            tensor = scratch.initializers[name].const_value
            assert tensor is not None
            found[name] = tensor.numpy()
    return found


def make_overridable(model: ir.Model, names: list[str]) -> None:
    """These initializers become inputs too; what they hold is then their default."""
    for name in names:
        model.graph.inputs.append(model.graph.initializers[name])


def _neutral(guard: LayerGuard) -> LayerGuard:
    zeros = np.zeros(guard.rank, np.float32)
    return LayerGuard(np.zeros_like(guard.ssd), zeros, zeros, np.zeros_like(guard.readout), LARGEST_TAU, 1.0)


def _task(plan: GuardPlan, planned: SitePlan) -> Task:
    dtype = planned.site.dtype
    given = ir.Value(name="supervisor", type=ir.TensorType(IR_DTYPES["float32"]))
    return Task(
        plan.mode,
        planned.guard,
        dtype,
        given if guard_mode(plan.mode).supervisor else None,
        ir.Value(name="selected"),
        outputs_coordinates=plan.takes_supervisor,
    )
