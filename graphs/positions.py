"""Positions that are edited or read: the last attended token of each call, as index pairs and as a selection.

A call has S tokens, its mask T columns, one for each token so far and perhaps more. Which columns are this call's S tokens is
not written anywhere, so it is decided where they end (`W`):

- T = past + S, where the graph has a KV cache that grows (its past axis is read), and T = S without a past: `W = T`. Any
  padding is read as it is: left, right, in all rows or in some.
- otherwise the mask is static (as long as the longest answer; capture of graphs, shared buffers), zeros stand behind the
  tokens so far, and `W` is the furthest column that any row attends to. The longest row must end in a token, unless this is
  the first call: then the tokens are the first S columns, and padding may stand behind all rows.

Each row's last attended column then lies `W - column` places before the end of the call. A row without any token in this call
is read and edited at the last index.

A static mask cannot show that a LATER part of a prompt is padded on the right in every row. `position_ids` can: a token's
position is at most the number of columns before it, so the call reaches at least as far as its first position plus S. Where
that is further than the mask shows, one of the two is misleading (positions may also be counted from 1), so BOTH places are
edited, and the earlier one, which is a token and not padding, is read. For masks of past + S columns the two are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import onnx_ir as ir

from .call_inputs import CallInputs
from .node_builder import NodeBuilder

_OPSET_OF_AXES_INPUT = 18  # from here on ReduceMax takes its axes as an input


class LastToken:
    """Position of the last attended token of each row of a stream `[batch, sequence, d]`.

    Nodes are written on first use, once: the graph contains no unused nodes.

    Args:
        inputs: of the graph; without a mask every row's last token is at the last index.
    """

    def __init__(self, builder: NodeBuilder, stream: ir.Value, inputs: CallInputs) -> None:
        self._scribe, self._stream, self._inputs = builder, stream, inputs

    @cached_property
    def pairs(self) -> ir.Value:
        """`[batch, 2]` int64, (row, position): what GatherND reads by."""
        row_column = self._op("row_column", "Unsqueeze", [self.rows, self._integers(1)])
        column = self._column
        if self._earlier is not None:
            column = self._op("read_column", "Max", [self._earlier, self._zero])
        return self._op("pairs", "Concat", [row_column, column], axis=1)

    @cached_property
    def here(self) -> ir.Value:
        """`[batch, 1]` bool: whether the row has a token in this call, as the mask shows it."""
        return self._op("here", "Less", [self._behind, self._length])

    @cached_property
    def rows(self) -> ir.Value:
        """`[batch]` int64: the numbers of the rows."""
        return self._op("rows", "Range", [self._zero, self._batch, self._one])

    @cached_property
    def length(self) -> ir.Value:
        """Int64: tokens of this call."""
        return self._length

    @cached_property
    def selected(self) -> ir.Value:
        """`[batch, sequence, 1]` bool: what an edit is multiplied with, once cast to the stream's dtype."""
        return self.selected_in(None)

    def selected_in(self, rows: ir.Value | None) -> ir.Value:
        """`selected` of some rows, `[batch, 1]` bool; `None` for all. To be called once."""
        places = self._op("places", "Range", [self._zero, self._length, self._one])
        is_last = self._op("is_last", "Equal", [places, self._column])  # [sequence] against [batch, 1]
        if self._earlier is not None:
            is_earlier = self._op("is_earlier", "Equal", [places, self._earlier])
            is_last = self._op("is_either", "Or", [is_last, is_earlier])
        if rows is not None:
            is_last = self._op("is_edited", "And", [is_last, rows])
        return self._with_sizes_of_stream(is_last)

    def _with_sizes_of_stream(self, selected: ir.Value) -> ir.Value:
        """`[batch, sequence, 1]` of a selection `[batch, sequence]`."""
        # Reshaped to the stream's own sizes, not unsqueezed: a mask's sizes have other names, and TensorRT no longer fuses
        # the attention behind a stream whose sizes it is not sure of (docs/tensorrt.md).
        leading = self._op("leading_sizes", "Slice", [self._shape, self._integers(0), self._integers(2)])
        sizes = self._op("sizes", "Concat", [leading, self._integers(1)], axis=0)
        return self._op("selected", "Reshape", [selected, sizes])

    @cached_property
    def _column(self) -> ir.Value:
        """`[batch, 1]` int64: the last attended token, as the mask shows it."""
        if self._inputs.mask is None:
            row = self._op("batch_shape", "Unsqueeze", [self._batch, self._integers(0)])
            last = self._op("last", "Expand", [self._last_index, row])
            return self._op("last_column", "Unsqueeze", [last, self._integers(1)])
        # a multiplication and no Where, which TensorRT does not fuse with the rest
        here = self._op("here_int", "Cast", [self.here], to=int(ir.DataType.INT64))
        behind = self._op("behind_here", "Mul", [self._behind, here])
        return self._op("last", "Sub", [self._last_index, behind])

    @cached_property
    def _behind(self) -> ir.Value:
        """`[batch, 1]` int64: how many columns before the end of the call the row's last token is."""
        return self._op("behind", "Sub", [self._end, self._attended_to])

    @cached_property
    def _earlier(self) -> ir.Value | None:
        """`[batch, 1]` int64: the last attended token, as the positions show it; below 0 where it is not in this call."""
        positions, mask = self._inputs.positions, self._inputs.mask
        if positions is None or mask is None:
            return None
        first = self._op("first_positions", "Gather", [positions, self._zero], axis=1)
        if positions.dtype != ir.DataType.INT64:
            first = self._op("first_positions_int64", "Cast", [first], to=int(ir.DataType.INT64))
        first = self._op("first_position", "ReduceMax", [first], keepdims=0)
        reach = self._op("reach", "Add", [first, self._length])
        reach = self._op("reach_in_mask", "Min", [reach, self._columns])
        reach = self._op("reach_or_end", "Max", [reach, self._end])
        further = self._op("further", "Sub", [reach, self._end])
        return self._op("earlier", "Sub", [self._column, further])

    @cached_property
    def _attended_to(self) -> ir.Value:
        """`[batch, 1]` int64: each row's last attended column of the whole mask, counted from 1; 0 where there is none."""
        # bool first: a mask may hold any non-zero number
        attended = self._op("attended", "Cast", [self._inputs.mask], to=int(ir.DataType.BOOL))
        attended = self._op("attended_int", "Cast", [attended], to=int(ir.DataType.INT64))
        numbered = self._op("numbers", "Range", [self._one, self._beyond, self._one])
        seen = self._op("seen", "Mul", [attended, numbered])
        return self._reduce_max("attended_to", seen, axis=1, keepdims=1)

    @cached_property
    def _end(self) -> ir.Value:
        """Int64: the columns of the mask up to the end of this call's tokens (`W`)."""
        furthest = self._op("furthest", "ReduceMax", [self._attended_to], keepdims=0)
        return self._op("end", "Max", [furthest, self._least_end])

    @cached_property
    def _least_end(self) -> ir.Value:
        """Int64: past + S where the mask has so many columns, else S; a mask of one column stands for all."""
        least = self._length
        if self._inputs.cache is not None:
            cache, axis = self._inputs.cache.value, self._inputs.cache.axis
            sizes = self._op("cache_shape", "Shape", [cache])
            past = self._op("past", "Gather", [sizes, self._scribe.constant("past_axis", np.array(axis))], axis=0)
            total = self._op("total", "Add", [past, self._length])
            # the past axis of a buffer that past and present share is its capacity: more than the mask has columns
            fits = self._op("fits", "Less", [total, self._beyond])
            fits = self._op("fits_int", "Cast", [fits], to=int(ir.DataType.INT64))
            least = self._op("past_that_fits", "Mul", [past, fits])
            least = self._op("least_end", "Add", [least, self._length])
        return self._op("least_end_in_mask", "Min", [least, self._columns])

    @cached_property
    def _columns(self) -> ir.Value:
        """Int64: T"""
        sizes = self._op("mask_shape", "Shape", [self._inputs.mask])
        return self._op("columns", "Gather", [sizes, self._one], axis=0)

    @cached_property
    def _beyond(self) -> ir.Value:
        """Int64: T + 1"""
        return self._op("beyond", "Add", [self._columns, self._one])

    @cached_property
    def _last_index(self) -> ir.Value:
        return self._op("last_index", "Sub", [self._length, self._one])

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

    def _reduce_max(self, name: str, value: ir.Value, axis: int, keepdims: int) -> ir.Value:
        if self._scribe.home.opset_imports.get("", _OPSET_OF_AXES_INPUT) < _OPSET_OF_AXES_INPUT:
            return self._op(name, "ReduceMax", [value], axes=[axis], keepdims=keepdims)
        return self._op(name, "ReduceMax", [value, self._integers(axis)], keepdims=keepdims)

    @property
    def _op(self) -> Callable[..., ir.Value]:
        return self._scribe.op

    def _integers(self, *numbers: int) -> ir.Value:
        return self._scribe.integers(*numbers)
