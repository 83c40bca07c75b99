"""What a lowering is asked to write at one site."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .reference import LayerGuard


@dataclass(frozen=True)
class Task:
    """The edit of one guarded layer.

    Attributes:
        mode: the intervention.
        layer: its numbers.
        dtype: of the stream.
        supervisor: the text-only coordinates `[batch, 1, m]` float32 (`supervise` only).
        selected: `[batch, sequence, 1]` of 0 and 1 in the dtype that the lowering `selects`, the tokens to edit; `None`
            for all of them.
    """

    mode: str
    layer: LayerGuard
    dtype: str
    supervisor: ir.Value | None = None
    selected: ir.Value | None = None
