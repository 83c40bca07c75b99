"""Decoders of a few kilobytes to a megabyte that cost far more to look at than to read, one per way of costing it.

Each is the decoder of `hand_graphs` with something added before its logits, so that an honest one of the same kind passes.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
import onnx_ir as ir
from hand_graphs import WIDTH, decoder
from onnx import TensorProto, helper, numpy_helper


def doubling_functions(depth: int) -> onnx.ModelProto:
    """Functions that call the one before twice: inlined, 2 ** depth nodes."""
    proto, before, logits = _open_ended()
    for level in range(depth):
        inner = [helper.make_node("Identity", ["a"], ["b"])]
        if level:
            called = f"double{level - 1}"
            inner = [
                helper.make_node(called, ["a"], ["m"], domain="local"),
                helper.make_node(called, ["m"], ["b"], domain="local"),
            ]
        imports = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
        proto.functions.append(helper.make_function("local", f"double{level}", ["a"], ["b"], inner, imports))
    proto.opset_import.append(helper.make_opsetid("local", 1))
    proto.graph.node.append(helper.make_node(f"double{depth - 1}", [before], [logits], domain="local"))
    return proto


def recursive_function() -> onnx.ModelProto:
    """A function that calls itself."""
    proto, before, logits = _open_ended()
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    again = helper.make_node("again", ["a"], ["b"], domain="local")
    proto.functions.append(helper.make_function("local", "again", ["a"], ["b"], [again], imports))
    proto.opset_import.append(helper.make_opsetid("local", 1))
    proto.graph.node.append(helper.make_node("again", [before], [logits], domain="local"))
    return proto


def function_chain(depth: int) -> onnx.ModelProto:
    """Functions that call the one before once: deep, and not large."""
    proto, before, logits = _open_ended()
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    for level in range(depth):
        called = helper.make_node("Identity", ["a"], ["b"])
        if level:
            called = helper.make_node(f"deep{level - 1}", ["a"], ["b"], domain="local")
        proto.functions.append(helper.make_function("local", f"deep{level}", ["a"], ["b"], [called], imports))
    proto.opset_import.append(helper.make_opsetid("local", 1))
    proto.graph.node.append(helper.make_node(f"deep{depth - 1}", [before], [logits], domain="local"))
    return proto


def woven(rows: int, across: int, scale: bool = False) -> onnx.ModelProto:
    """A sum of unknown width, read by rows of nodes that each read the whole row before: across ** rows ways to look for it.

    Args:
        scale: whether a norm's weight says the width, behind all of them.
    """
    proto = ir.to_proto(decoder(layers=2))
    del proto.graph.value_info[:]
    for value in (*proto.graph.input, *proto.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_value == WIDTH:
                size.dim_param = "width"
    # the output of an unknown operator has no shape
    proto.opset_import.append(helper.make_opsetid("unknown", 1))
    made = [node.output[0] for node in proto.graph.node if node.op_type == "Add"]
    for node in list(proto.graph.node):
        if node.op_type == "Add":
            parts = [f"{name} of {node.output[0]}" for name in node.input]
            for name, part in zip(node.input, parts, strict=True):
                proto.graph.node.append(helper.make_node("Pass", [name], [part], domain="unknown"))
            node.input[:] = parts
    proto.graph.value_info.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in made if name != "hidden"
    )
    row = ["layer_0_sum"]
    for number in range(rows):
        names = [f"woven_{number}_{place}" for place in range(across)]
        proto.graph.node.extend(helper.make_node("Sum", row, [name]) for name in names)
        row = names
    if scale:
        proto.graph.initializer.append(numpy_helper.from_array(np.ones(WIDTH, np.float32), "weight"))
        proto.graph.node.append(helper.make_node("Mul", [row[-1], "weight"], ["scaled"]))
    return proto


def chain(length: int, op_type: str = "Identity") -> onnx.ModelProto:
    """One node after the other."""
    proto, before, logits = _open_ended()
    names = [before, *(f"link_{number}" for number in range(length - 1)), logits]
    for first, second in pairwise(names):
        inputs = [first, first] if op_type in ("Conv", "Add") else [first]
        proto.graph.node.append(helper.make_node(op_type, inputs, [second]))
    return proto


def many_lookups(count: int) -> onnx.ModelProto:
    """Embedding tables side by side: each could be where the stream begins."""
    proto, before, logits = _open_ended()
    proto.graph.input.append(helper.make_tensor_value_info("more_ids", TensorProto.INT64, ("batch", "sequence")))
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros((4, 5), np.float32), "table"))
    for number in range(count):
        proto.graph.node.append(helper.make_node("Gather", ["table", "more_ids"], [f"lookup_{number}"]))
    names = [before, *(f"total_{number}" for number in range(count - 1)), logits]
    for number, (first, second) in enumerate(pairwise(names)):
        proto.graph.node.append(helper.make_node("Add", [first, f"lookup_{number}"], [second]))
    return proto


def many_softmaxes(count: int) -> onnx.ModelProto:
    """Softmaxes whose results all run into one long chain of nodes that attention may be hidden behind."""
    proto, before, logits = _open_ended()
    names = [before, *(f"chosen_{number}" for number in range(count - 1)), logits]
    proto.graph.node.extend(helper.make_node("Softmax", [before], [f"shares_{number}"]) for number in range(count))
    for number, (first, second) in enumerate(pairwise(names)):
        proto.graph.node.append(helper.make_node("Where", [first, f"shares_{number}", first], [second]))
    return proto


def nested_branches(depth: int) -> onnx.ModelProto:
    """An If in each branch of an If, 2 ** depth of them, which all capture a value of the top graph."""
    proto, before, logits = _open_ended()
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "condition"))

    def branch(level: int, name: str) -> onnx.GraphProto:
        node = helper.make_node("Identity", [before], [name])
        if level:
            bodies = {f"{side}_branch": branch(level - 1, f"{name}_{side}") for side in ("then", "else")}
            node = helper.make_node("If", ["condition"], [name], **bodies)
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([node], f"body {name}", [], [output])

    bodies = {f"{side}_branch": branch(depth, side) for side in ("then", "else")}
    proto.graph.node.append(helper.make_node("If", ["condition"], [logits], **bodies))
    return proto


def many_attentions(count: int) -> onnx.ModelProto:
    """A decoder of that many layers."""
    return ir.to_proto(decoder(layers=count))


def parallel_attentions(count: int) -> onnx.ModelProto:
    """Attentions side by side within the last layer."""
    proto, before, logits = _open_ended()
    for number in range(count):
        proto.graph.node.append(helper.make_node("Attention", [before] * 3, [f"seen_{number}"], domain="com.microsoft"))
    names = [before, *(f"total_{number}" for number in range(count - 1)), logits]
    for number, (first, second) in enumerate(pairwise(names)):
        proto.graph.node.append(helper.make_node("Add", [first, f"seen_{number}"], [second]))
    return proto


def _open_ended() -> tuple[onnx.ModelProto, str, str]:
    """A decoder without the node for its logits, the value to make them from, and their name."""
    proto = ir.to_proto(decoder(layers=2))
    logits = proto.graph.output[0].name
    last = next(node for node in proto.graph.node if logits in node.output)
    last.output[list(last.output).index(logits)] = "before"
    return proto, "before", logits
