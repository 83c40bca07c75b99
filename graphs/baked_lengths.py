"""Decoders that were traced for one length: a recurrence over pieces of the sequence, unrolled to as many as the trace had.

Tracers unroll a Python loop over chunks (the gated delta rule of Qwen3.5 and Qwen4). What they write picks piece 0, 1, ... by
constants from an axis of open size. Longer inputs have more pieces, which no node reads, and the logits are wrong without an
error; shorter ones fail. No other part of a decoder picks fixed places of an open axis.
"""

from __future__ import annotations

import onnx_ir as ir

from .constants import constant
from .dataflow import Flow, Vertex
from .decoder_state import size
from .errors import AnatomyNotFound


def require_open_length(flow: Flow, source: Vertex, sink: Vertex) -> None:
    """No node between source and sink picks pieces of the sequence by constants.

    Raises:
        AnatomyNotFound: some do, so the graph is right for the length of its trace alone.
    """
    picked: dict[tuple[str, int], set[int]] = {}
    for index in flow.between(source, sink):
        node = flow.vertices[index].node
        found = _pick(node) if node is not None and node.op_type == "Gather" and not node.domain else None
        if found is None:
            continue
        name, axis, places, is_quotient = found
        pieces = picked.setdefault((name, axis), set())
        pieces.update(places)
        if len(pieces) > 1 or (is_quotient and pieces):
            raise AnatomyNotFound(
                f"the graph picks fixed pieces of {name!r} on axis {axis}, which is as long as the sequence has pieces: a "
                "recurrence was unrolled for the length of the trace, and other lengths are computed wrongly; export the "
                "decoder with the recurrence as a loop (Scan) or as a LinearAttention operator"
            )


def _pick(node: ir.Node) -> tuple[str, int, set[int], bool] | None:
    """`(name, axis, places, whether the axis counts pieces)` of a Gather by whole numbers from an axis of open size."""
    values, places = node.inputs[0], constant(node.inputs[1])
    axis = node.attributes.get("axis")
    at = 0 if axis is None else None if axis.is_ref() else axis.as_int()
    if values is None or values.shape is None or places is None or at is None or places.size > 1:
        return None
    if not -len(values.shape) <= at < len(values.shape):
        return None
    length = size(values.shape[at])
    number = int(places.numpy().reshape(-1)[0])
    if not isinstance(length, str) or number < 0:  # a negative place is the last token's
        return None
    return values.name or "", at % len(values.shape), {number}, "//" in length or "floor" in length
