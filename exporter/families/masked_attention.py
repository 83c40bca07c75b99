"""Attention of a vision encoder under a mask, in place of one call for each segment of patches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    import torch


@contextmanager
def attention_within(mask: torch.Tensor) -> Iterator[None]:
    """Within, scaled dot product attention takes this mask, `[patches, patches]` bool, in place of its own."""
    import torch

    within = partial(torch.nn.functional.scaled_dot_product_attention, attn_mask=mask)

    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, **more: Any) -> Any:
        return within(query, key, value, **more)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attend):
        yield
