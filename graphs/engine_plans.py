"""The guard of the graphs that TensorRT builds engines from: the same edits, with no kernel of their own in a layer.

One engine is for prompts, one for decode steps. Both take fewer calls than the guarded decoder, which any runtime may run.

A prompt's mask has a column for each token so far and no more: the last token is found in the kernel of the causal mask
(`whole_mask`). Numbers of the guard that belong to a token are laid out as the stream is (`token_layout`).

A decode step has one token: positions `last` and `all` are the same edit, and the selection can be left out. Each text-only
coordinate is an input of its own, so that no node slices it, and the graph's own coordinates, which only a text-only pass
needs, are not output.
"""

from __future__ import annotations

from dataclasses import replace

from .lowerings.table import lowering_named
from .plan import GuardPlan


def prompt_plan(plan: GuardPlan) -> GuardPlan | None:
    """The plan of the same guard for masks of past + sequence columns; `None` where the guarded decoder serves as well.

    Guards that read paired rows keep their graph: what an edit reads lies in another row, which is a kernel of its own in any
    spelling.
    """
    if lowering_named(plan.lowering) is None or plan.paired or not (plan.edits_last or plan.added_outputs):
        return None
    return replace(plan, calls="whole")


def decode_step_plan(plan: GuardPlan) -> GuardPlan | None:
    """The plan of the same guard for calls of one token; `None` where the guard is the same in both.

    Guards that edit the end of the prompt alone keep their graph: what they do in a decode step is decided by the selection.
    """
    lowering = lowering_named(plan.lowering)
    if lowering is None or plan.edits_prompt_end:
        return None
    as_numbers = plan.takes_supervisor and lowering.takes_numbers
    if not plan.edits_last and not as_numbers:
        return None
    # Without a mask, each row's last token is at the last index of the call, here the only one.
    return replace(plan, positions="all", mask="", supervisor="numbers" if as_numbers else plan.supervisor)
