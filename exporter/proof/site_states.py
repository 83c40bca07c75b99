"""States for running one guarded layer on its own: from zero to the dtype's limit, gates on both sides of the threshold.

Every kind of state occurs at every position of a call, so each is the last token of some row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...graphs.dtypes import NUMPY_DTYPES
from ...graphs.modes import guard_mode
from ...graphs.reference import NO_SUPERVISOR, LayerGuard

TOKENS = 4
_PAST = 3
# Smallest and large states, and the end of what is promised to stay finite. float16 reads a coordinate in a unit of about
# d^(-1/2) / 2, where smaller states than this have no digits left.
_TINY = {"float32": 1e-6, "float16": 2e-2, "bfloat16": 1e-6}
_LARGE = {"float32": 1e6, "float16": 32000.0, "bfloat16": 1e6}
_LIMIT = {"float32": 1e30, "float16": 65504.0, "bfloat16": 1e30}
# How far beyond rounding an aimed score lies from its threshold.
_CLEAR = 3.0


@dataclass(frozen=True)
class Aim:
    """The row and threshold of a layer's gate.

    Attributes:
        row: `[d]`, or `None` for a gate that does not read the state.
        threshold: of the score.
        limit: largest relative rounding of a score.
    """

    row: np.ndarray | None
    threshold: float
    limit: float

    @classmethod
    def of(cls, mode: str, layer: LayerGuard, limit: float) -> Aim:
        return cls(guard_mode(mode).score_row(layer), layer.threshold, limit)

    def hit(self, state: np.ndarray, side: float, largest: float) -> np.ndarray:
        """`state` moved until its score lies just above (`side` 1) or below (-1) the threshold, if `largest` allows it."""
        if self.row is None:
            return state
        for direction in (self.row / (self.row @ self.row), np.sign(self.row) / np.abs(self.row).sum()):
            moved = state
            for _ in range(3):  # the margin depends on the state
                margin = _CLEAR * self.limit * float(np.linalg.norm(moved * self.row)) + 1e-9
                moved = state + (self.threshold + side * margin - state @ self.row) * direction
            if np.abs(moved).max() <= largest:
                return moved
        return state


Make = Callable[[np.random.Generator, int], np.ndarray]  # (random, d) -> one state


def _kinds(layer: LayerGuard, aim: Aim, dtype: str) -> dict[str, Make]:
    large = _LARGE[dtype]

    def outlier(random: np.random.Generator, width: int) -> np.ndarray:
        state = random.normal(size=width)
        state[random.choice(width, 2, replace=False)] = 0.9 * large, -0.8 * large
        return state

    def along(sign: float) -> Make:
        def make(random: np.random.Generator, width: int) -> np.ndarray:
            weights = sign * np.abs(1 + random.normal(0, 0.3, layer.rank))
            return 30 * weights @ layer.ssd + 0.1 * random.normal(size=width)

        return make

    return {
        "ordinary": lambda random, width: random.normal(size=width),
        "tiny": lambda random, width: _TINY[dtype] * random.normal(size=width),
        "zero": lambda random, width: np.zeros(width),
        "large": lambda random, width: large * random.uniform(-1, 1, width),
        "outlier channels": outlier,
        "along the direction": along(1.0),
        "against the direction": along(-1.0),
        "just above the threshold": lambda random, width: aim.hit(random.normal(size=width), 1.0, large),
        "just below the threshold": lambda random, width: aim.hit(random.normal(size=width), -1.0, large),
        "the dtype's limit": lambda random, width: _LIMIT[dtype] * random.choice([-1.0, 1.0], width),
    }


KINDS = 10  # of states, and so rows of a call


def site_states(seed: int, layer: LayerGuard, aim: Aim, dtype: str) -> np.ndarray:
    """States `[KINDS, TOKENS, d]`: every kind once at every token.

    Args:
        seed: of the random numbers.
        layer: the guard's numbers.
        aim: the gate's row and threshold.
        dtype: of the stream.
    """
    random = np.random.default_rng(seed)
    makers = list(_kinds(layer, aim, dtype).values())
    assert len(makers) == KINDS
    width = layer.ssd.shape[1]
    rows = [[makers[(row + token) % KINDS](random, width) for token in range(TOKENS)] for row in range(KINDS)]
    return np.array(rows).astype(NUMPY_DTYPES[dtype])


@dataclass(frozen=True)
class Masked:
    """An attention mask of one call.

    Attributes:
        mask: `[rows, columns]` int64, at most KINDS rows.
        past: tokens in the cache before the call.
        tokens: of the call, at most TOKENS.
    """

    mask: np.ndarray
    past: int = 0
    tokens: int = TOKENS

    @property
    def rows(self) -> int:
        return len(self.mask)


def masks() -> list[Masked]:
    """Whole; padded left and right; behind a past; static (longer than the tokens so far), without a past and behind one."""
    whole = np.ones((KINDS, TOKENS), np.int64)
    padded, behind = whole.copy(), np.ones((KINDS, _PAST + TOKENS), np.int64)
    for row in range(KINDS):
        if row % 3 == 0:
            padded[row, : 1 + row % 2] = 0
        elif row % 3 == 1:
            padded[row, TOKENS - 1 - row % 2 :] = 0
        behind[row, : row % 3] = 0
    room = np.zeros((KINDS, 5), np.int64)
    static = [Masked(np.hstack([padded, room])), Masked(np.hstack([behind, room]), _PAST)]
    return [Masked(whole), Masked(padded), Masked(behind, _PAST), *static]


def paired_masks() -> list[Masked]:
    """For paired rows: a decode step; an odd number of rows; rows without a token in the call, odd and even ones."""
    step = Masked(np.ones((KINDS, _PAST + 1), np.int64), _PAST, tokens=1)
    return [step, Masked(np.ones((KINDS - 1, TOKENS), np.int64)), Masked(_absent(), _PAST)]


def whole_masks() -> list[Masked]:
    """For graphs that compare the columns of a call (`graphs.whole_mask`): rows with a gap, or padding on the right, or without
    a token in the call, behind a past; a decode step."""
    gaps = _absent()
    gaps[::4, _PAST + 1 : -1] = 0
    gaps[1::4, _PAST + 2 :] = 0
    return [Masked(gaps, _PAST), Masked(np.ones((KINDS, _PAST + 1), np.int64), _PAST, tokens=1)]


def _absent() -> np.ndarray:
    """A mask behind a past, with rows without a token in the call."""
    mask = np.ones((KINDS, _PAST + TOKENS), np.int64)
    mask[[3, 6], _PAST:] = 0
    return mask


def supervisor_of(number: int, mode: str, layer: LayerGuard, turned: int) -> np.ndarray:
    """One layer's text-only coordinates `[KINDS, m]` float32: the first on both sides of the threshold and, in `supervise`,
    at it and one step above.

    Args:
        number: of the layer. Layers differ in the side of a row, so a gate that reads another layer's row is seen.
        mode: the guard's mode.
        layer: the guard's numbers.
        turned: rotation of the sides among the rows.
    """
    random = np.random.default_rng([number, 7, turned])
    turned += number
    coordinates = random.normal(size=(KINDS, layer.rank)).astype(np.float32)
    edge = np.float32(layer.threshold - layer.text_shift)
    size = 1.0 + abs(layer.threshold) + abs(layer.text_shift)
    far, near = np.float32(size), np.float32(1e-4 * size)  # float32 adds the shift, so nearer would be rounding
    sides = [edge - far, edge + far, edge - near, edge + near]
    if guard_mode(mode).decides_by_text:
        sides += [edge, np.nextafter(edge, np.float32(np.inf))]
    if guard_mode(mode).gate == "any text":
        # most rows have a supervisor, some none; and both sides of the constant between the two
        sides = [coordinates[row, 0] for row in range(KINDS)]
        for row, value in ((2, NO_SUPERVISOR), (5, edge), (7, np.nextafter(edge, np.float32(0)))):
            sides[(row + turned) % KINDS] = np.float32(value)
        coordinates[:, 0] = sides
        coordinates[coordinates[:, 0] == np.float32(NO_SUPERVISOR)] = NO_SUPERVISOR
        return coordinates
    coordinates[:, 0] = [sides[(row + turned) % len(sides)] for row in range(KINDS)]
    return coordinates


def no_supervisor_row(rank: int) -> np.ndarray:
    """The coordinates of a text-only pass, `[KINDS, rank]`."""
    return np.full((KINDS, rank), NO_SUPERVISOR, np.float32)
