"""A few rows of each kind, spread over all of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmguard.exporter.prompts.formats import LABELS, SETTINGS, Label, Setting
from vlmguard.exporter.prompts.labelled import LabelledPrompt
from vlmguard.exporter.prompts.thinning import by_setting_and_label, spread, thinned


@pytest.mark.parametrize(
    ("rows", "most", "kept"),
    [
        (9, 3, [0, 4, 8]),
        (9, 99, [*range(9)]),
        (9, 1, [0]),
        (9, 0, []),
        (0, 3, []),
        (5, 4, [0, 1, 3, 4]),
        (2, 2, [0, 1]),
    ],
)
def test_the_first_the_last_and_even_steps(rows: int, most: int, kept: list[int]) -> None:
    assert spread(range(rows), most) == kept


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 60), st.integers(1, 30))
def test_rows_come_once_in_their_order_and_as_many_as_there_may_be(rows: int, most: int) -> None:
    kept = spread(range(rows), most)
    assert kept == sorted(set(kept)) and len(kept) == min(rows, most)
    steps = {after - before for before, after in pairwise(kept)}
    assert not steps or max(steps) - min(steps) <= 1


def test_each_kind_has_its_own_number() -> None:
    assert thinned(range(20), lambda row: row % 3, {2: 2, 0: 3}) == [2, 17, 0, 9, 18]


def test_by_setting_then_label() -> None:
    def row(setting: Setting, label: Label, number: int) -> LabelledPrompt:
        return LabelledPrompt(f"{setting}-{label}-{number}", f"p {number}", label, setting)

    rows = [row(setting, label, number) for number in range(9) for label in LABELS for setting in SETTINGS]
    for labels in (LABELS, LABELS[:2]):
        chosen = by_setting_and_label(rows, 3, labels)
        assert [p.id for p in chosen] == [f"{s}-{label}-{n}" for s in SETTINGS for label in labels for n in (0, 4, 8)]
