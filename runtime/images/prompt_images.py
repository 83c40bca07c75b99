"""Inputs of a prompt that depend on images besides its embeddings: positions, features between layers, attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class PromptImages:
    """For one batch of prompts; tokens that are generated after them are text.

    Attributes:
        positions: of the prompts' tokens, `[axes, batch, sequence]` int64 with 0 for padding (`positions_mrope`,
            `positions_by_image`); `None` where positions count tokens, whatever they are.
        injected: by the decoder's input (`deepstack`), `[batch, sequence, d]` each.
        at: where image tokens are, `[batch, sequence]` bool; `None` is nowhere.
    """

    positions: np.ndarray | None = None
    injected: Mapping[str, np.ndarray] = field(default_factory=dict)
    at: np.ndarray | None = None

    def positions_between(self, first: int, last: int) -> np.ndarray | None:
        """Positions `[axes, batch, last - first]` of tokens `first` to `last`; after the prompt they increase by one."""
        if self.positions is None:
            return None
        length = self.positions.shape[-1]
        largest = self.positions.max(axis=(0, 2))[:, None]  # [batch, 1]
        after = largest + 1 + np.arange(max(last - length, 0))
        return np.concatenate([self.positions, np.broadcast_to(after, (len(self.positions), *after.shape))], axis=-1)[
            ..., first:last
        ]

    def injected_between(self, name: str, first: int, last: int) -> np.ndarray | None:
        """Values of input `name` at tokens `first` to `last`: `[batch, last - first, d]`; `None`: zeros."""
        rows = self.injected.get(name)
        if rows is None or first >= rows.shape[1]:
            return None
        after = max(last - rows.shape[1], 0)
        return np.pad(rows, ((0, 0), (0, after), (0, 0)))[:, first:last]

    def images_between(self, first: int, last: int) -> np.ndarray | None:
        """Whether tokens `first` to `last` are an image's: `[batch, last - first]` bool; `None` is no."""
        if self.at is None:
            return None
        return np.pad(self.at, ((0, 0), (0, max(last - self.at.shape[1], 0))))[:, first:last]
