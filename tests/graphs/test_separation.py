"""The AUC of a direction: measured, recorded, and told apart from chance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmguard.graphs.separation import Separation, recorded_separations, separation_along, warnings_of

ROW = np.array([1.0, 0.0], np.float32)


def states(*scores: float) -> np.ndarray:
    return np.array([[score, 7.0] for score in scores], np.float32)


def test_the_auc_counts_pairs_that_are_in_order_and_ties_by_half() -> None:
    assert separation_along(ROW, 3, states(2, 3), states(0, 1), "p").auc == 1
    assert separation_along(ROW, 3, states(0, 1), states(2, 3), "p").auc == 0
    assert separation_along(ROW, 3, states(1, 3), states(1, 2), "p").auc == (0.5 + 0 + 1 + 1) / 4
    assert separation_along(ROW, 3, states(5), states(5, 5, 5), "p").auc == 0.5


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 1000))
def test_the_auc_is_that_of_scikit_learn(harmful: int, harmless: int, seed: int) -> None:
    from sklearn.metrics import roc_auc_score

    scores = np.random.default_rng(seed).integers(0, 9, harmful + harmless).astype(float)
    found = separation_along(ROW, 0, states(*scores[:harmful]), states(*scores[harmful:]), "p").auc
    assert found == pytest.approx(roc_auc_score([1] * harmful + [0] * harmless, scores))


def test_chance_reaches_what_one_meaningless_direction_of_twenty_passes() -> None:
    random = np.random.default_rng(0)
    for count in (10, 30, 100):
        reach = Separation(0, 0.5, count, count, "p").reach_of_chance
        aucs = [
            separation_along(ROW, 0, states(*random.normal(size=count)), states(*random.normal(size=count)), "p").auc
            for _ in range(2000)
        ]
        assert np.mean(np.array(aucs) > reach) == pytest.approx(0.05, abs=0.015)


def test_the_warning_has_the_figure() -> None:
    assert Separation(3, 0.95, 30, 30, "builtin:calibration").warning is None
    assert Separation(3, 0.52, 30, 30, "builtin:calibration").warning == (
        "warning: layer 3: AUC 0.52 on 30 pairs (builtin:calibration), no better than chance, which reaches 0.62: this "
        "direction does not separate harmful from harmless prompts; choose other layers, or extract the directions again"
    )
    assert Separation(0, 0.02, 30, 20, "p.jsonl").warning == (
        "warning: layer 0: AUC 0.02 on 30 harmful and 20 harmless prompts (p.jsonl): harmless prompts lie on the harmful side "
        "of the direction; its sign is probably wrong"
    )
    told = warnings_of([Separation(1, 0.9, 40, 40, "p"), Separation(2, 0.5, 40, 40, "p")])
    assert [text.split(":")[1] for text in told] == [" layer 2"]


def test_so_few_prompts_that_chance_reaches_everything_prove_nothing() -> None:
    assert Separation(0, 1.0, 1, 1, "p").at_chance and Separation(0, 1.0, 1, 1, "p").reach_of_chance == 1


def test_figures_of_a_file_are_taken_only_where_an_extraction_could_have_written_them() -> None:
    evidence = {"1": {"auc": 0.9}, "2": {"auc": "0.9"}, "3": {"auc": float("nan")}, "4": 7, "5": {"auc": 1.5}, "6": {}}
    assert recorded_separations(evidence, 40, range(8), "anchors.jsonl") == (
        Separation(1, 0.9, 40, 40, "anchors.jsonl"),
    )
    assert recorded_separations(evidence, None, [1], "p") == recorded_separations(evidence, 0, [1], "p") == ()
