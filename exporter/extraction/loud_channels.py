"""Detects directions that are a single loud channel, and measures how well a direction separates held-out prompts.

Some channels of a real model's hidden state are a thousand times as large as the others. Their rounding and their
dependence on the prompt's length can dominate the differences of the anchors, and a singular vector is then that channel
alone. If the AUC of such a row is at chance, the channel is removed from the states and the rows are estimated again.
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
    """Rows `[m, d]` of `estimate` without rows that are one loud channel at chance, and the removed channels.

    Args:
        name: a key of `ESTIMATORS`.
        harmful, harmless: states `[pairs, d]` float64; not changed.
        rank: number of rows.
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
    """Cross-validated AUC along row 1: the mean over `FOLDS` folds on pairs that the row was not estimated on.

    Args:
        name: a key of `ESTIMATORS`.
        harmful, harmless: states `[pairs, d]`.
        dropped: channels to remove first.

    Returns:
        The AUC; `None` with fewer than two pairs per fold, and for slow estimators.
    """
    count = len(harmful)
    if name not in _CHEAP or count < 2 * FOLDS:
        return None
    quiet = _without(harmful, dropped), _without(harmless, dropped)
    fold = np.arange(count) % FOLDS
    aucs = []
    for number in range(FOLDS):
        held_out = fold == number
        left, right = quiet[0][~held_out], quiet[1][~held_out]
        if not np.abs(left - right).max() > 0:
            return None
        row = estimate(name, left, right, 1)[0]
        aucs.append(separation_along(row, 0, quiet[0][held_out], quiet[1][held_out], "").auc)
    return float(np.mean(aucs))


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
