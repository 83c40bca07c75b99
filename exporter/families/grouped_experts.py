"""Experts that a model runs in a loop over those that tokens chose, which no tracer follows, by transformers' grouped form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

# What the grouped form asks a module for, with the values of the plain kind: a gate, no bias, weights [experts, out, in].
_PLAIN = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
    "_is_expert_parallel": False,
}


@contextmanager
def experts_in_groups(model: Any) -> Iterator[None]:
    """Within, experts with a loop of their own are computed in groups; those that transformers can switch are left alone."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    with ExitStack() as stack:
        for part in model.modules():
            if not has_own_loop(part):
                continue
            for name, value in _PLAIN.items():
                stack.enter_context(mock.patch.object(part, name, value, create=True))
            stack.enter_context(mock.patch.object(part, "forward", partial(grouped_mm_experts_forward, part)))
        yield


def has_own_loop(part: Any) -> bool:
    """Whether a module holds the weights of plain gated experts, `[experts, out, in]`, and is none that can be switched."""
    shapes = [getattr(part, name, None) for name in ("gate_up_proj", "down_proj")]
    plain = all(getattr(weight, "ndim", 0) == 3 for weight in shapes) and hasattr(part, "_apply_gate")
    return plain and hasattr(part, "num_experts") and not hasattr(part, "has_gate")
