"""A direction that is one loud channel is recognised where it separates nothing, and the evidence is of held-out pairs."""

from __future__ import annotations

import numpy as np
import pytest

from vlmguard.exporter.extraction.extract import directions_from_states
from vlmguard.exporter.extraction.loud_channels import FOLDS, held_out_auc, quiet_rows

PAIRS, WIDTH, LOUD = 40, 24, 5


def states(loudness: float, gap: float = 4.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Harmful and harmless states, and the direction between them; channel `LOUD` is noise of some loudness."""
    random = np.random.default_rng(seed)
    direction = random.normal(size=WIDTH)
    direction[LOUD] = 0
    direction /= np.linalg.norm(direction)
    harmful, harmless = random.normal(size=(2, PAIRS, WIDTH))
    harmful = harmful + gap * direction
    harmful[:, LOUD] += loudness * random.normal(size=PAIRS)
    harmless[:, LOUD] += loudness * random.normal(size=PAIRS)
    return harmful, harmless, direction


def test_a_loud_channel_at_chance_is_left_out() -> None:
    harmful, harmless, direction = states(loudness=300)
    rows, dropped = quiet_rows("svd", harmful, harmless, 4)
    assert dropped == [LOUD] and rows.shape == (4, WIDTH)
    assert rows[0] @ direction > 0.8 and np.abs(rows[:, LOUD]).max() < 1e-9
    np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=1e-9)


def test_a_channel_that_separates_is_kept() -> None:
    """Loud is not wrong: only a channel that says nothing about harm is."""
    harmful, harmless, _ = states(loudness=1)
    harmful[:, LOUD] += 50
    rows, dropped = quiet_rows("svd", harmful, harmless, 2)
    assert dropped == [] and rows[0, LOUD] > 0.9


def test_quiet_states_give_what_the_estimator_gives() -> None:
    harmful, harmless, _ = states(loudness=0)
    rows, dropped = quiet_rows("svd", harmful, harmless, 3)
    expected = np.linalg.svd(harmful - harmless, full_matrices=False)[2][:3]
    assert dropped == [] and np.allclose(np.abs((rows * expected).sum(axis=1)), 1)


def test_states_that_differ_in_one_channel_alone_keep_it() -> None:
    harmless = np.zeros((6, WIDTH))
    harmful = harmless.copy()
    harmful[:, LOUD] = [3, -3, 3, -3, 3, -3]
    rows, dropped = quiet_rows("svd", harmful, harmless, 1)
    assert dropped == [] and abs(rows[0, LOUD]) == pytest.approx(1)


def test_the_held_out_auc_is_high_for_a_gap_and_at_chance_without() -> None:
    apart, mixed = (held_out_auc("svd", *states(0, gap, seed=3)[:2], []) for gap in (4.0, 0.0))
    assert apart is not None and mixed is not None
    assert apart > 0.95 and 0.3 < mixed < 0.7


def test_what_is_not_cross_validated_has_no_figure() -> None:
    harmful, harmless, _ = states(0)
    assert held_out_auc("lda", harmful, harmless, []) is None
    few = 2 * FOLDS - 1
    assert held_out_auc("svd", harmful[:few], harmless[:few], []) is None


def test_an_extraction_records_both() -> None:
    harmful, harmless, _ = states(loudness=300)
    both = np.stack([harmful, harmless], axis=1).reshape(2 * PAIRS, 1, WIDTH).astype(np.float32)
    found = directions_from_states(both, [0], 8, "svd", None)
    assert found.evidence["0"]["loud_channels_dropped"] == [LOUD] and found.evidence["0"]["auc_held_out"] > 0.95
    assert found.layers[0].ssd.shape == (8, WIDTH)
