"""A few prompts of each kind, spread evenly over a file: files are often sorted, so the first ones would be of one topic."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from .formats import SETTINGS, Label
from .labelled import PAIRED_LABELS, LabelledPrompt

Row = TypeVar("Row")
Kind = TypeVar("Kind", bound=Hashable)


def spread(rows: Sequence[Row], most: int) -> list[Row]:
    """At most `most` of the rows, in their order: the first, the last, and others at equal distances."""
    places = np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)
    return [rows[place] for place in places]


def thinned(rows: Iterable[Row], kind_of: Callable[[Row], Kind], most: Mapping[Kind, int]) -> list[Row]:
    """Rows of each kind, `spread` over all rows of that kind.

    Args:
        rows: in their order.
        kind_of: the kind of a row.
        most: how many rows of each kind; kinds that are not among its keys are left out.

    Returns:
        The rows, by kind in the order of `most`.
    """
    kinds: dict[Kind, list[Row]] = {kind: [] for kind in most}
    for row in rows:
        kinds.get(kind_of(row), []).append(row)
    return [row for kind, found in kinds.items() for row in spread(found, most[kind])]


def by_setting_and_label(
    rows: Sequence[LabelledPrompt], most: int, labels: Sequence[Label] = PAIRED_LABELS
) -> list[LabelledPrompt]:
    """At most `most` prompts of each setting and label: by setting, then label."""
    kinds = itertools.product(SETTINGS, labels)
    return thinned(rows, lambda row: (row.setting, row.label), dict.fromkeys(kinds, most))
