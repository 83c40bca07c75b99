"""Intervals: of the right width, seeded where they are resampled, and never certain about what they cannot know."""

from __future__ import annotations

import numpy as np
import pytest

from vlmguard.exporter.evaluation.intervals import RESAMPLES, Share, bootstrap_interval, clopper_pearson


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.arange(20.0)
    first, again, other = (bootstrap_interval(20, lambda chosen: float(values[chosen].mean()), n) for n in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("count", [1, 2, 40])
def test_the_interval_is_that_of_the_resamples_percentiles(count: int) -> None:
    """A ratio, resampled and sorted by hand; with one prompt there is nothing to resample."""
    values, weights = np.random.default_rng(3).normal(size=(2, count)) + 5

    def ratio(chosen: np.ndarray) -> float:
        return float(values[chosen].sum() / weights[chosen].sum())

    random = np.random.default_rng(7)
    made = [ratio(random.integers(count, size=count)) for _ in range(RESAMPLES)]
    assert bootstrap_interval(count, ratio, seed=7) == pytest.approx(np.percentile(made, [2.5, 97.5]))


@pytest.mark.parametrize(("hits", "of"), [(30, 100), (5, 20), (199, 200), (1, 3), (250, 500)])
def test_a_share_is_inside_its_interval(hits: int, of: int) -> None:
    share = Share(hits, of)
    low, high = share.interval
    assert 0 < low < share.rate < high < 1
    # about as wide as the normal approximation says, where that holds, and never narrower than it
    if min(hits, of - hits) >= 5:
        half = 1.96 * (share.rate * (1 - share.rate) / of) ** 0.5
        assert half < (high - low) / 2 < 1.15 * half


def test_the_interval_is_the_one_in_the_tables() -> None:
    """Published two-sided 95% limits of Clopper and Pearson for 5 of 20 and 1 of 10."""
    assert clopper_pearson(5, 20) == (pytest.approx(0.0866, abs=5e-5), pytest.approx(0.4910, abs=5e-5))
    assert clopper_pearson(1, 10) == (pytest.approx(0.0025, abs=5e-5), pytest.approx(0.4450, abs=5e-5))


@pytest.mark.parametrize(("hits", "of"), [(3, 7), (40, 120), (480, 500)])
def test_each_end_leaves_a_chance_of_a_fortieth(hits: int, of: int) -> None:
    """Counted with exact binomials: at the upper end of so few hits, at the lower end of so many."""
    from math import comb

    low, high = clopper_pearson(hits, of)
    chance = lambda p, counts: sum(comb(of, k) * p**k * (1 - p) ** (of - k) for k in counts)  # noqa: E731
    assert chance(high, range(hits + 1)) == pytest.approx(0.025, rel=1e-6)
    assert chance(low, range(hits, of + 1)) == pytest.approx(0.025, rel=1e-6)


@pytest.mark.parametrize("of", [1, 30, 120])
def test_where_all_came_out_alike_one_end_is_open(of: int) -> None:
    """0 of 30 may be as much as 11.6%: the highest rate with which 30 misses have a chance of 2.5%."""
    low, high = clopper_pearson(0, of)
    assert low == 0 and (1 - high) ** of == pytest.approx(0.025)
    assert clopper_pearson(of, of) == (pytest.approx(1 - high), 1.0)


def test_more_than_nine_of_ten_intervals_hold_the_truth() -> None:
    random = np.random.default_rng(0)
    draws = [Share.counted([bool(hit) for hit in random.random(80) < 0.3]).interval for _ in range(200)]
    assert sum(low <= 0.3 <= high for low, high in draws) >= 185
