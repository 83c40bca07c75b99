"""Gates that are forced open or closed in memory, by their thresholds, for the proofs that run a guard."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...graphs.node_builder import PREFIX
from ...graphs.pairs import STEP_TOKENS
from ...graphs.plan import GuardPlan
from ...graphs.reference import SUPERVISED_ABOVE

# A threshold that no score passes, and one that all do; finite, so that nothing becomes NaN.
NEVER, ALWAYS = 3.0e38, -3.0e38


def forced_threshold(plan: GuardPlan, is_open: bool) -> float:
    """What every gate compares with; where some calls have no supervisor, those stay closed, as nothing is there to copy."""
    if not is_open:
        return NEVER
    return SUPERVISED_ABOVE if plan.edits_prompt_end else ALWAYS


def force_gates(model: ir.Model, plan: GuardPlan, is_open: bool) -> None:
    """Set a guarded graph's gates open or closed for good; `project` has no gate, so closed means zero strength. Paired rows
    have none either: closed means that no call is long enough to be a prompt."""
    for name, value in model.graph.initializers.items():
        part = name.rpartition("/")[2]
        if plan.paired and part == STEP_TOKENS and not is_open and value.const_value is not None:
            _replace(value, np.array(np.iinfo(np.int64).max))
        if not name.startswith(f"{PREFIX}layer_") or value.const_value is None:
            continue
        array = value.const_value.numpy()
        if part == "tau":
            _replace(value, np.full_like(array, forced_threshold(plan, is_open)))
        elif plan.mode == "project" and not is_open and part.startswith(("ssd", "projection_minus_identity")):
            _replace(value, np.zeros_like(array))
        elif plan.mode == "project" and not is_open and part == "projection":
            _replace(value, np.eye(array.shape[0]).astype(array.dtype))


def _replace(value: ir.Value, array: np.ndarray) -> None:
    value.const_value = ir.Tensor(array, name=value.name)
