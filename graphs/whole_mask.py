"""The last attended token of each call, by one reduction: for masks that have a column for each token so far and no more.

`positions.LastToken` also reads static masks, which takes four kernels on TensorRT. Here the mask's last `sequence` columns are
the tokens of the call. A mask with more columns, or fewer, does not fit into the stream's sizes: the graph fails.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import onnx_ir as ir

from .positions import LastToken

# More than any column, so that an attended column counts more than every other one.
_ATTENDED = 1 << 32


class WholeMask(LastToken):
    """As `LastToken`, for a mask `[batch, past + sequence]`."""

    @cached_property
    def here(self) -> ir.Value:
        return self._op("here", "GreaterOrEqual", [self._highest, self._attended])

    def selected_in(self, rows: ir.Value | None) -> ir.Value:
        is_last = self._op("is_last", "Equal", [self._counts, self._highest])
        if rows is not None:
            is_last = self._op("is_edited", "And", [is_last, rows])
        return self._with_sizes_of_stream(is_last)

    @cached_property
    def _column(self) -> ir.Value:
        return self._op("last", "Mod", [self._highest, self._attended])

    @cached_property
    def _earlier(self) -> ir.Value | None:
        return None

    @cached_property
    def _counts(self) -> ir.Value:
        """`[batch, sequence]` int64: each column of the call by its place, the attended ones above all others.

        The highest is the last attended one; in a row without a token in this call it is the last one.
        """
        attended = self._op("attended", "Cast", [self._mask_of_call], to=int(ir.DataType.BOOL))
        attended = self._op("attended_int", "Cast", [attended], to=int(ir.DataType.INT64))
        attended = self._op("attended_counts", "Mul", [attended, self._attended])
        places = self._op("places", "Range", [self._zero, self._length, self._one])
        return self._op("counts", "Add", [attended, places])

    @cached_property
    def _highest(self) -> ir.Value:
        """`[batch, 1]` int64"""
        return self._op("highest", "ReduceMax", [self._counts, self._integers(1)], keepdims=1)

    @cached_property
    def _mask_of_call(self) -> ir.Value:
        """`[batch, sequence]`, the mask behind the past tokens; an error if it has another number of columns."""
        mask, cache = self._inputs.mask, self._inputs.cache
        if cache is not None:
            sizes = self._op("cache_shape", "Shape", [cache.value])
            past = self._op("past", "Slice", [sizes, self._integers(cache.axis), self._integers(cache.axis + 1)])
            behind = self._integers(np.iinfo(np.int64).max)
            mask = self._op("mask_behind_past", "Slice", [mask, past, behind, self._integers(1)])
        sizes = self._op("call_sizes", "Slice", [self._shape, self._integers(0), self._integers(2)])
        return self._op("mask_of_call", "Reshape", [mask, sizes])

    @cached_property
    def _attended(self) -> ir.Value:
        return self._scribe.constant("attended_place", np.array(_ATTENDED, dtype=np.int64))
