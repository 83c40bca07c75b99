"""The modes of the guard, one row each: everything in which they differ except their arithmetic.

The formulas are in `reference`, and each lowering writes them as nodes. Planning, proof, calibration, evaluation and the
report read the rows. A new mode needs a formula in `reference`, a row here and a case in each lowering.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:  # the command line reads the names of the modes, without numpy
    import numpy as np

    from .reference import LayerGuard

Mode = Literal["project", "steer", "supervise", "restore", "combined", "align"]
Positions = Literal["all", "last", "prompt"]
GateInput = Literal["state", "readout", "text", "readout or text", "any text"]
Number = Literal["threshold", "alpha", "origin", "target", "readout", "text_shift"]

MODES: tuple[str, ...] = get_args(Mode)
POSITIONS: tuple[str, ...] = get_args(Positions)

# Where a threshold may lie between harmless and harmful scores (`exporter.calibration.fitting`); "tenth" and "fifth" open the
# gate for that share of the harmless prompts too.
_MIDDLE_FIRST = ("middle", "low", "high", "tenth", "fifth")
# A gate that reads the text-only query decides once per request, so its threshold may lie close to the harmless scores. A gate
# that decides again at every token of an answer keeps its distance.
_LOW_FIRST = ("low", "middle", "high", "tenth", "fifth")
_TARGETS = ("mean", "beyond", "double")


@dataclass(frozen=True)
class GuardMode:
    """One way to edit the residual stream.

    Attributes:
        name: the mode.
        summary: one sentence on the edit, for the report.
        gate: what the gate compares with its threshold: the `state` along row 1 of the SSD, a `readout` of the state, the
            `text`-only query along row 1, `readout or text` (the higher score), or `any text` (the gate opens wherever there
            are text-only coordinates); `None` without a gate.
        score: what the gate reads, as a noun phrase for the report.
        numbers: which numbers of `LayerGuard` the formula reads besides the SSD; `threshold` means one that is fitted or given.
        supervisor: whether the edit needs the coordinates of a text-only pass.
        toward_text: whether the edit leads to the text-only query's own coordinates: a prompt without an image stays as it is.
        positions: the tokens that the mode can edit; the first is the default.
        paired_rows: whether the text-only coordinates may come from another row of the batch (`graphs.pairs`).
        search_axes: what calibration tries beside layers and rank, in this order: field of `Candidate` -> values, the first
            value where the search begins; `None` for a mode without anything to calibrate.
        preference: place in the order in which `--mode auto` tries the modes, from 1; `None`: not tried.
    """

    name: Mode
    summary: str
    gate: GateInput | None = None
    score: str = ""
    numbers: frozenset[Number] = frozenset()
    supervisor: bool = False
    toward_text: bool = False
    positions: tuple[Positions, ...] = ("last", "all")
    paired_rows: bool = False
    search_axes: Mapping[str, tuple[Any, ...]] | None = field(default_factory=dict[str, tuple[Any, ...]])
    preference: int | None = None

    @property
    def has_threshold(self) -> bool:
        """Whether the gate has a threshold that is fitted, given or moved at run time."""
        return "threshold" in self.numbers

    @property
    def has_alpha(self) -> bool:
        """Whether the edit has a strength of its own."""
        return "alpha" in self.numbers

    @property
    def has_readout(self) -> bool:
        """Whether the gate has a readout, and the edit a target level."""
        return "readout" in self.numbers

    @property
    def decides_by_text(self) -> bool:
        """Whether the gate reads the text-only query alone, and so decides once per request."""
        return self.gate == "text"

    @property
    def is_calibrated(self) -> bool:
        """Whether the mode has layers and numbers to calibrate."""
        return self.search_axes is not None

    @property
    def fits_labels(self) -> bool:
        """Whether calibration fits the edit itself to the labels of the prompts."""
        return self.has_threshold and not self.toward_text

    @property
    def edits_prompt_end_only(self) -> bool:
        """Whether the mode never edits a token of the answer."""
        return self.positions == ("prompt",)

    def score_row(self, layer: LayerGuard) -> np.ndarray | None:
        """`[d]` float64: what the gate reads the state with; `None` where the gate does not read the state."""
        if self.gate == "state":
            return layer.ssd[0].astype("float64")
        return layer.readout.astype("float64") if "readout" in self.numbers else None


_ROWS = (
    GuardMode("project", "The guard removes the direction from every state."),
    GuardMode(
        "steer",
        "Where the state's first coordinate is above a threshold, the guard moves the state further along the direction.",
        gate="state",
        score="the state before the guard along row 1 of the direction",
        numbers=frozenset({"threshold", "alpha"}),
        search_axes={"alpha": (1.0, 2.0, 4.0, 8.0), "threshold": ("middle", "low", "high")},
    ),
    GuardMode(
        "supervise",
        "Where a text-only pass finds the request harmful, its coordinates along the direction replace those of the prompt "
        "with the image.",
        gate="text",
        score="the text-only pass along row 1 of the direction",
        numbers=frozenset({"threshold", "alpha", "origin"}),
        supervisor=True,
        toward_text=True,
        positions=("last", "all", "prompt"),
        search_axes={"threshold": _LOW_FIRST, "alpha": (1.0, 1.5, 2.0), "origin": ("harmless", "zero")},
        preference=2,
    ),
    GuardMode(
        "restore",
        "Where a calibrated score finds the prompt harmful, the guard sets the state to the level of harmful text.",
        gate="readout",
        score="the readout of the state before the guard",
        numbers=frozenset({"threshold", "target", "readout"}),
        search_axes={"readout": (), "threshold": _MIDDLE_FIRST, "target": _TARGETS},
        preference=3,
    ),
    GuardMode(
        "combined",
        "As restore, and the gate also opens where a text-only pass finds the request harmful.",
        gate="readout or text",
        score="the readout of the state before the guard, or the text-only pass on its scale, whichever is higher",
        numbers=frozenset({"threshold", "target", "readout", "text_shift"}),
        supervisor=True,
        search_axes={"threshold": _MIDDLE_FIRST, "target": _TARGETS},
        preference=4,
    ),
    GuardMode(
        "align",
        "At the end of the prompt the guard copies the coordinates along the direction from a text-only pass; it has no "
        "threshold.",
        gate="any text",
        supervisor=True,
        toward_text=True,
        positions=("prompt",),
        paired_rows=True,
        search_axes=None,
        preference=1,
    ),
)
_BY_NAME: Mapping[str, GuardMode] = {row.name: row for row in _ROWS}


def guard_mode(name: str) -> GuardMode:
    """The row of a mode.

    Args:
        name: a name of `MODES`; anything else is a bug of the caller (`KeyError`).
    """
    return _BY_NAME[name]


def modes_where(**wanted: object) -> tuple[Mode, ...]:
    """Names of the modes whose attributes or properties have these values, in the order of `MODES`."""
    return tuple(row.name for row in _ROWS if all(getattr(row, key) == value for key, value in wanted.items()))


def preferred_modes() -> tuple[Mode, ...]:
    """The modes that `--mode auto` tries, in the order in which it tries them."""
    tried = [row for row in _ROWS if row.preference is not None]
    return tuple(row.name for row in sorted(tried, key=lambda row: row.preference or 0))
