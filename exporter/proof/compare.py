"""Comparing what two graphs computed: how far apart, and the place of what is no number.

The rule for NaN: a padded row may hold NaN in both graphs (its attention has nothing to attend to), and then there is nothing
to compare. NaN anywhere else fails, in either graph and in both: nothing can be shown of numbers that are none. Infinity
equals infinity of the same sign alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import SupportsInt

import numpy as np


@dataclass
class Comparison:
    """Outputs of calls, before and after, seen one by one.

    Attributes:
        before, after: whose outputs they are, for the sentences.
        compared: how many numbers were compared.
        differing: how many of them are not equal.
        worst: largest difference, relative to the largest number of its output; infinite where one is no number.
        skipped: NaN of padded rows in both, not compared.
        odd: places of what is no number where there must be one, in words.
        broken: how many of these are NaN in both graphs.
    """

    before: str = "the original"
    after: str = "the guarded model"
    compared: int = 0
    differing: int = 0
    worst: float = 0.0
    skipped: int = 0
    odd: list[str] = field(default_factory=list)
    broken: int = 0

    def see(
        self, where: str, mask: np.ndarray, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]
    ) -> None:
        """One call.

        Args:
            where: which batch and call, in words.
            mask: of the tokens so far, `[batch, past + tokens]`.
            before, after: outputs by name; those of `before` are compared.
        """
        for name, value in before.items():
            if name not in after:
                self._odd(f"{name} of {where} is missing in {self.after}")
                continue
            self._see_output(f"{name} of {where}", mask, value, after[name])

    def _see_output(self, where: str, mask: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
        if left.shape != right.shape:
            self._odd(f"{where} has shape {list(right.shape)} in {self.after}, {list(left.shape)} in {self.before}")
            return
        if (left == right).all():  # the usual case takes no copies: logits may be gigabytes
            self.compared += left.size
            return
        within, scale, furthest = padded(left, mask), 1e-6, 0.0
        for row in range(len(left)):
            x, y = left[row].astype(np.float64), right[row].astype(np.float64)
            finite = np.isfinite(x) & np.isfinite(y)
            excused = np.isnan(x) & np.isnan(y) & (within[row] if len(within) == len(left) else within[0])
            unequal = ~((x == y) | excused)
            self.skipped += int(excused.sum())
            self.compared += x.size - int(excused.sum())
            self.differing += int(unequal.sum())
            scale = max(scale, float(np.abs(x[finite]).max(initial=0.0)))
            furthest = max(furthest, float(np.abs(x[finite] - y[finite]).max(initial=0.0)))
            no_number = unequal & ~finite
            if no_number.any():
                place = np.unravel_index(int(no_number.argmax()), x.shape)
                self.broken += bool(np.isnan(x[place]) and np.isnan(y[place]))
                values = f"{_value(y[place])} in {self.after}, {_value(x[place])} in {self.before}"
                self._odd(f"{where}, {spelled((row, *place), left.ndim)}: {values}")
        self.worst = max(self.worst, furthest / scale)

    def _odd(self, sentence: str) -> None:
        self.odd.append(sentence)
        self.worst = float("inf")

    @property
    def note(self) -> str:
        """A note for the user about NaN and infinities; "" without any."""
        if self.odd:
            places = "; ".join(self.odd[:3]) + (f" and {len(self.odd) - 3} more" if len(self.odd) > 3 else "")
            if self.broken < len(self.odd):
                return places
            return (
                f"{self.before} itself outputs NaN for tokens that are no padding, so nothing can be shown of them; export it "
                f"again with attention that ignores padding: {places}"
            )
        return f"{self.skipped} NaN in padded rows of both, not compared" if self.skipped else ""


def padded(array: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Bool, broadcasts to `array`: the places of padding. An output that has no place for each token has none.

    Args:
        array: `[batch, tokens, ...]` of this call's tokens, or a cache `[batch, heads, tokens so far, ...]`.
        mask: of the tokens so far.
    """
    nowhere = np.zeros((1,) * array.ndim, bool)
    if array.ndim not in (3, 4) or array.shape[0] != len(mask):
        return nowhere
    tokens = array.shape[array.ndim - 2]
    if not 0 < tokens <= mask.shape[1] or (array.ndim == 4 and tokens != mask.shape[1]):
        return nowhere
    rows = mask[:, -tokens:] == 0
    return rows[:, :, None] if array.ndim == 3 else rows[:, None, :, None]


def spelled(place: Sequence[SupportsInt], dimensions: int) -> str:
    """An index in words: the row of the batch, the token, the rest."""
    numbers = [int(number) for number in place]
    token = {3: 1, 4: 2}.get(dimensions)
    words = [f"row {numbers[0]}"] if numbers else []
    if token is not None:
        words.append(f"token {numbers[token]}")
    rest = [str(number) for axis, number in enumerate(numbers) if axis not in (0, token)]
    return ", ".join([*words, *([f"at {', '.join(rest)}"] if rest else [])])


def first_no_number(states: np.ndarray, real: np.ndarray) -> str:
    """Places of NaN or infinity in states `[batch, tokens, d]` of real tokens, as text; "" without any."""
    wrong = ~np.isfinite(states) & real[..., None]
    if not wrong.any():
        return ""
    place = np.unravel_index(int(wrong.argmax()), states.shape)
    return f"{_value(states[place])} at {spelled(place, 3)}"


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference, relative to the largest number; two empty arrays differ by nothing, and NaN from everything."""
    if not a.size:
        return 0.0
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    if not ((x == y) | finite).all():
        return float("inf")
    scale = max(float(np.abs(x[finite]).max(initial=0.0)), 1e-6)
    return float(np.abs(x[finite] - y[finite]).max(initial=0.0)) / scale


def _value(number: np.floating | float) -> str:
    return "NaN" if np.isnan(number) else f"{float(number):.3g}"
