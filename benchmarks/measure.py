"""Timing that survives a noisy machine: subjects take turns, and what is compared ran side by side.

Speed drifts (clocks, caches, other processes), so two means that were taken one after the other compare two moments. Here
every subject runs once per half round: two of them as A B B A, more of them in an order drawn anew each time (seeded), so
that no subject has a favoured place. A subject that runs twice in a row finds its weights in the cache the second time; a
fixed order, forwards and backwards, would give that advantage to the two ends alone. A cost is the ratio of two neighbours in
time, one per half round, and what is reported is the median of these pairs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

_RESAMPLES = 2000
# How far the end of the median's 95% interval may be from the median when a comparison stops: half of 0.5%.
ENOUGH = 0.0025


@dataclass(frozen=True)
class Spread:
    """A sample in five numbers.

    Attributes:
        median: of the sample.
        p10, p90: what a single pair may well show.
        low, high: the median's 95% interval, by bootstrap: what a repetition of the whole measurement may well show.
        count: pairs, or calls.
    """

    median: float
    p10: float
    p90: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, sample: np.ndarray) -> Spread:
        """Of at least one number; seeded, so the same sample gives the same interval."""
        drawn = np.random.default_rng(0).integers(0, len(sample), size=(_RESAMPLES, len(sample)))
        low, high = np.percentile(np.median(sample[drawn], axis=1), [2.5, 97.5])
        p10, median, p90 = np.percentile(sample, [10, 50, 90])
        return cls(float(median), float(p10), float(p90), float(low), float(high), len(sample))

    @property
    def narrow(self) -> bool:
        return max(self.high - self.median, self.median - self.low) <= ENOUGH * self.median

    def to_json(self) -> dict[str, Any]:
        return {name: round(value, 6) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Budget:
    """When to stop: after `least` rounds, as soon as every ratio is narrow, or else after `most` rounds or `seconds`.

    The rule looks at the width of an interval and never at where it lies, so it favours no result.
    """

    least: int = 10
    most: int = 200
    seconds: float = 60.0


QUICK = Budget(least=2, most=2, seconds=1.0)


def asked(args: argparse.Namespace, usual: Budget) -> Budget:
    """The script's own budget, or what the command line says; intervals tell what less time costs."""
    if args.quick:
        return QUICK
    return usual if args.seconds is None else replace(usual, seconds=args.seconds)


def interleaved(
    subjects: Mapping[str, Callable[[], object]], baseline: str, budget: Budget, warm_up: int = 2, rest: float = 0.0
) -> dict[str, np.ndarray]:
    """Seconds per call, `[2 * rounds]` for every subject; position `i` of all of them belongs to one half round.

    Args:
        subjects: what to time; each call does the same work.
        baseline: the subject that the others are compared with, which decides when to stop.
        warm_up: untimed calls of each subject first.
        rest: seconds to wait before each timed call, for runtimes whose threads go on spinning after one (OpenMP's do).
    """
    for call in list(subjects.values()) * warm_up:
        call()
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    orders = _orders(list(subjects))
    began = time.perf_counter()
    for number in range(1, budget.most + 1):
        for _ in range(2):
            for name in next(orders):
                time.sleep(rest)
                taken[name].append(_seconds(subjects[name]))
        if number >= budget.least and (time.perf_counter() - began > budget.seconds or _settled(taken, baseline)):
            break
    return {name: np.array(times) for name, times in taken.items()}


def turns(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Seconds of each, the mean of two calls in the order A B B A: for work that is done once, such as one batch."""
    a, b, bb, aa = (_seconds(call) for call in (first, second, second, first))
    return (a + aa) / 2, (b + bb) / 2


def ratio(times: Mapping[str, np.ndarray], subject: str, baseline: str) -> Spread:
    """`subject / baseline`, pair by pair."""
    return Spread.of(times[subject] / times[baseline])


def say(text: str) -> None:
    """Progress; stdout belongs to results."""
    print(text, file=sys.stderr, flush=True)


def _orders(names: list[str]) -> Iterator[list[str]]:
    """The order of each half round."""
    random = np.random.default_rng(0)
    order = names
    while True:
        yield order
        if len(names) < 3:
            order = list(reversed(order))
            continue
        ran_last = order[-1]
        order = list(random.permutation(names))
        while order[0] == ran_last:  # no subject twice in a row
            order = list(random.permutation(names))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _settled(taken: Mapping[str, list[float]], baseline: str) -> bool:
    times = {name: np.array(values) for name, values in taken.items()}
    return all(ratio(times, name, baseline).narrow for name in times if name != baseline)
