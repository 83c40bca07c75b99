"""Named estimators find the direction that was put into the data, and say which way harmful is."""

from __future__ import annotations

import numpy as np
import pytest

from vlmguard.exporter.extraction.estimators import ESTIMATORS, READOUTS, estimate, fit_readout, require_known
from vlmguard.graphs.errors import GuardError

PAIRS, WIDTH = 60, 24


def made(seed: int = 0, gap: float = 6.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States of pairs far from the origin that differ along one direction, and that direction."""
    random = np.random.default_rng(seed)
    direction = random.normal(size=WIDTH)
    direction /= np.linalg.norm(direction)
    common = 10 * random.normal(size=WIDTH) + random.normal(size=(PAIRS, WIDTH))
    noise = random.normal(size=(2, PAIRS, WIDTH))
    return common + gap * direction + noise[0], common + noise[1], direction


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_direction_of_the_data_is_found(name: str) -> None:
    harmful, harmless, direction = made()
    (row,) = estimate(name, harmful, harmless, 1)
    assert row @ direction > 0.9
    (turned,) = estimate(name, harmless, harmful, 1)
    assert turned @ direction < -0.9


@pytest.mark.parametrize("name", ESTIMATORS)
def test_rows_are_orthonormal_and_oriented(name: str) -> None:
    harmful, harmless, _ = made(1)
    rows = estimate(name, harmful, harmless, 4)
    np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=1e-9)
    assert (((harmful - harmless) @ rows.T).mean(axis=0) >= 0).all()
    np.testing.assert_allclose(rows[:1], estimate(name, harmful, harmless, 1), atol=1e-9)


def test_svd_is_the_papers() -> None:
    harmful, harmless, _ = made(2)
    rows = estimate("svd", harmful, harmless, 3)
    expected = np.linalg.svd(harmful - harmless, full_matrices=False)[2][:3]
    np.testing.assert_allclose(np.abs((rows * expected).sum(axis=1)), 1, atol=1e-9)


def test_mean_is_the_difference_of_means() -> None:
    harmful, harmless, _ = made(3)
    difference = harmful.mean(axis=0) - harmless.mean(axis=0)
    (row,) = estimate("mean", harmful, harmless, 1)
    np.testing.assert_allclose(row, difference / np.linalg.norm(difference), atol=1e-12)


@pytest.mark.parametrize("name", READOUTS)
def test_a_readout_separates_what_it_was_not_fitted_on(name: str) -> None:
    harmful, harmless, _ = made(4)
    states, labels = np.concatenate([harmful, harmless]), np.arange(2 * PAIRS) < PAIRS
    fitted = np.arange(2 * PAIRS) % 2 == 0
    readout = fit_readout(name, states[fitted], labels[fitted])
    scores = states[~fitted] @ readout
    assert np.linalg.norm(readout) == pytest.approx(1)
    order = np.sign(scores[labels[~fitted]][:, None] - scores[~labels[~fitted]][None, :])
    assert (order.mean() + 1) / 2 > 0.95


def test_discriminants_see_past_a_loud_channel() -> None:
    """Real models have channels of a thousand times the others: a difference of means follows them, LDA does not."""
    harmful, harmless, direction = made(5)
    loud = np.eye(WIDTH)[int(np.abs(direction).argmin())]
    noise = np.random.default_rng(6).normal(size=(2, PAIRS, 1)) * 200 * loud
    harmful, harmless = harmful + noise[0], harmless + noise[1]
    aligned = {name: estimate(name, harmful, harmless, 1)[0] @ direction for name in ESTIMATORS}
    assert abs(aligned["svd"]) < 0.1 and aligned["lda"] > 0.7


@pytest.mark.parametrize("name", ESTIMATORS)
def test_there_are_no_more_rows_than_the_pairs_span(name: str) -> None:
    harmful, harmless, _ = made(7)
    assert len(estimate(name, harmful[:3], harmless[:3], 8)) <= 3
    same = np.repeat(harmful[:1] - harmless[:1], 5, axis=0)  # every pair differs by one vector
    rows = estimate(name, harmless[:5] + same, harmless[:5], 4)
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_states_that_do_not_differ_are_refused(name: str) -> None:
    states = np.ones((4, 3))
    with pytest.raises(GuardError) as caught:
        estimate(name, states, states, 1)
    assert str(caught.value) == "the anchors' hidden states do not differ; are harmful and harmless prompts the same?"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(GuardError) as caught:
        require_known("estimator", "pca", ESTIMATORS)
    assert str(caught.value) == "estimator 'pca' is unknown; choose one of svd, lda, logistic, mean"
