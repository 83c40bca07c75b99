"""The guard of a graph that is called with one token per row: the same edits with less to compute.

A call of one token has one place to edit, so positions `last` and `all` are the same edit and the selection can be left out.
TensorRT then fuses the guard into the kernels that are there anyway (docs/tensorrt.md). With a supervisor, each text-only
coordinate is an input of its own, so that no node slices it, and the graph's own coordinates, which only a text-only pass
needs, are not output.
"""

from __future__ import annotations

from dataclasses import replace

from .lowerings.table import LOWERINGS
from .plan import GuardPlan


def decode_step_plan(plan: GuardPlan) -> GuardPlan | None:
    """The plan of the same guard for calls of one token; `None` where the guard is the same in both.

    Guards that edit the end of the prompt alone keep their graph: what they do in a decode step is decided by the selection.
    """
    lowering = next((lowering for lowering in LOWERINGS if lowering.name == plan.lowering), None)
    if lowering is None or plan.edits_prompt_end:
        return None
    as_numbers = plan.takes_supervisor and lowering.takes_numbers
    if not plan.edits_last and not as_numbers:
        return None
    # Without a mask, each row's last token is at the last index of the call, here the only one.
    return replace(plan, positions="all", mask="", supervisor="numbers" if as_numbers else plan.supervisor)
