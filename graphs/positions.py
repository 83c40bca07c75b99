"""Which tokens are edited or read: the last attended token of each call, as index pairs and as a selection.

Left padding makes "last" the last index. Right padding needs the mask: `attention_mask` covers past and current tokens,
so its last S columns belong to the S tokens of this call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import onnx_ir as ir

from .roles import input_roles
from .scribe import Scribe

_TO_THE_END = np.iinfo(np.int64).max


def mask_input(graph: ir.Graph) -> ir.Value | None:
    """The 2-D attention mask `[batch, past + sequence]` among the graph's inputs, if it has one."""
    name = input_roles(graph).mask
    mask = next((value for value in graph.inputs if name and value.name == name), None)
    return mask if mask is not None and mask.shape is not None and len(mask.shape) == 2 else None


class LastToken:
    """Where the last attended token of each row of a stream `[batch, sequence, d]` is.

    What is asked for is written then, and once: nothing lies in the graph that nobody reads.
    """

    def __init__(self, scribe: Scribe, stream: ir.Value, mask: ir.Value | None) -> None:
        self._scribe, self._stream, self._mask = scribe, stream, mask

    @cached_property
    def pairs(self) -> ir.Value:
        """`[batch, 2]` int64, (row, position): what GatherND reads by."""
        rows = self._op("rows", "Range", [self._zero, self._batch, self._one])
        row_column = self._op("row_column", "Unsqueeze", [rows, self._integers(1)])
        return self._op("pairs", "Concat", [row_column, self._column], axis=1)

    @cached_property
    def selected(self) -> ir.Value:
        """`[batch, sequence, 1]` bool: what an edit is multiplied with, once cast to the stream's dtype."""
        places = self._op("places", "Range", [self._zero, self._length, self._one])
        is_last = self._op("is_last", "Equal", [places, self._column])  # [sequence] against [batch, 1]
        # Reshaped to the stream's own sizes, not unsqueezed: a mask's sizes have other names, and TensorRT no longer fuses
        # the attention behind a stream whose sizes it is not sure of (docs/tensorrt.md).
        leading = self._op("leading_sizes", "Slice", [self._shape, self._integers(0), self._integers(2)])
        sizes = self._op("sizes", "Concat", [leading, self._integers(1)], axis=0)
        return self._op("selected", "Reshape", [is_last, sizes])

    @cached_property
    def _column(self) -> ir.Value:
        """`[batch, 1]` int64"""
        last = self._at_the_end() if self._mask is None else self._last_attended(self._mask)
        return self._op("last_column", "Unsqueeze", [last, self._integers(1)])

    def _at_the_end(self) -> ir.Value:
        last = self._op("last_index", "Sub", [self._length, self._one])
        row = self._op("batch_shape", "Unsqueeze", [self._batch, self._integers(0)])
        return self._op("last", "Expand", [last, row])

    def _last_attended(self, mask: ir.Value) -> ir.Value:
        start = self._op("start", "Neg", [self._length])
        start = self._op("start_1d", "Unsqueeze", [start, self._integers(0)])
        current = self._op("current_mask", "Slice", [mask, start, self._integers(_TO_THE_END), self._integers(1)])
        # bool first: a mask may hold any non-zero number
        attended = self._op("attended", "Cast", [current], to=int(ir.DataType.BOOL))
        attended = self._op("attended_int", "Cast", [attended], to=int(ir.DataType.INT64))
        stop = self._op("stop", "Add", [self._length, self._one])
        numbered = self._op("numbers", "Range", [self._one, stop, self._one])
        # An attended token outranks every other; where none is attended (a mask longer than the tokens so far, as for a
        # static cache), the last index wins.
        outranks = self._op("outranks", "Mul", [attended, self._length])
        weighted = self._op("weighted", "Add", [outranks, numbered])
        return self._op("last", "ArgMax", [weighted], axis=1, keepdims=0)

    @cached_property
    def _shape(self) -> ir.Value:
        return self._op("shape", "Shape", [self._stream])

    @cached_property
    def _batch(self) -> ir.Value:
        return self._op("batch", "Gather", [self._shape, self._zero], axis=0)

    @cached_property
    def _length(self) -> ir.Value:
        return self._op("sequence", "Gather", [self._shape, self._one], axis=0)

    @cached_property
    def _zero(self) -> ir.Value:
        return self._scribe.constant("zero", np.array(0, dtype=np.int64))

    @cached_property
    def _one(self) -> ir.Value:
        return self._scribe.constant("one", np.array(1, dtype=np.int64))

    @property
    def _op(self) -> Callable[..., ir.Value]:
        return self._scribe.op

    def _integers(self, *numbers: int) -> ir.Value:
        return self._scribe.integers(*numbers)
