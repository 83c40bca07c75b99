"""Tiny decoders written by hand, directions for them, and how to run them: what the tests of `graphs/` share.

`decoder` has one attention and one MLP per layer and nothing else, so that what a guard did can be followed in numpy up
to the logits. Odd graphs are written in ONNX's own text (`text_model`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir

from vlmguard.graphs.anatomy import DecoderAnatomy, dissect
from vlmguard.graphs.directions import Directions, LayerDirections
from vlmguard.graphs.dtypes import IR_DTYPES, NUMPY_DTYPES
from vlmguard.graphs.graph_io import graph_bytes
from vlmguard.graphs.layer_count import LayerCount
from vlmguard.graphs.modes import MODES, POSITIONS
from vlmguard.graphs.plan import PROMPT_SUPERVISOR_INPUT, SUPERVISOR_INPUT, GuardPlan
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.rewrite import GuardReport, rewrite
from vlmguard.graphs.spec import GuardSpec

Kind = Literal["add", "skip_norm", "skip_norm_bias"]
KINDS: tuple[Kind, ...] = ("add", "skip_norm", "skip_norm_bias")
WIDTH, VOCABULARY = 16, 5
EPSILON = float(np.float32(1e-5))  # as a file holds it


def text_model(text: str) -> ir.Model:
    """A model in ONNX's textual syntax; without a header it gets one, and declared weights without values are ones."""
    if not text.lstrip().startswith("<"):
        text = '<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>\n' + text
    proto = onnx.parser.parse_model(text)
    for declared in proto.graph.value_info:
        tensor = declared.type.tensor_type
        array = np.ones(
            [size.dim_value for size in tensor.shape.dim], onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        )
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, declared.name))
    return ir.from_proto(proto)


@dataclass
class _Draft:
    """A graph while it is being written."""

    dtype: str
    seed: int
    nodes: list[ir.Node] = field(default_factory=list)
    initializers: list[ir.Value] = field(default_factory=list)

    def node(self, op_type: str, inputs: list[ir.Value], outputs: str | list[str], domain: str = "") -> ir.Value:
        names = [outputs] if isinstance(outputs, str) else outputs
        attributes = {"epsilon": EPSILON} if domain else {"axis": -1} if op_type == "Softmax" else {}
        made = [
            ir.Value(
                name=name,
                type=ir.TensorType(IR_DTYPES[self.dtype]) if name else None,
                shape=ir.Shape(["batch", "sequence", WIDTH]) if name.endswith("sum") else None,
            )
            for name in names
        ]
        self.nodes.append(ir.node(op_type, inputs, attributes, domain=domain, outputs=made, name=f"make {names[0]}"))
        return made[0]

    def weight(self, name: str, array: np.ndarray) -> ir.Value:
        value = initializer(name, array, self.dtype)
        self.initializers.append(value)
        return value

    def random(self, name: str, *shape: int) -> ir.Value:
        random = np.random.default_rng([self.seed, len(self.initializers)])
        return self.weight(name, random.normal(0, shape[0] ** -0.5, shape))

    def gains(self, name: str) -> ir.Value:
        random = np.random.default_rng([self.seed, len(self.initializers)])
        return self.weight(name, random.uniform(0.5, 1.5, WIDTH))


def initializer(name: str, array: np.ndarray, dtype: str) -> ir.Value:
    tensor = ir.Tensor(np.asarray(array).astype(NUMPY_DTYPES.get(dtype, dtype)), name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)


def decoder(
    kind: Kind = "add",
    layers: int = 1,
    dtype: str = "float32",
    mask: bool = True,
    opset: int = 18,
    seed: int = 0,
    hidden: bool = True,
    cache: bool = False,
) -> ir.Model:
    """A decoder that takes `inputs_embeds` and gives `logits` and (the last layer's sum) `hidden`.

    Args:
        kind: `add`: plain Adds, no norms. `skip_norm`: `SkipSimplifiedLayerNormalization`. `skip_norm_bias`:
            `SkipLayerNormalization` with a bias of its own, as in GPT-2 and Phi.
        layers: how many; the sum of layer 1 is called `layer_1_sum`.
        dtype: of everything but the mask.
        mask: whether there is an `attention_mask` input; the attention itself does not look at it.
        opset: of the graph.
        seed: of the weights.
        hidden: whether the last layer's sum is an output; without it a fused last layer has no such value at all.
        cache: whether there is a KV cache `[batch, 1, past, width]`, which grows by the embeddings and is not attended to.
    """
    draft = _Draft(dtype, seed)
    inputs = [_input("inputs_embeds", IR_DTYPES[dtype], ["batch", "sequence", WIDTH])]
    if mask:
        inputs.append(_input("attention_mask", ir.DataType.INT64, ["batch", "total"]))
    write = _plain_layer if kind == "add" else _fused_layer
    stream = normed = inputs[0]
    for number in range(layers):
        last = number == layers - 1
        name = "hidden" if last and hidden else f"layer_{number}_sum"
        stream, normed = write(draft, kind, stream, normed, number, name if hidden or not last else "")
    logits = draft.node("MatMul", [normed, draft.random("lm_head", WIDTH, VOCABULARY)], "logits")
    logits.shape = ir.Shape(["batch", "sequence", VOCABULARY])
    outputs = [logits]
    if hidden:
        stream.shape = ir.Shape(["batch", "sequence", WIDTH])
        outputs.append(stream)
    if cache:
        past = _input("past_key_values.0.key", IR_DTYPES[dtype], ["batch", 1, "past", WIDTH])
        inputs.append(past)
        axes = initializer("cache_axes", np.array([1]), "int64")
        draft.initializers.append(axes)
        present = draft.node("Unsqueeze", [inputs[0], axes], "new_keys")
        present = ir.node("Concat", [past, present], {"axis": 2}, name="make present").outputs[0]
        present.name, present.type = "present.0.key", ir.TensorType(IR_DTYPES[dtype])
        present.shape = ir.Shape(["batch", 1, "total", WIDTH])
        node = present.producer()
        assert node is not None
        draft.nodes.append(node)
        outputs.append(present)
    imports = {"": opset} | ({} if kind == "add" else {"com.microsoft": 1})
    graph = ir.Graph(
        inputs, outputs, nodes=draft.nodes, initializers=draft.initializers, opset_imports=imports, name="hand"
    )
    return ir.Model(graph, ir_version=9)


def merged(kind: Kind = "add", layers: int = 1, other_layers: int | None = None, **options: Any) -> ir.Model:
    """`decoder` twice, in the branches of one `If` on `use_cache_branch`, as optimum merges; the weights are the top's.

    Args:
        kind, layers, options: as for `decoder`, and alike in both branches.
        other_layers: of the else branch, where it is to disagree.
    """
    whole = ir.to_proto(decoder(kind, max(layers, other_layers or 0), **options))
    shared = {value.name for value in (*whole.graph.input, *whole.graph.initializer)}
    branches = {}
    for branch, count in (("then_branch", layers), ("else_branch", other_layers or layers)):
        graph = ir.to_proto(decoder(kind, count, **options)).graph
        for node in graph.node:
            node.name = f"{branch} {node.name}"
            for names in (node.input, node.output):
                names[:] = [name if not name or name in shared else f"{branch}_{name}" for name in names]
        outputs = []
        for output in graph.output:
            outputs.append(onnx.ValueInfoProto())
            outputs[-1].CopyFrom(output)
            outputs[-1].name = f"{branch}_{output.name}"
        known = [
            onnx.helper.make_tensor_value_info(f"{branch}_{value.name}", value.type.tensor_type.elem_type, None)
            for value in graph.value_info
        ]
        branches[branch] = onnx.helper.make_graph(graph.node, branch, [], outputs, value_info=known)
    switch = onnx.helper.make_tensor_value_info("use_cache_branch", onnx.TensorProto.BOOL, [1])
    names = [output.name for output in whole.graph.output]
    node = onnx.helper.make_node("If", [switch.name], names, name="either", **branches)
    graph = onnx.helper.make_graph(
        [node], "merged", [*whole.graph.input, switch], whole.graph.output, whole.graph.initializer
    )
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=whole.opset_import, ir_version=whole.ir_version))


def _input(name: str, dtype: ir.DataType, shape: list[str | int]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _attention(draft: _Draft, number: int, x: ir.Value) -> ir.Value:
    """Softmax attention with neither projections nor a mask."""
    turned = ir.node("Transpose", [x], {"perm": [0, 2, 1]}, name=f"make layer_{number}_keys")
    turned.outputs[0].name, turned.outputs[0].dtype = f"layer_{number}_keys", IR_DTYPES[draft.dtype]
    draft.nodes.append(turned)
    scores = draft.node("MatMul", [x, turned.outputs[0]], f"layer_{number}_scores")
    shares = draft.node("Softmax", [scores], f"layer_{number}_shares")
    return draft.node("MatMul", [shares, x], f"layer_{number}_mixed")


def _plain_layer(
    draft: _Draft, kind: Kind, stream: ir.Value, normed: ir.Value, number: int, name: str
) -> tuple[ir.Value, ir.Value]:
    attended = draft.node("Add", [stream, _attention(draft, number, normed)], f"layer_{number}_attention_sum")
    branch = draft.node("MatMul", [attended, draft.random(f"w{number}", WIDTH, WIDTH)], f"layer_{number}_branch")
    total = draft.node("Add", [attended, branch], name or f"layer_{number}_sum")
    return total, total


def _fused_layer(
    draft: _Draft, kind: Kind, stream: ir.Value, normed: ir.Value, number: int, name: str
) -> tuple[ir.Value, ir.Value]:
    mixed = _attention(draft, number, normed)
    stream, normed = _skip(draft, kind, stream, mixed, f"layer_{number}_attention", f"layer_{number}_attention_sum")
    branch = draft.node("MatMul", [normed, draft.random(f"w{number}", WIDTH, WIDTH)], f"layer_{number}_branch")
    return _skip(draft, kind, stream, branch, f"layer_{number}", name)


def _skip(
    draft: _Draft, kind: Kind, residual: ir.Value, branch: ir.Value, scope: str, total: str
) -> tuple[ir.Value, ir.Value]:
    """`(sum, norm)`; without a name for the sum the node has no output 3, and the "sum" is the norm."""
    operands = [residual, branch, draft.gains(f"{scope}_gain")]
    op_type = "SkipSimplifiedLayerNormalization"
    if kind == "skip_norm_bias":
        op_type = "SkipLayerNormalization"
        operands += [draft.random(f"{scope}_shift", WIDTH), draft.random(f"{scope}_bias", WIDTH)]
    names = [f"{scope}_norm", "", "", total] if total else [f"{scope}_norm"]
    normed = draft.node(op_type, operands, names, domain="com.microsoft")
    return draft.nodes[-1].outputs[-1], normed


# What is wanted of them


def orthonormal(rank: int, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """`[rank, width]` float32."""
    random = np.random.default_rng(seed)
    return np.ascontiguousarray(np.linalg.qr(random.normal(size=(width, rank)))[0].T, dtype=np.float32)


def layer_directions(rank: int = 2, width: int = WIDTH, seed: int = 0, **changes: Any) -> LayerDirections:
    """Everything that the schema has, at random; `changes` replaces parts."""
    random = np.random.default_rng([seed, 1])
    parts = {
        "ssd": orthonormal(rank, width, seed),
        "origin": random.normal(size=rank).astype(np.float32),
        "target": (2 + random.normal(size=rank)).astype(np.float32),
        "readout": (random.normal(size=width) / width**0.5).astype(np.float32),
        "threshold": 0.125,
        "text_threshold": 0.25,
    }
    return LayerDirections(**(parts | changes))


def directions(
    layers: Iterable[int] = (0,),
    rank: int = 2,
    width: int = WIDTH,
    parts: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Directions:
    """Calibrated directions for some layers; `parts` replaces parts of every layer, `changes` fields of `Directions`."""
    made = {number: layer_directions(rank, width, number, **(parts or {})) for number in layers}
    return Directions(width=width, layers=made, **changes)


def uncalibrated(layers: Iterable[int] = (0,), rank: int = 2, width: int = WIDTH, **changes: Any) -> Directions:
    """An SSD alone, as extraction gives it."""
    only = {number: LayerDirections(orthonormal(rank, width, number)) for number in layers}
    return Directions(width=width, layers=only, **changes)


def all_guards() -> Iterator[GuardSpec]:
    """Every mode at every position, and the other lowering."""
    for mode, positions in product(MODES, POSITIONS):
        if possible(mode, positions):
            yield GuardSpec(mode=mode, positions=positions)  # type: ignore[arg-type]
    for positions in ("all", "last"):
        yield GuardSpec(mode="project", positions=positions, lowering="dense")  # type: ignore[arg-type]


def possible(mode: str, positions: str) -> bool:
    """Whether the tests of every mode have it at these positions (`conftest.py`)."""
    return (positions == "prompt") == (mode == "align")


def supervisor_input(mode: str) -> str:
    """The input for the text-only coordinates, where the positions are the mode's own."""
    return PROMPT_SUPERVISOR_INPUT if mode == "align" else SUPERVISOR_INPUT


@dataclass(frozen=True)
class Guarded:
    """A guarded graph with everything that led to it."""

    model: ir.Model
    anatomy: DecoderAnatomy
    plan: GuardPlan
    report: GuardReport


def guard_model(model: ir.Model, found: Directions, spec: GuardSpec, declared: LayerCount | None = None) -> Guarded:
    """The pipeline's three steps; `model` is changed in place. On all layers of the directions, `align` too."""
    if spec.mode == "align" and spec.layers is None:
        spec = replace(spec, layers=tuple(found.layers))
    anatomy = dissect(model, declared)
    plan = plan_guard(model, anatomy, found, spec)
    return Guarded(model, anatomy, plan, rewrite(model, plan))


def copy_of(model: ir.Model) -> ir.Model:
    return ir.from_proto(ir.to_proto(model))


def node_called(model: ir.Model, name: str) -> ir.Node:
    (node,) = (node for node in model.graph if node.name == name)
    return node


def value_called(model: ir.Model, name: str) -> ir.Value:
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    (value,) = (value for value in values if value.name == name)
    return value


# Running them


def run(model: ir.Model, feeds: Mapping[str, np.ndarray], optimize: bool = True) -> dict[str, np.ndarray]:
    """One run on the CPU."""
    from vlmguard.runtime.onnxruntime_runner import OnnxRuntimeRunner

    runner = OnnxRuntimeRunner(graph_bytes(model), Path.cwd(), optimize, ("CPUExecutionProvider",))
    return runner.run(feeds)
