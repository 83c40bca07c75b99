"""Directions that are one loud channel, and how well a direction separates prompts that it was not estimated on.

Some channels of a real model's hidden state are a thousand times as large as the others. Their rounding and their dependence on
the prompt's length can outweigh everything else in the differences of the anchors, so that a singular vector is that channel
alone. Such a row says nothing about harm where its AUC is at chance. The channel is then left out of the states, and the
rows are estimated again.
"""

from __future__ import annotations

import numpy as np

from ...graphs.separation import separation_along
from .estimators import estimate

FOLDS = 5
_ONE_CHANNEL = 0.5  # of a unit row's squares
_MOST_DROPPED = 16
_CHEAP = frozenset({"svd", "mean"})  # the others take minutes for five folds of a large model


def quiet_rows(name: str, harmful: np.ndarray, harmless: np.ndarray, rank: int) -> tuple[np.ndarray, list[int]]:
    """Rows `[m, d]` as `estimate` returns them, none of which is one loud channel at chance, and the channels left out.

    Args:
        name: of the estimator.
        harmful, harmless: states `[pairs, d]` float64; not changed.
        rank: rows wanted.
    """
    dropped: list[int] = []
    rows = estimate(name, harmful, harmless, rank)
    while len(dropped) < _MOST_DROPPED:
        channel = next((found for row in rows if (found := _loud_at_chance(row, harmful, harmless)) is not None), None)
        if channel is None:
            break
        dropped.append(channel)
        quiet = _without(harmful, dropped), _without(harmless, dropped)
        if not np.abs(quiet[0] - quiet[1]).max() > 0:  # nothing is left: the channel is all there is
            dropped.pop()
            break
        rows = estimate(name, *quiet, rank)
    return rows, dropped


def held_out_auc(name: str, harmful: np.ndarray, harmless: np.ndarray, dropped: list[int]) -> float | None:
    """The AUC along row 1, cross-validated: on pairs that the row was not estimated on, the mean over `FOLDS` folds.

    `None` for fewer pairs than two a fold, and for estimators that take too long.
    """
    count = len(harmful)
    if name not in _CHEAP or count < 2 * FOLDS:
        return None
    quiet = _without(harmful, dropped), _without(harmless, dropped)
    fold = np.arange(count) % FOLDS
    found = []
    for number in range(FOLDS):
        held = fold == number
        left, right = quiet[0][~held], quiet[1][~held]
        if not np.abs(left - right).max() > 0:
            return None
        row = estimate(name, left, right, 1)[0]
        found.append(separation_along(row, 0, quiet[0][held], quiet[1][held], "").auc)
    return float(np.mean(found))


def _loud_at_chance(row: np.ndarray, harmful: np.ndarray, harmless: np.ndarray) -> int | None:
    """The channel that a row is, where it does not separate the prompts; else `None`."""
    channel = int(np.abs(row).argmax())
    if row[channel] ** 2 <= _ONE_CHANNEL or not separation_along(row, 0, harmful, harmless, "").at_chance:
        return None
    return channel


def _without(states: np.ndarray, channels: list[int]) -> np.ndarray:
    quiet = states.copy()
    quiet[:, channels] = 0
    return quiet
