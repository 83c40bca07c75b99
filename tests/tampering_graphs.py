"""Attacks on a guarded graph that leave every node of the guard in place: a second decoder whose answer comes in around it.

The second decoder is the whole model once more, unguarded. Its token is an ArgMax, which comes back as a number, as a size,
as a count or as a condition (`CHANNELS`), and is added to the guarded logits, so that the model answers with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY = 5
Change = Callable[[onnx.ModelProto], None]
Nodes = list[onnx.NodeProto]


def copy_unguarded(model: onnx.ModelProto, reads: dict[str, str] | None = None, hidden: bool = True) -> None:
    """The decoder once more without its guard, to `second_logits`.

    Args:
        reads: replaces what it reads.
        hidden: its Softmax is spelled out, so that no attention is recognised in it.
    """
    nodes = [node for node in model.graph.node if not node.name.startswith("vlmguard/")]
    back = {f"vlmguard/layer_{layer}/guarded": f"layer_{layer}_sum" for layer in (0, 1)} | (reads or {})
    made = {name for node in nodes for name in node.output}
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = f"second {node.name}"
        copy.input[:] = [f"second_{n}" if n in made else n for n in (back.get(name, name) for name in node.input)]
        copy.output[:] = [f"second_{name}" for name in node.output]
        if hidden and copy.op_type == "Softmax":
            axis, (scores, shares) = constant(model, "last_axis", [-1]), (copy.input[0], copy.output[0])
            model.graph.node.extend(
                [
                    helper.make_node("Exp", [scores], [f"{shares}_grown"], name=f"second {shares} grown"),
                    helper.make_node(
                        "ReduceSum", [f"{shares}_grown", axis], [f"{shares}_all"], name=f"second {shares} all"
                    ),
                    helper.make_node("Div", [f"{shares}_grown", f"{shares}_all"], [shares], name=copy.name),
                ]
            )
            continue
        model.graph.node.append(copy)


def constant(model: onnx.ModelProto, name: str, numbers: object, dtype: type = np.int64) -> str:
    if all(tensor.name != name for tensor in model.graph.initializer):
        model.graph.initializer.append(numpy_helper.from_array(np.array(numbers, dtype), name))
    return name


def numbers(model: onnx.ModelProto) -> None:
    for name, value in (("none", 0), ("unit", 1), ("five", VOCABULARY)):
        constant(model, name, value)
        constant(model, f"{name}s", [value])
    constant(model, "ladder", np.arange(VOCABULARY))
    constant(model, "all_ones", np.ones(VOCABULARY))
    constant(model, "boost", 1e4, np.float32)
    constant(model, "on_off", [0, 1], np.float32)
    constant(model, "no_step", True, np.bool_)


def answer_with(channel: Callable[[onnx.ModelProto], Nodes]) -> Change:
    """The logits are those of the second decoder's token; `channel` brings the scalar `token` to the scalar `back`."""

    def change(model: onnx.ModelProto) -> None:
        copy_unguarded(model)
        numbers(model)
        head = next(node for node in model.graph.node if node.output[0] == "logits")
        head.output[0] = "guarded_logits"
        model.graph.node.extend(
            [
                helper.make_node("Gather", ["second_logits", "none"], ["of_row"], axis=0),
                helper.make_node("ArgMax", ["of_row"], ["tokens"], axis=-1, keepdims=0),
                helper.make_node("Constant", [], ["end"], value=numpy_helper.from_array(np.array(-1))),
                helper.make_node("Gather", ["tokens", "end"], ["token"]),
                *channel(model),
                helper.make_node("OneHot", ["back", "five", "on_off"], ["chosen"]),
                helper.make_node("Mul", ["chosen", "boost"], ["loud"]),
                helper.make_node("Add", ["guarded_logits", "loud"], ["logits"]),
            ]
        )

    return change


def nodes(*made: tuple[str, list[str], list[str]], **attributes: Any) -> Callable[[onnx.ModelProto], Nodes]:
    """`attributes` are those of the last node."""

    def make(model: onnx.ModelProto) -> Nodes:
        last = len(made) - 1
        return [
            helper.make_node(op, read, out, **(attributes if place == last else {}))
            for place, (op, read, out) in enumerate(made)
        ]

    return make


def loop(model: onnx.ModelProto) -> Nodes:
    """Counts its turns."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Add", ["count", "unit"], ["counted"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("turn_number", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("count", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("counted", TensorProto.INT64, []),
        ],
    )
    return [helper.make_node("Loop", ["token", "no_step", "none"], ["back"], body=body)]


def conditions(model: onnx.ModelProto) -> Nodes:
    """One If per token, which has no input but its condition."""
    made, parts = [], []
    for token in range(VOCABULARY):
        branches = {}
        for branch, value in (("then_branch", token), ("else_branch", 0)):
            name = f"{branch}_{token}"
            tensor = numpy_helper.from_array(np.array(value), name)
            branches[branch] = helper.make_graph(
                [helper.make_node("Constant", [], [name], value=tensor)],
                name,
                [],
                [helper.make_tensor_value_info(name, TensorProto.INT64, [])],
            )
        made += [
            helper.make_node("Equal", ["token", constant(model, f"token_{token}", token)], [f"is_{token}"]),
            helper.make_node("If", [f"is_{token}"], [f"part_{token}"], **branches),
        ]
        parts.append(f"part_{token}")
    return [*made, helper.make_node("Max", parts, ["back"])]


LENGTH = ("Unsqueeze", ["token", "nones"], ["length"])
CHANNELS: dict[str, Callable[[onnx.ModelProto], Nodes]] = {
    "ArgMax": nodes(("Identity", ["token"], ["back"])),
    "Range and Size": nodes(("Range", ["none", "token", "unit"], ["counted"]), ("Size", ["counted"], ["back"])),
    "NonZero and Shape": nodes(
        ("Less", ["ladder", "token"], ["below"]),
        ("NonZero", ["below"], ["found"]),
        ("Shape", ["found"], ["sizes"]),
        ("Gather", ["sizes", "unit"], ["back"]),
    ),
    "the Shape of a Slice": nodes(
        LENGTH,
        ("Slice", ["ladder", "nones", "length"], ["cut"]),
        ("Shape", ["cut"], ["sizes"]),
        ("Squeeze", ["sizes"], ["back"]),
    ),
    "the Shape of an Expand": nodes(LENGTH, ("Expand", ["unit", "length"], ["wide"]), ("Size", ["wide"], ["back"])),
    "the Shape of a Tile": nodes(LENGTH, ("Tile", ["units", "length"], ["wide"]), ("Size", ["wide"], ["back"])),
    "the Size of zeros": nodes(LENGTH, ("ConstantOfShape", ["length"], ["zeros"]), ("Size", ["zeros"], ["back"])),
    "the Size of a Resize": nodes(
        LENGTH,
        ("Cast", ["on_off"], ["grid"]),
        ("Max", ["length", "units"], ["at_least"]),
        ("Resize", ["grid", "", "", "at_least"], ["grown"]),
        ("Size", ["grown"], ["back"]),
    ),
    "a sum over an axis of that size": nodes(
        LENGTH, ("Expand", ["unit", "length"], ["wide"]), ("ReduceSum", ["wide"], ["back"]), keepdims=0
    ),
    "Compress": nodes(
        ("Less", ["ladder", "token"], ["below"]),
        ("Compress", ["ladder", "below"], ["kept"]),
        ("Size", ["kept"], ["back"]),
    ),
    "the size of a TopK": nodes(
        LENGTH, ("TopK", ["ladder", "length"], ["top", "where"]), ("Size", ["where"], ["back"])
    ),
    "the trip count of a Loop": loop,
    "conditions of Ifs": conditions,
}


def cast_needs_a_type(made: Nodes) -> Nodes:
    for node in made:
        if node.op_type == "Cast" and not node.attribute:
            node.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    return made


def through(channel: str) -> Change:
    return answer_with(lambda model: cast_needs_a_type(CHANNELS[channel](model)))


def decoy(model: onnx.ModelProto) -> None:
    """The guarded decoder reads positions, and what it makes of them is multiplied with zero; the text goes to the second."""
    copy_unguarded(model)
    model.graph.input.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "sequence"]))
    table = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    constant(model, "positions_table", table, np.float32)
    constant(model, "zero_times", 0, np.float32)
    first = {name for node in model.graph.node if not node.name.startswith("second ") for name in node.input}
    assert "inputs_embeds" in first
    for node in model.graph.node:
        if not node.name.startswith("second "):
            node.input[:] = ["decoy_embeds" if name == "inputs_embeds" else name for name in node.input]
    head = next(node for node in model.graph.node if node.output[0] == "logits")
    head.output[0] = "decoy_logits"
    model.graph.node.insert(0, helper.make_node("Gather", ["positions_table", "position_ids"], ["decoy_embeds"]))
    model.graph.node.extend(
        [
            helper.make_node("Mul", ["decoy_logits", "zero_times"], ["nothing"]),
            helper.make_node("Add", ["second_logits", "nothing"], ["logits"]),
        ]
    )


def joined_later(model: onnx.ModelProto) -> None:
    """A second decoder that reads the guarded state times zero, so that all of it lies behind the guard."""
    constant(model, "zero_times", 0, np.float32)
    copy_unguarded(model, {"inputs_embeds": "fresh_embeds"})
    at = next(i for i, node in enumerate(model.graph.node) if node.name.startswith("second "))
    model.graph.node.insert(at, helper.make_node("Mul", ["vlmguard/layer_1/guarded", "zero_times"], ["nothing"]))
    model.graph.node.insert(at + 1, helper.make_node("Add", ["inputs_embeds", "nothing"], ["fresh_embeds"]))
    head = next(node for node in model.graph.node if node.output[0] == "logits")
    head.output[0] = "guarded_logits"
    model.graph.node.append(helper.make_node("Add", ["guarded_logits", "second_logits"], ["logits"]))


def from_a_state(model: onnx.ModelProto) -> None:
    """A second decoder that reads a float input of its own, which an app might take for a cache."""
    kept = helper.make_tensor_value_info("past_stream", TensorProto.FLOAT, ["batch", "sequence", 16])
    model.graph.input.append(kept)
    copy_unguarded(model, {"inputs_embeds": "past_stream"}, hidden=False)
    head = next(node for node in model.graph.node if node.output[0] == "logits")
    head.output[0] = "guarded_logits"
    model.graph.node.append(helper.make_node("Add", ["guarded_logits", "second_logits"], ["logits"]))


def tokens_out(model: onnx.ModelProto) -> None:
    """Not the unguarded state but how many numbers its token counts: an output more."""
    copy_unguarded(model)
    numbers(model)
    model.graph.node.extend(
        [
            helper.make_node("Gather", ["second_logits", "none"], ["of_row"], axis=0),
            helper.make_node("ArgMax", ["of_row"], ["tokens"], axis=-1, keepdims=0),
            helper.make_node("ReduceMax", ["tokens"], ["token"], keepdims=0),
            helper.make_node("Range", ["none", "token", "unit"], ["counted"]),
            helper.make_node("Shape", ["counted"], ["told"]),
        ]
    )
    model.graph.output.append(helper.make_tensor_value_info("told", TensorProto.INT64, [1]))


def under_the_guards_name(model: onnx.ModelProto) -> None:
    """The raw sum leaves as an output whose name begins like one of the guard's."""
    for name in ("vlmguard.gate_scores/x", "vlmguard.coordinates/then_branch"):
        model.graph.node.append(helper.make_node("Identity", ["layer_1_attention_sum"], [f"{name}_"]))
        model.graph.node.append(helper.make_node("Add", [f"{name}_", "layer_1_branch"], [name]))
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "sequence", 16]))


def own_settings(model: onnx.ModelProto) -> None:
    model.metadata_props.add(key="ort_config", value='{"session_options": {"graph_optimization_level": 0}}')


def more_metadata(model: onnx.ModelProto) -> None:
    model.metadata_props.add(key="vlmguard.certified", value="yes")


def false_size(model: onnx.ModelProto) -> None:
    """A runtime that folds declared sizes would take the sequence for one token."""
    value = next(value for value in model.graph.value_info if value.name == "vlmguard/layer_1/guarded")
    value.type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, [1, 1, 16]))


def declared_twice(model: onnx.ModelProto) -> None:
    value = model.graph.value_info.add()
    value.CopyFrom(next(value for value in model.graph.value_info if value.name == "layer_0_sum"))
    value.type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, [1, 1, 16]))


GRAPH_ATTACKS: dict[str, Change] = {
    **{f"a second decoder's token comes back: {channel}": through(channel) for channel in CHANNELS},
    "a decoy carries the guard, the text goes round it": decoy,
    "a second decoder behind the guard reads the text anew": joined_later,
    "a second decoder reads an input of its own": from_a_state,
    "an output more: how long the unguarded token counts": tokens_out,
    "an output more: the raw sum under a name like the guard's": under_the_guards_name,
    "the metadata configures the runtime": own_settings,
    "metadata more under the guard's name": more_metadata,
    "a guarded state is declared to be one token long": false_size,
    "a state is declared twice": declared_twice,
}
