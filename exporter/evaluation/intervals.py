"""95% confidence intervals over prompts: what the same figures might be with other prompts of the same kind.

- Shares: the exact interval of Clopper and Pearson (1934). It needs no seed, and 0 of 30 is not "never": it is at most 11.6%.
- Means and ratios: the percentile bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13),
  seeded: the same answers give the same interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
ENOUGH_FOR_ONE = 10  # prompts among which one exception shows nothing

# low, high
Interval = tuple[float, float]

METHODS = {"shares": "Clopper-Pearson", "means and ratios": "percentile bootstrap"}

_TAIL = (1 - LEVEL) / 2


@dataclass(frozen=True)
class Share:
    """A share of some prompts.

    Attributes:
        hits, of: counts; `of` is at least 1.
    """

    hits: int
    of: int

    @classmethod
    def counted(cls, outcomes: Sequence[bool]) -> Share:
        return cls(sum(outcomes), len(outcomes))

    @property
    def rate(self) -> float:
        return self.hits / self.of

    @property
    def interval(self) -> Interval:
        return clopper_pearson(self.hits, self.of)

    def to_json(self) -> dict[str, Any]:
        return {"hits": self.hits, "of": self.of, "rate": self.rate, "interval": list(self.interval)}


def clopper_pearson(hits: int, of: int) -> Interval:
    """The exact interval of a share: the rates with which so many hits, and so few, each have a chance of 2.5% or more."""
    from scipy.special import betaincinv

    low = float(betaincinv(hits, of - hits + 1, _TAIL)) if hits else 0.0
    high = float(betaincinv(hits + 1, of - hits, 1 - _TAIL)) if hits < of else 1.0
    return low, high


def bootstrap_interval(count: int, statistic: Callable[[np.ndarray], float], seed: int = 0) -> Interval:
    """The interval of any statistic of `count` prompts.

    Args:
        count: number of prompts, 1 or more. One prompt has no spread: both ends are its statistic.
        statistic: of the prompts with these indices, `[count]` int64, some of them several times.
        seed: random seed of the resamples.
    """
    if count == 1:
        only = statistic(np.zeros(1, np.int64))
        return only, only
    from scipy.stats import bootstrap

    found = bootstrap(
        (np.arange(count),),
        statistic,
        n_resamples=RESAMPLES,
        vectorized=False,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def percentiles(statistics: np.ndarray) -> Interval:
    """The interval that holds all but 2.5% at each end of resampled statistics, `[resamples]` float64."""
    low, high = np.quantile(statistics, [_TAIL, 1 - _TAIL])
    return float(low), float(high)


def within(misses: int, of: int, share: float) -> bool:
    """Whether misses stay within an allowed share. A single one among `ENOUGH_FOR_ONE` or more shows nothing."""
    return misses <= share * of or (misses == 1 and of >= ENOUGH_FOR_ONE)
