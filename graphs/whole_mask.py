"""The last attended token of each call, for masks that have a column for each token so far and no more.

`positions.LastToken` also reads static masks, which takes four kernels on TensorRT. Here the mask's last `sequence` columns are
the tokens of the call. A mask with more columns, or fewer, does not fit into the stream's sizes: the graph fails.

A token is the last one if no column of the call counts more than its own. That compares every token with every column,
`[batch, 1, sequence, past + sequence]`, as the decoder does for its causal mask: TensorRT computes both in one kernel.
Comparing each token with the highest column of its row is less work, and a kernel of its own (docs/tensorrt.md).
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import onnx_ir as ir

from .positions import LastToken

# More than any column, so that an attended column counts more than every other one; counts and their differences are int32.
_ATTENDED = 1 << 30


class WholeMask(LastToken):
    """As `LastToken`, for a mask `[batch, past + sequence]`."""

    @cached_property
    def selected(self) -> ir.Value:
        own = self._op("own_counts", "Unsqueeze", [self._counts, self._integers(1, 3)])
        further = self._op("further", "Sub", [self._counts_of_columns, own])
        furthest = self._reduce_max("furthest", further, axis=3, keepdims=0)
        return self._with_sizes_of_stream(self._op("is_last", "Equal", [furthest, self._number("own_column", 0)]))

    @cached_property
    def _counts(self) -> ir.Value:
        """`[batch, sequence]` int32: each column of the call by its place, the attended ones above all others.

        The highest is the last attended one; in a row without a token in this call it is the last one.
        """
        attended = self._op("attended", "Cast", [self._mask_of_call], to=int(ir.DataType.BOOL))
        attended = self._op("attended_int", "Cast", [attended], to=int(ir.DataType.INT32))
        attended = self._op("attended_counts", "Mul", [attended, self._number("attended_place", _ATTENDED)])
        places = self._op("places", "Range", [self._zero, self._length, self._one])
        places = self._op("places_int", "Cast", [places], to=int(ir.DataType.INT32))
        return self._op("counts", "Add", [attended, places])

    @cached_property
    def _counts_of_columns(self) -> ir.Value:
        """`[batch, 1, 1, past + sequence]` int32: the counts, behind less than any count for each past column."""
        batch, length = (
            self._op(name, "Slice", [self._shape, self._integers(axis), self._integers(axis + 1)])
            for axis, name in enumerate(("batch_size", "call_size"))
        )
        counts, columns = self._counts, length
        if self._past is not None:
            before = self._op("before", "Concat", [self._integers(0), self._past, self._integers(0, 0)], axis=0)
            counts = self._op("counts_behind_past", "Pad", [counts, before, self._number("past_counts", -1)])
            columns = self._op("columns_so_far", "Add", [self._past, length])
        # Known sizes, those of the causal mask: a kernel of its own otherwise.
        sizes = self._op("column_sizes", "Concat", [batch, self._integers(1, 1), columns], axis=0)
        return self._op("counts_of_columns", "Reshape", [counts, sizes])

    @cached_property
    def _past(self) -> ir.Value | None:
        """`[1]` int64: the number of past tokens; `None` without a cache."""
        cache = self._inputs.cache
        if cache is None:
            return None
        sizes = self._op("cache_shape", "Shape", [cache.value])
        return self._op("past", "Slice", [sizes, self._integers(cache.axis), self._integers(cache.axis + 1)])

    @cached_property
    def _mask_of_call(self) -> ir.Value:
        """`[batch, sequence]`, the mask behind the past tokens; an error if it has another number of columns."""
        mask = self._inputs.mask
        if self._past is not None:
            behind = self._integers(np.iinfo(np.int64).max)
            mask = self._op("mask_behind_past", "Slice", [mask, self._past, behind, self._integers(1)])
        sizes = self._op("call_sizes", "Slice", [self._shape, self._integers(0), self._integers(2)])
        return self._op("mask_of_call", "Reshape", [mask, sizes])

    def _number(self, name: str, number: int) -> ir.Value:
        return self._scribe.constant(name, np.array(number, dtype=np.int32))
