"""Intervals: seeded, of the right width, and never certain about what they cannot know."""

from __future__ import annotations

import numpy as np
import pytest

from vlmguard.exporter.evaluation.bootstrap import interval, rate_interval


def test_the_same_seed_gives_the_same_interval() -> None:
    outcomes = [True] * 3000 + [False] * 7000
    assert rate_interval(outcomes, 1) == rate_interval(outcomes, 1) != rate_interval(outcomes, 2)
    values = np.arange(20.0)
    first, again, other = (interval(20, lambda chosen: float(values[chosen].mean()), seed) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(("hits", "of"), [(30, 100), (5, 20), (199, 200)])
def test_a_rate_is_inside_its_interval(hits: int, of: int) -> None:
    low, high = rate_interval([True] * hits + [False] * (of - hits))
    rate = hits / of
    assert 0 <= low < rate < high <= 1 or high == 1.0 >= rate > low
    # as wide as the normal approximation says, where that holds
    if min(hits, of - hits) >= 5:
        assert (high - low) / 2 == pytest.approx(1.96 * (rate * (1 - rate) / of) ** 0.5, rel=0.25)


@pytest.mark.parametrize("of", [1, 30, 120])
def test_where_all_came_out_alike_the_exact_bound_is_given(of: int) -> None:
    """0 of 30 may be as much as 11.6%: the highest rate with which 30 misses have a chance of 2.5%."""
    low, high = rate_interval([False] * of)
    assert low == 0 and (1 - high) ** of == pytest.approx(0.025)
    assert rate_interval([True] * of) == (pytest.approx(1 - high), 1.0)


def test_resampling_a_rate_is_resampling_its_outcomes() -> None:
    """The binomial is a short cut for what `interval` does to any statistic."""
    outcomes = np.array([1.0] * 40 + [0.0] * 60)
    general = interval(100, lambda chosen: float(outcomes[chosen].mean()), 3)
    assert general == pytest.approx(rate_interval([bool(one) for one in outcomes], 3), abs=0.02)


def test_nine_of_ten_intervals_hold_the_truth() -> None:
    random = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        low, high = rate_interval(list(random.random(80) < 0.3), seed)
        held += low <= 0.3 <= high
    assert held >= 180
