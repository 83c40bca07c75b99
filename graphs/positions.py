"""Which tokens are edited or read: the last attended token of each call, as index pairs and as a selection.

Left padding makes "last" the last index. Right padding needs the mask: `attention_mask` covers past and current tokens,
so its last S columns belong to the S tokens of this call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .scribe import Scribe

# The name that every exporter gives it (transformers, optimum, onnxruntime-genai, onnx-community): part of their contract.
MASK_INPUT = "attention_mask"
_TO_THE_END = np.iinfo(np.int64).max


def mask_input(graph: ir.Graph) -> ir.Value | None:
    """The 2-D attention mask `[batch, past + sequence]` among the graph's inputs, if it has one."""
    for value in graph.inputs:
        if value.name == MASK_INPUT and value.shape is not None and len(value.shape) == 2:
            return value
    return None


@dataclass(frozen=True)
class LastToken:
    """Where the last attended token of each row is.

    Attributes:
        pairs: `[batch, 2]` int64, (row, position): what GatherND reads by.
        selected: `[batch, sequence, 1]` bool: what an edit is multiplied with, once cast to the stream's dtype.
    """

    pairs: ir.Value
    selected: ir.Value


def last_token(scribe: Scribe, stream: ir.Value, mask: ir.Value | None) -> LastToken:
    """The last attended token of the stream `[batch, sequence, d]`."""
    shape = scribe.op("shape", "Shape", [stream])
    zero, one = (scribe.constant(name, np.array(n, dtype=np.int64)) for name, n in (("zero", 0), ("one", 1)))
    batch = scribe.op("batch", "Gather", [shape, zero], axis=0)
    length = scribe.op("sequence", "Gather", [shape, one], axis=0)
    rows = scribe.op("rows", "Range", [zero, batch, one])
    axis = scribe.integers(1)
    last = _last_index(scribe, batch, length, one, mask, axis)
    row_column, last_column = (
        scribe.op(f"{name}_column", "Unsqueeze", [value, axis]) for name, value in (("row", rows), ("last", last))
    )
    pairs = scribe.op("pairs", "Concat", [row_column, last_column], axis=1)
    places = scribe.op("places", "Range", [zero, length, one])
    selected = scribe.op("is_last", "Equal", [places, last_column])  # [sequence] against [batch, 1]
    return LastToken(pairs, scribe.op("selected", "Unsqueeze", [selected, scribe.integers(2)]))


def _last_index(
    scribe: Scribe, batch: ir.Value, length: ir.Value, one: ir.Value, mask: ir.Value | None, axis: ir.Value
) -> ir.Value:
    """`[batch]`: position of the last attended token."""
    if mask is None:
        last = scribe.op("last_index", "Sub", [length, one])
        row = scribe.op("batch_shape", "Unsqueeze", [batch, scribe.integers(0)])
        return scribe.op("last", "Expand", [last, row])
    start = scribe.op("start", "Neg", [length])
    start = scribe.op("start_1d", "Unsqueeze", [start, scribe.integers(0)])
    current = scribe.op("current_mask", "Slice", [mask, start, scribe.integers(_TO_THE_END), axis])
    # bool first: a mask may hold any non-zero number
    attended = scribe.op("attended", "Cast", [current], to=int(ir.DataType.BOOL))
    attended = scribe.op("attended_int", "Cast", [attended], to=int(ir.DataType.INT64))
    numbered = scribe.op("numbers", "Range", [one, scribe.op("stop", "Add", [length, one]), one])
    # An attended token outranks every other; where none is attended (a mask longer than the tokens so far, as for a
    # static cache), the last index wins.
    outranks = scribe.op("outranks", "Mul", [attended, length])
    weighted = scribe.op("weighted", "Add", [outranks, numbered])
    return scribe.op("last", "ArgMax", [weighted], axis=1, keepdims=0)
