"""Gates that are forced open or closed in memory, by their thresholds, for the proofs that run a guard."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ...graphs.modes import guard_mode
from ...graphs.plan import GuardPlan
from ...graphs.reference import SUPERVISED_ABOVE
from ...graphs.rewrite import GuardReport

# A threshold that no score passes, and one that all do; finite, so that nothing becomes NaN.
NEVER, ALWAYS = 3.0e38, -3.0e38


def forced_threshold(plan: GuardPlan, is_open: bool) -> float:
    """What every gate compares with; where some calls have no supervisor, those stay closed, as nothing is there to copy."""
    if not is_open:
        return NEVER
    return SUPERVISED_ABOVE if plan.edits_prompt_end else ALWAYS


def force_gates(model: ir.Model, plan: GuardPlan, report: GuardReport, is_open: bool) -> None:
    """Set the gates of a guarded graph, or of a part cut out of it, open or closed for good.

    A mode without a gate is closed by numbers that edit nothing; paired rows are closed where no call is long enough to be a
    prompt's.

    Args:
        model: the graph; changed in place.
        plan, report: of the guard.
        is_open: how the gates shall be.
    """
    if plan.paired and not is_open:
        _replace(model, report.step_tokens, lambda array: np.full_like(array, np.iinfo(np.int64).max))
    has_gate = guard_mode(plan.mode).gate is not None
    for handles in (site.handles for site in report.sites):
        _replace(model, handles.threshold, lambda array: np.full_like(array, forced_threshold(plan, is_open)))
        if not has_gate and not is_open:
            _replace(model, handles.matrix, lambda array: np.eye(len(array), dtype=array.dtype))
            for name in handles.weights:
                _replace(model, name, np.zeros_like)


def _replace(model: ir.Model, name: str, numbers: Callable[[np.ndarray], np.ndarray]) -> None:
    """Other numbers for an initializer; one that is not in the graph is left alone."""
    value = model.graph.initializers.get(name)
    if value is not None and value.const_value is not None:
        value.const_value = ir.Tensor(numbers(value.const_value.numpy()), name=name)
