"""The numbers of a value that no input changes: an initializer, or what a Constant node outputs."""

from __future__ import annotations

import onnx_ir as ir


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor; `None` for every other value, and for a graph input with a default, because an app may feed it."""
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    for attribute in node.attributes.values():
        if attribute.is_ref():
            return None
        if attribute.type is ir.AttributeType.TENSOR:
            return attribute.as_tensor()
        if attribute.type is ir.AttributeType.INT:
            return ir.tensor(attribute.as_int())
        if attribute.type is ir.AttributeType.INTS:
            return ir.tensor(list(attribute.as_ints()))
        if attribute.type is ir.AttributeType.FLOAT:
            return ir.tensor(attribute.as_float())
    return None
