"""The hook twin on a whole sequence at once: the positions that a guarded graph edits call by call, named beforehand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch_hooks import HookedGuard, LayerNumbers


class SelectedGuard(HookedGuard):
    """`HookedGuard` at given tokens.

    A causal model's state at a token does not depend on what follows, so a prompt and the tokens after it may be run as one
    sequence, with the last token of the prompt and each new one edited, instead of call by call on a cache.

    Args:
        selected: `[batch, tokens]` bool.
    """

    def __init__(self, layers: Mapping[int, LayerNumbers], mode: str, selected: np.ndarray) -> None:
        super().__init__(layers, mode, positions="all")
        self.selected = torch.from_numpy(selected)

    def _guarded(self, number: int, h: torch.Tensor) -> torch.Tensor:
        assert h.shape[:2] == self.selected.shape, (h.shape, self.selected.shape)
        return torch.where(self.selected[..., None], super()._guarded(number, h), h)
