"""Bootstrap confidence intervals: what the same figures might have been with other prompts of the same kind.

Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentile intervals). Seeded: the same answers
give the same intervals. Where all prompts came out alike, resampling can only repeat itself and would claim certainty;
there the exact bound of Clopper and Pearson (1934) is given instead: 0 of 30 is not "never".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000

# low, high
Interval = tuple[float, float]


def rate_interval(outcomes: Sequence[bool], seed: int = 0) -> Interval:
    """Of the share of outcomes that are true. Resampling `n` of them with replacement draws from a binomial."""
    count, hits = len(outcomes), sum(outcomes)
    if hits in (0, count):
        room = ((1 - LEVEL) / 2) ** (1 / count)
        return (0.0, 1 - room) if hits == 0 else (room, 1.0)
    drawn = np.random.default_rng(seed).binomial(count, hits / count, RESAMPLES)
    return _percentiles(drawn / count)


def interval(count: int, statistic: Callable[[np.ndarray], float], seed: int = 0) -> Interval:
    """Of any statistic of `count` prompts.

    Args:
        statistic: of the prompts with these indices, `[count]` int64, some of them several times.
    """
    random = np.random.default_rng(seed)
    return _percentiles(np.array([statistic(random.integers(count, size=count)) for _ in range(RESAMPLES)]))


def _percentiles(found: np.ndarray) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)
