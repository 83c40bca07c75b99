"""Decoders that were traced for one length: a recurrence over pieces of the sequence, unrolled to as many as the trace had.

Tracers unroll a Python loop over chunks (the gated delta rule of Qwen3.5 and Qwen4). What they write picks piece 0, 1, ... by
constants from an axis of open size. Longer inputs have more pieces, which no node reads, and the logits are wrong without an
error; shorter ones fail. torch.export names the size of such an axis by its formula, `(s22 + 7)//8`.
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
    for index in flow.between(source, sink):
        node = flow.vertices[index].node
        found = _pick(node) if node is not None and node.op_type == "Gather" and not node.domain else None
        if found is not None:
            name, axis = found
            raise AnatomyNotFound(
                f"the graph picks fixed pieces of {name!r} on axis {axis}, which is as long as the sequence has pieces: a "
                "recurrence was unrolled for the length of the trace, and other lengths are computed wrongly; export the "
                "decoder with the recurrence as a loop (Scan) or as a LinearAttention operator"
            )


def _pick(node: ir.Node) -> tuple[str, int] | None:
    """`(name, axis)` of a Gather by a whole number from an axis whose declared size is a quotient, so that it counts pieces.

    Other names are no evidence: shape inference also gives names to fixed sizes that it does not know.
    """
    values, places = node.inputs[0], constant(node.inputs[1])
    axis = node.attributes.get("axis")
    at = 0 if axis is None else None if axis.is_ref() else axis.as_int()
    if values is None or values.shape is None or places is None or at is None or places.size != 1:
        return None
    if not -len(values.shape) <= at < len(values.shape):
        return None
    length = size(values.shape[at])
    number = int(places.numpy().reshape(-1)[0])
    if not isinstance(length, str) or number < 0:  # a negative place is the last one's
        return None
    return (values.name or "", at % len(values.shape)) if "//" in length or "floor" in length else None
