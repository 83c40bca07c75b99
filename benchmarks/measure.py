"""Timing that survives a noisy machine: subjects take turns, and what is compared ran side by side.

Speed drifts (clocks, caches, other processes), so two means that were taken one after the other compare two moments. Here
every subject runs once per half round: two of them as A B B A, more of them in an order drawn anew each time (seeded), so
that no subject has a favoured place. A subject that runs twice in a row finds its weights in the cache the second time; a
fixed order, forwards and backwards, would give that advantage to the two ends alone. A cost is the ratio of two neighbours in
time, one per half round, and what is reported is the median of these pairs.

Where a session's weights happen to lie in memory, and which session was opened first, makes several percent at a decode step:
of eight sessions of one int4 graph the first took 17.8 ms, the second 16.2 and the last 14.9; in huge pages 15.4, 13.9, and the
six others 13.6. So memory is in huge pages (`in_huge_pages`), the first sessions of a process are not timed, the others are
opened several times in an order drawn anew each time, and an interval is over openings and not over pairs alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

_RESAMPLES = 2000
_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
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

    @classmethod
    def over(cls, openings: Sequence[np.ndarray]) -> Spread:
        """Of the pairs of several openings: the interval resamples openings, then the pairs of each; seeded."""
        pooled, random = np.concatenate(openings), np.random.default_rng(0)
        medians = np.empty(_RESAMPLES)
        for number in range(_RESAMPLES):
            chosen = [openings[index] for index in random.integers(0, len(openings), len(openings))]
            medians[number] = np.median(np.concatenate([random.choice(pairs, len(pairs)) for pairs in chosen]))
        low, high = np.percentile(medians, [2.5, 97.5])
        p10, median, p90 = np.percentile(pooled, [10, 50, 90])
        return cls(float(median), float(p10), float(p90), float(low), float(high), len(pooled))

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


@dataclass(frozen=True)
class Opened:
    """Times of subjects that were opened several times.

    Attributes:
        taken: subject -> one array of seconds per opening, as `interleaved` gives them.
    """

    taken: Mapping[str, Sequence[np.ndarray]]

    def ratio(self, subject: str, baseline: str) -> Spread:
        """`subject / baseline`, pair by pair, over openings."""
        pairs = zip(self.taken[subject], self.taken[baseline], strict=True)
        return Spread.over([mine / other for mine, other in pairs])

    def pooled(self, subject: str) -> np.ndarray:
        """Seconds of all calls."""
        return np.concatenate(self.taken[subject])


def opened_anew(
    opens: Mapping[str, Callable[[], Callable[[], object]]],
    baseline: str,
    budget: Budget,
    openings: int,
    warm_up: int = 2,
    untimed: int = 0,
) -> Opened:
    """Open all subjects in a random order, time them in turns, close them; `openings` times.

    Args:
        opens: subject -> opens it and returns the call to time.
        baseline: as for `interleaved`.
        budget: of all openings together.
        openings: how often.
        warm_up: as for `interleaved`.
        untimed: openings of the baseline that come first, stay open and are not timed.
    """
    first = [opens[baseline]() for _ in range(untimed)]
    for call in first * warm_up:
        call()
    random = np.random.default_rng(0)
    share = replace(
        budget,
        least=max(1, budget.least // openings),
        most=max(1, budget.most // openings),
        seconds=budget.seconds / openings,
    )
    taken: dict[str, list[np.ndarray]] = {name: [] for name in opens}
    for _ in range(openings):
        calls: dict[str, Callable[[], object]] = {}
        for name in random.permutation(list(opens)):
            calls[str(name)] = opens[name]()
        for name, times in interleaved({name: calls[name] for name in opens}, baseline, share, warm_up).items():
            taken[name].append(times)
    return Opened(taken)


def in_huge_pages() -> None:
    """Start the running script again with an allocator that asks for huge pages, where it is glibc's; else do nothing.

    A decode step reads all weights, and with pages of 4 KiB its time depends on which pages an opening happened to get.
    """
    given = os.environ.get(_TUNABLES, "")
    if sys.platform == "linux" and "glibc.malloc.hugetlb" not in given:
        tunables = ":".join(filter(None, (given, _HUGE_PAGES)))
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, _TUNABLES: tunables})


def resolution(again: Spread) -> float:
    """How far the unguarded graph may seem to differ from itself: what these figures cannot tell from 1."""
    return max(abs(again.low - 1), abs(again.high - 1))


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
    result = call()
    taken = time.perf_counter() - start
    del result  # a session that the call opened is closed after the clock stopped
    return taken


def _settled(taken: Mapping[str, list[float]], baseline: str) -> bool:
    times = {name: np.array(values) for name, values in taken.items()}
    return all(ratio(times, name, baseline).narrow for name in times if name != baseline)
