"""Confidence intervals of shares: the percentile bootstrap (Efron 1979), seeded, so that a page can be made again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
_RESAMPLES = 10_000


def interval_of_share(outcomes: Sequence[bool], level: float = LEVEL) -> tuple[float, float]:
    """Bounds of the share of true outcomes.

    Where all outcomes are alike every resample is the same and the bootstrap has no width, though ten refusals of ten prove
    little. There the exact bound (Clopper and Pearson 1934) takes its place.

    Args:
        outcomes: one per prompt; not empty.
        level: of confidence.
    """
    drawn = np.asarray(outcomes, dtype=bool)
    count, share, tail = len(drawn), float(drawn.mean()), (1 - level) / 2
    if share in (0.0, 1.0):
        far = tail ** (1 / count)
        return (0.0, 1 - far) if share == 0.0 else (far, 1.0)
    # resampling yes and no with replacement IS drawing a binomial number: no need for a matrix of indices
    resampled = np.random.default_rng(0).binomial(count, share, _RESAMPLES) / count
    low, high = np.quantile(resampled, (tail, 1 - tail))
    return float(low), float(high)
