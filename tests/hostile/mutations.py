"""Damage to a valid model: what a hostile or broken file may look like, and still parse as a protobuf.

Each mutation takes a `ModelProto` and a random generator and changes the first. The generator is Hypothesis's
(`hostile.strategies`), which shrinks what it finds, or libFuzzer's (`hostile.coverage_guided`). They come in kinds:

    names        renamed, duplicated, empty and very long values and nodes; names with control characters
    edges        dangling inputs, swapped inputs, cycles, nodes without outputs, nodes twice, nodes gone
    types        other dtypes, other shapes, negative and huge dimensions, raw data too short or too long
    bodies       If and Loop around a node, with bodies in bodies; sparse and unknown operators
    external     external-data fields: `..`, absolute paths, devices, negative, huge and overlapping offsets, unknown keys
    model        opset, IR version, metadata, functions, inputs that are initializers, outputs twice
    bytes        bits of the serialised file, or its end cut off
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

T = TypeVar("T")
Mutation = Callable[[onnx.ModelProto, random.Random], None]
ODD_NAMES = (
    "",
    " ",
    "\x1b[31mred\x1b[0m",
    "a" * 5000,
    "../../etc/passwd",
    "[bold]x[/bold]",
    "vlmguard/layer_0/guarded",
    "\u202ename",
)
ODD_PATHS = (
    "../outside",
    "/etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    ".",
    "",
    "a/../../b",
    "\0",
    "x" * 300,
    "//server/share",
    "model.onnx",
)
ODD_NUMBERS = ("-1", "0", "1", "99999999999999999999", "9223372036854775807", "1e3", "", "0x10", "7")
ODD_SIZES = (0, -1, 1, 2**31, 2**62, 3, 17)


def nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those in bodies too."""
    stack = [model.graph]
    while stack:
        graph = stack.pop()
        for node in graph.node:
            yield node
            stack.extend(attribute.g for attribute in node.attribute if attribute.HasField("g"))


def one_of(pick: random.Random, items: Sequence[T]) -> T:
    """Raises IndexError if there is none left, as `random` does and Hypothesis's generator does not."""
    if not items:
        raise IndexError
    return pick.choice(items)


def rename_a_value(model: onnx.ModelProto, pick: random.Random) -> None:
    node = one_of(pick, list(nodes(model)))
    names = node.output if node.output and pick.random() < 0.5 else node.input
    if names:
        names[pick.randrange(len(names))] = pick.choice(ODD_NAMES)


def rename_a_node(model: onnx.ModelProto, pick: random.Random) -> None:
    one_of(pick, list(nodes(model))).name = pick.choice(ODD_NAMES)


def duplicate_a_name(model: onnx.ModelProto, pick: random.Random) -> None:
    one, other = (one_of(pick, list(nodes(model))) for _ in range(2))
    if one.output and other.output:
        one.output[0] = other.output[0]


def dangle(model: onnx.ModelProto, pick: random.Random) -> None:
    node = one_of(pick, list(nodes(model)))
    if node.input:
        node.input[pick.randrange(len(node.input))] = "nobody_makes_this"


def swap_inputs(model: onnx.ModelProto, pick: random.Random) -> None:
    one, other = (one_of(pick, list(nodes(model))) for _ in range(2))
    if one.input and other.input:
        i, j = pick.randrange(len(one.input)), pick.randrange(len(other.input))
        one.input[i], other.input[j] = other.input[j], one.input[i]


def close_a_cycle(model: onnx.ModelProto, pick: random.Random) -> None:
    at = pick.randrange(len(model.graph.node))
    later = pick.randrange(at, len(model.graph.node))
    node, source = model.graph.node[at], model.graph.node[later]
    if node.input and source.output:
        node.input[pick.randrange(len(node.input))] = source.output[0]


def drop_a_node(model: onnx.ModelProto, pick: random.Random) -> None:
    del model.graph.node[pick.randrange(len(model.graph.node))]


def repeat_a_node(model: onnx.ModelProto, pick: random.Random) -> None:
    model.graph.node.append(one_of(pick, list(model.graph.node)))


def shuffle_nodes(model: onnx.ModelProto, pick: random.Random) -> None:
    order = list(model.graph.node)
    pick.shuffle(order)
    del model.graph.node[:]
    model.graph.node.extend(order)


def forget_outputs(model: onnx.ModelProto, pick: random.Random) -> None:
    del one_of(pick, list(nodes(model))).output[:]


def forget_inputs(model: onnx.ModelProto, pick: random.Random) -> None:
    del one_of(pick, list(nodes(model))).input[:]


def another_operator(model: onnx.ModelProto, pick: random.Random) -> None:
    node = one_of(pick, list(nodes(model)))
    node.op_type = pick.choice(
        ("Add", "Identity", "If", "Loop", "Scan", "Constant", "NoSuchOp", "", "MatMul", "StringNormalizer")
    )
    if pick.random() < 0.3:
        node.domain = pick.choice(("com.microsoft", "ai.onnx.ml", "evil", "\x1b[2J"))


def another_dtype(model: onnx.ModelProto, pick: random.Random) -> None:
    if model.graph.initializer:
        one_of(pick, list(model.graph.initializer)).data_type = pick.choice((*range(24), 99, 2**30))


def another_shape(model: onnx.ModelProto, pick: random.Random) -> None:
    if not model.graph.initializer:
        return
    dims = one_of(pick, list(model.graph.initializer)).dims
    kind = pick.random()
    if kind < 0.5 and dims:
        dims[pick.randrange(len(dims))] = pick.choice(ODD_SIZES)
    elif kind < 0.75:
        dims.extend([pick.choice(ODD_SIZES)] * pick.randrange(1, 40))
    else:
        del dims[:]


def cut_or_stretch_data(model: onnx.ModelProto, pick: random.Random) -> None:
    if not model.graph.initializer:
        return
    tensor = one_of(pick, list(model.graph.initializer))
    data = tensor.raw_data
    tensor.raw_data = (
        data[: pick.randrange(len(data) + 1)] if pick.random() < 0.5 else data + b"\0" * pick.randrange(1, 64)
    )
    if pick.random() < 0.3:
        tensor.float_data.extend([float("nan"), float("inf")])


def poison_numbers(model: onnx.ModelProto, pick: random.Random) -> None:
    floats = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.raw_data) >= 4]
    if floats:
        tensor = pick.choice(floats)
        at = 4 * pick.randrange(len(tensor.raw_data) // 4)
        value = pick.choice(
            (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f")
        )  # NaN, infinity, the largest
        tensor.raw_data = tensor.raw_data[:at] + value + tensor.raw_data[at + 4 :]


def another_io_type(model: onnx.ModelProto, pick: random.Random) -> None:
    port = one_of(pick, [*model.graph.input, *model.graph.output])
    kind = pick.random()
    if kind < 0.3:
        port.ClearField("type")
    elif kind < 0.6 and port.type.tensor_type.shape.dim:
        one_of(pick, list(port.type.tensor_type.shape.dim)).dim_value = pick.choice(ODD_SIZES)
    elif kind < 0.8:
        port.type.tensor_type.elem_type = pick.choice((0, 1, 7, 8, 10, 16, 99))
    else:
        port.name = pick.choice(ODD_NAMES)


def wrap_in_bodies(model: onnx.ModelProto, pick: random.Random) -> None:
    """A node behind If or Loop, up to hundreds deep: recursion is a resource."""
    at = pick.randrange(len(model.graph.node))
    inner = onnx.NodeProto()
    inner.CopyFrom(model.graph.node[at])
    outputs = list(inner.output)
    if not outputs:
        return
    for level in range(pick.choice((1, 2, 5, 60, 200))):
        graph = helper.make_graph([inner], f"body_{level}", [], [onnx.ValueInfoProto(name=name) for name in outputs])
        if pick.random() < 0.7:
            inner = helper.make_node(
                "If",
                ["condition"],
                outputs,
                then_branch=graph,
                else_branch=graph if level < 5 else helper.make_graph([], "e", [], []),
            )
        else:
            inner = helper.make_node("Loop", ["", "condition"], outputs, body=graph)
    model.graph.node[at].CopyFrom(inner)


def external_data(model: onnx.ModelProto, pick: random.Random) -> None:
    if not model.graph.initializer:
        return
    tensor = one_of(pick, list(model.graph.initializer))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, values in (
        ("location", ODD_PATHS),
        ("offset", ODD_NUMBERS),
        ("length", ODD_NUMBERS),
        ("checksum", ODD_NUMBERS),
        ("evil", ODD_PATHS),
    ):
        if key == "location" or pick.random() < 0.5:
            tensor.external_data.add(key=key, value=pick.choice(values).replace("\0", "%00"))
    if pick.random() < 0.1:
        tensor.external_data.add(key="location", value="twice")


def another_version(model: onnx.ModelProto, pick: random.Random) -> None:
    kind = pick.random()
    if kind < 0.4:
        for opset in model.opset_import:
            opset.version = pick.choice((0, -1, 1, 7, 13, 99, 2**40))
    elif kind < 0.7:
        model.ir_version = pick.choice((0, -1, 1, 3, 10, 99, 2**40))
    elif kind < 0.85:
        del model.opset_import[:]
    else:
        model.opset_import.add(domain=pick.choice(("", "evil", "com.microsoft")), version=pick.choice((1, 2**33)))


def lie_in_metadata(model: onnx.ModelProto, pick: random.Random) -> None:
    for _ in range(pick.randrange(1, 4)):
        model.metadata_props.add(
            key=pick.choice(("vlmguard.schema", "vlmguard.layers", "", "x" * 3000)),
            value=pick.choice(("vlmguard.guarded/1", "0", *ODD_NAMES)),
        )


def move_ports(model: onnx.ModelProto, pick: random.Random) -> None:
    kind = pick.random()
    if kind < 0.25 and model.graph.initializer:
        model.graph.input.add(name=one_of(pick, list(model.graph.initializer)).name)
    elif kind < 0.5:
        model.graph.output.append(one_of(pick, list(model.graph.output)))
    elif kind < 0.75:
        del model.graph.output[:]
    else:
        del model.graph.input[pick.randrange(len(model.graph.input))]


def add_a_function(model: onnx.ModelProto, pick: random.Random) -> None:
    node = one_of(pick, list(model.graph.node))
    inner = helper.make_node(node.op_type, ["a"], ["b"], domain=node.domain)
    model.functions.append(
        helper.make_function(node.domain or "evil", node.op_type, ["a"], ["b"], [inner], list(model.opset_import))
    )


def empty_the_graph(model: onnx.ModelProto, pick: random.Random) -> None:
    field = pick.choice(("node", "initializer", "input", "output", "value_info"))
    model.graph.ClearField(field)


MUTATIONS: tuple[Mutation, ...] = (
    rename_a_value,
    rename_a_node,
    duplicate_a_name,
    dangle,
    swap_inputs,
    close_a_cycle,
    drop_a_node,
    repeat_a_node,
    shuffle_nodes,
    forget_outputs,
    forget_inputs,
    another_operator,
    another_dtype,
    another_shape,
    cut_or_stretch_data,
    poison_numbers,
    another_io_type,
    wrap_in_bodies,
    external_data,
    another_version,
    lie_in_metadata,
    move_ports,
    add_a_function,
    empty_the_graph,
)
BYTES = "damage_bytes"


def mutated(model: onnx.ModelProto, pick: random.Random) -> tuple[bytes, tuple[str, ...]]:
    """The damaged file and the names of what was done to it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    chosen = [pick.choice(MUTATIONS) for _ in range(pick.choice((1, 1, 1, 2, 3, 6)))]
    done = []
    for mutate in chosen:
        try:
            mutate(copy, pick)
        except (IndexError, ValueError, TypeError, DecodeError):  # nothing left to damage, or protobuf itself refuses
            continue
        done.append(mutate.__name__)
    content = copy.SerializeToString()
    if pick.random() < 0.15:
        content = damaged(content, pick)
        done.append(BYTES)
    return content, tuple(done)


def damaged(content: bytes, pick: random.Random) -> bytes:
    """Some bits of a file changed, or its end cut off."""
    if pick.random() < 0.3:
        return content[: pick.randrange(len(content) + 1)]
    changed = bytearray(content)
    for _ in range(pick.choice((1, 4, 32))):
        if changed:
            changed[pick.randrange(len(changed))] ^= 1 << pick.randrange(8)
    return bytes(changed)
