"""The input of a lowering at one site, and its result."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ..reference import LayerGuard


@dataclass(frozen=True)
class Task:
    """The edit of one guarded layer.

    Attributes:
        mode: the intervention.
        layer: its numbers.
        dtype: of the stream.
        supervisor: the text-only coordinates `[batch, 1, m]` float32 (modes with a supervisor).
        text_ends: in place of them, where each row's text-only prompt ends: (row, position) `[batch, 1, 2]` int64 (`pairs`).
        selected: what the weights are multiplied with, in the dtype that the lowering `selects`: `[batch, sequence, 1]` of 0
            and 1, the tokens to edit, times the strength where the guard has that knob (a scalar, if all tokens are
            edited); `None` for all tokens as calibrated.
        offset: added to the threshold, a float32 scalar, where the guard has that knob.
        held: gates that the prompt may have decided, where they are held.
        numbers: in place of `supervisor`, the text-only coordinates along the first rows, as many as the mode reads,
            `[batch, 1, 1]` float32 each; only for lowerings with `takes_numbers`.
        aims: what the stream's coordinates become, one `[batch, sequence, 1]` float32 per row, where they are computed for all
            layers at once; with them `numbers` holds the first coordinate alone, of the same shape.
        outputs_coordinates: whether `Written.coordinates` is needed.
        shared: the layer's part of what the gates of all layers compute together; `None`: the layer has its gate to itself.
    """

    mode: str
    layer: LayerGuard
    dtype: str
    supervisor: ir.Value | None = None
    selected: ir.Value | None = None
    offset: ir.Value | None = None
    held: Held | None = None
    text_ends: ir.Value | None = None
    numbers: tuple[ir.Value, ...] = ()
    aims: tuple[ir.Value, ...] = ()
    outputs_coordinates: bool = False
    shared: SharedGate | None = None


@dataclass(frozen=True)
class SharedGate:
    """One layer's part of gates that are written together, the selection of tokens included.

    Attributes:
        threshold: the layer's own initializer, as in `Gate`.
        level: what the score is compared with, `[batch, sequence, 1]` float32: the threshold at the tokens to edit, elsewhere
            more than any score; `None` where the gate is decided.
        decided: the gate, where it reads the text-only query alone; `None` where it reads the state.
    """

    threshold: ir.Value
    level: ir.Value | None = None
    decided: Gate | None = None


@dataclass(frozen=True)
class Held:
    """A layer's gate as the prompt decided it, `[batch, 1, 1]` float32 of 0 and 1.

    Attributes:
        deciding: 1 in rows in which nothing is decided yet.
        is_open: 1 in rows in which it was decided to be open.
    """

    deciding: ir.Value
    is_open: ir.Value


@dataclass(frozen=True)
class Gate:
    """A gate as it was written.

    Attributes:
        score: what it compares, `[batch, sequence, 1]` float32 (by text: `[batch, 1, 1]`), times `unit`; `None` where nothing
            outside the gate reads it.
        opened: 1 where it is open, else 0, `[batch, sequence or 1, 1]`; 0 at tokens that are not edited where the selection
            is part of it.
        threshold: the initializer that the score is compared with, float32, times `unit`.
        unit: the power of two that the score is read in.
    """

    score: ir.Value | None
    opened: ir.Value
    threshold: ir.Value
    unit: float = 1.0


@dataclass(frozen=True)
class Written:
    """The nodes that a lowering wrote.

    Attributes:
        delta: of `h' = h + delta`, in the stream's dtype.
        coordinates: `c`, `[batch, sequence, m]` float32, times `unit`; `None` if they are not needed.
        gate: `None` where every selected token is edited: `project`, and paired rows.
        weights: the initializers that the edit is linear in: with zeros in their place nothing is edited.
        unit: the power of two that the coordinates are read in.
    """

    delta: ir.Value
    coordinates: ir.Value | None = None
    gate: Gate | None = None
    weights: tuple[ir.Value, ...] = ()
    unit: float = 1.0


@dataclass(frozen=True)
class WrittenWhole:
    """Nodes that compute the guarded state in one step.

    Attributes:
        guarded: `h'`, in the stream's dtype.
        matrix: the initializer that `h` is multiplied with, `[d, d]`: with the identity in its place nothing is edited.
    """

    guarded: ir.Value
    matrix: ir.Value
