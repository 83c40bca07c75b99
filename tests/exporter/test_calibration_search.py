"""The parts of a calibration's search that need no model: where thresholds and targets lie, what is tried, when it ends."""

from __future__ import annotations

import numpy as np
import pytest

from vlmguard.exporter.calibration.candidates import OVERLAPPING, Candidate, places, search_axes
from vlmguard.exporter.calibration.controls import ENOUGH_HELD_OUT, Control
from vlmguard.exporter.calibration.deadline import Deadline
from vlmguard.exporter.calibration.fitting import _target, threshold_between
from vlmguard.exporter.calibration.ranking import gains, hopeless, keeps_limits, ranked
from vlmguard.exporter.calibration.results import Trial
from vlmguard.exporter.evaluation.metrics import Cell, Tally
from vlmguard.graphs.errors import GuardError, PromptsUnusable
from vlmguard.graphs.spec import GuardSpec


@pytest.mark.parametrize(("where", "share"), [("tenth", 0.1), ("fifth", 0.2)])
def test_a_gate_that_answers_judge_opens_for_a_share_of_the_harmless_prompts(where: str, share: float) -> None:
    harmful = np.arange(400) % 2 == 0
    scores = np.random.default_rng(0).normal(size=400) + harmful
    threshold, margin = threshold_between(scores, harmful, 0.01, where)
    assert (scores[~harmful] > threshold).mean() == pytest.approx(share, abs=0.01) and margin < 0
    generous, _ = threshold_between(scores, harmful, 0.5, where)
    assert (scores[~harmful] > generous).mean() == pytest.approx(0.5, abs=0.01)  # the budget allows more


def test_targets_lie_further_and_further_from_harmless_text() -> None:
    harmful, origin = np.array([[2.0, 1.0], [4.0, 1.0]]), np.array([1.0, 0.0])
    found = {where: _target(harmful, origin, where).tolist() for where in search_axes("restore")["target"]}
    assert found == {"mean": [3.0, 1.0], "beyond": [4.0, 1.5], "double": [5.0, 2.0]}


def test_layers_whose_scores_overlap_begin_with_an_open_gate() -> None:
    found = list(places({1: 0.5, 2: -0.5}, 8, GuardSpec(), "restore", None))
    at = {place.layers: place.threshold for place in found}
    assert at == {(1,): "middle", (2,): OVERLAPPING, (1, 2): "middle"}
    assert sorted({place.rank for place in found}) == [1, 2, 4, 8]
    assert {place.threshold for place in places({1: -0.5}, 1, GuardSpec(), "steer", None)} == {Candidate.threshold}


def test_a_gain_in_one_setting_is_a_gain() -> None:
    base = Tally(
        (Cell("text", "harmful", 9, 10), Cell("blank", "harmful", 0, 10), Cell("blank", "harmless", 0, 10)), (), ()
    )
    more = Tally((Cell("text", "harmful", 2, 4), Cell("blank", "harmful", 1, 4)), (), ())
    none = Tally(
        (Cell("text", "harmful", 3, 4), Cell("blank", "harmless", 4, 4), Cell("blank", "harmful", 0, 4)), (), ()
    )
    assert gains(more, base) and not gains(none, base)


def test_the_time_is_over_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr("vlmguard.exporter.calibration.deadline.time.monotonic", lambda: now[0])
    limit, none = Deadline(10, started=50.0), Deadline()
    now[0] = 59.0
    assert not limit() and not none()
    now[0] = 61.0
    assert limit() and not none()


def trial(layer: int, harmful: int, harmless: int, asked: int = 60) -> Trial:
    cells = (Cell("blank", "harmful", harmful, asked), Cell("blank", "harmless", harmless, asked))
    return Trial(Candidate((layer,), 1), 0.0, 0.0, Tally(cells, (), ()))


def test_a_budget_that_counts_exceed_is_kept_unless_the_interval_shows_otherwise() -> None:
    """1% of 60 prompts is no prompt at all. The lower end for 1 of 60 is 0.04%, for 2 of 60 0.4%, for 4 of 60 1.8%."""
    base = trial(0, 0, 0).tally
    for harmless, by_count, by_interval in ((0, True, True), (1, False, True), (2, False, True), (4, False, False)):
        tally = trial(1, 60, harmless).tally
        assert keeps_limits(tally, base, 0.01) is by_count
        assert keeps_limits(tally, base, 0.01, by_interval=True) is by_interval


def test_candidates_within_the_budget_by_their_counts_come_first() -> None:
    base = trial(0, 0, 0).tally
    tried = [trial(1, 60, 2), trial(2, 30, 0), trial(3, 59, 1), trial(4, 60, 20), trial(5, 40, 0)]
    assert [one.candidate.layers for one in ranked(tried, base, 0.01)] == [(5,), (2,), (1,), (3,)]


def test_a_candidate_is_given_up_by_its_counts_only_behind_one_that_keeps_them() -> None:
    base = trial(0, 0, 0).tally
    so_far = trial(1, 20, 1, asked=20).tally
    assert not hopeless(so_far, base, 0.01, None)
    assert not hopeless(so_far, base, 0.01, trial(2, 30, 2))
    assert hopeless(so_far, base, 0.01, trial(2, 30, 0))
    assert hopeless(trial(1, 20, 6, asked=20).tally, base, 0.01, None)


def tallied(harmful: int, asked: int) -> Tally:
    return Tally((Cell("blank", "harmful", harmful, asked), Cell("blank", "harmless", 0, asked)), (), ())


def test_a_control_on_few_prompts_asks_for_more_of_them() -> None:
    few = ENOUGH_HELD_OUT - 2
    with pytest.raises(PromptsUnusable) as refusal:
        Control("random directions", tallied(few, few)).require_failed(tallied(few, few), tallied(0, few), 0.01)
    assert str(refusal.value) == (
        f"the control with random directions refuses as much as the chosen guard, on {few} held-out harmful prompts: too few "
        "to distinguish them; calibrate on at least 10 more harmful prompts in each setting"
    )
    enough = ENOUGH_HELD_OUT
    with pytest.raises(GuardError, match="the choice means nothing"):
        Control("noise", tallied(enough, enough)).require_failed(tallied(enough, enough), tallied(0, enough), 0.01)
    Control("noise", tallied(0, few)).require_failed(tallied(few, few), tallied(0, few), 0.01)
