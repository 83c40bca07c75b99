"""Turns the traced graph into a file that people can run, read and publish: `tidy` renames, names dimensions, and strips.

1. inputs and outputs get the names the onnx-community layout uses, and images come in as float32
2. dimensions get words for torch's symbols: `batch_size`, not `s43`
3. norms read and scale in one type, and indices are int64, as onnxruntime requires
4. nodes, values and weights are named after their module: `model.language_model.layers.0.mlp.down_proj.MatMul`
5. traces of the exporting machine are removed: stack traces, torch's metadata, doc strings
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version

import numpy as np
import onnx_ir as ir

from ...graphs.errors import ModelUnreadable

Shapes = Mapping[str, tuple[str | int, ...]]

_SYMBOL = re.compile(r"[A-Za-z_]\w*")
_NAME_SCOPES = "pkg.torch.onnx.name_scopes"


def tidy(
    model: ir.Model,
    inputs: Shapes,
    outputs: Shapes,
    *,
    sums: Mapping[str, str],
    float32_inputs: Iterable[str] = (),
    state_names: Mapping[str, str] | None = None,
) -> None:
    """Give the traced graph its final form, in place: exactly the given inputs and outputs, in this order.

    Args:
        model: a graph of `OnnxExporter`.
        inputs, outputs: name -> shape.
        sums: names of dimensions that are sums of others.
        float32_inputs: inputs that stay float32 in every precision.
        state_names: name of a state in the trace -> name in the file.
    """
    rename_inputs_and_outputs(model.graph, state_names or {})
    require_signature(model.graph, inputs, outputs)
    for name in float32_inputs:
        accept_float32(model.graph, name)
    name_dimensions(model.graph, inputs, outputs, sums)
    read_as_scaled(model.graph)
    index_with_int64(model.graph)
    name_after_modules(model.graph)
    strip_traces(model)
    model.producer_name, model.producer_version = "vlmguard", version("vlmguard")
    model.graph.name = "main_graph"


# 1. inputs and outputs


def rename_inputs_and_outputs(graph: ir.Graph, names: Mapping[str, str]) -> None:
    """Give the state the layout's names: `input.` or `output.` and what the trace calls it -> name. All others keep theirs."""
    for values, side in ((graph.inputs, "input."), (graph.outputs, "output.")):
        for value in values:
            traced = (value.name or "").removeprefix(side)
            value.name = names.get(f"{side}{traced}", value.name)


def require_signature(graph: ir.Graph, inputs: Shapes, outputs: Shapes) -> None:
    """Refuse a graph without some inputs, which the tracer finds unused, or of fixed lengths, which it finds constant.

    An output that is promised in one length may be traced as an expression of its inputs' lengths.

    Raises:
        ModelUnreadable: names what is traced otherwise than it is.
    """
    for kind, values, promised in (("inputs", graph.inputs, inputs), ("outputs", graph.outputs, outputs)):
        names = [value.name for value in values]
        if names != list(promised):
            raise ModelUnreadable(f"traced {kind} {names}, the model has {list(promised)}")
        for value, shape in zip(values, promised.values(), strict=True):
            traced = list(value.shape or ())
            as_promised = len(traced) == len(shape) and all(
                dim == named if isinstance(dim, int) else isinstance(named, str) or kind == "outputs"
                for dim, named in zip(traced, shape, strict=True)
            )
            if not as_promised:
                raise ModelUnreadable(f"traced {value.name} as {value.shape}, the model has {shape}")


def accept_float32(graph: ir.Graph, name: str) -> None:
    """Let callers give float32 where the trace takes the weights' type: the exporter casts every sample to that."""
    given = next(value for value in graph.inputs if value.name == name)
    if given.dtype == ir.DataType.FLOAT:
        return
    cast = ir.node("Cast", [given], {"to": given.dtype})
    cast.outputs[0].type, cast.outputs[0].shape = given.type, given.shape
    given.replace_all_uses_with(cast.outputs[0])
    cast.replace_input_with(0, given)
    given.type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(graph[0], cast)


# 2. dimensions


def name_dimensions(graph: ir.Graph, inputs: Shapes, outputs: Shapes, sums: Mapping[str, str]) -> None:
    """Replace torch's symbols by words, in the signature and in every inferred shape.

    Args:
        graph: the traced graph.
        inputs, outputs: name -> shape with the words.
        sums: names of dimensions that are sums of others.
    """
    words = {
        str(traced.value): named
        for value in graph.inputs
        for traced, named in zip(value.shape or (), inputs[value.name or ""], strict=True)
        if isinstance(traced, ir.SymbolicDim) and isinstance(named, str)
    }
    for value in _all_values(graph):
        if value.shape is not None:
            value.shape = ir.Shape([_in_words(dim, words, sums) for dim in value.shape])
    for values, promised in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value in values:
            value.shape = ir.Shape(promised[value.name or ""])


def _in_words(dim: int | ir.SymbolicDim, words: Mapping[str, str], sums: Mapping[str, str]) -> int | str | None:
    """`s16 + s29` -> `past_sequence_length + sequence_length` -> `total_sequence_length`; unknown symbols -> None."""
    if isinstance(dim, int):
        return dim
    symbols = _SYMBOL.findall(dim.value or "")
    if not symbols or any(symbol not in words for symbol in symbols):
        return None  # no information, or a second name for a dimension with a word
    spoken = _SYMBOL.sub(lambda symbol: words[symbol[0]], dim.value or "")
    return sums.get(" + ".join(sorted(spoken.split(" + "))), spoken)


# 3. norms


def read_as_scaled(graph: ir.Graph) -> None:
    """Let each RMSNormalization read what it normalizes in its scale's type.

    Families like Gemma 3 normalize float16 states in float32 and scale them there. ONNX has one operator for that, with two
    types; onnxruntime 1.31 expands it to a Mul of both and refuses to load it ("bound to different types").
    """
    for node in list(graph):
        if node.op_type != "RMSNormalization" or node.domain:
            continue
        states, scale = node.inputs
        if states is None or scale is None or states.dtype == scale.dtype:
            continue
        assert scale.dtype is not None
        cast = ir.node("Cast", [states], {"to": scale.dtype}, metadata_props=dict(node.metadata_props))
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(scale.dtype), states.shape
        node.replace_input_with(0, cast.outputs[0])
        graph.insert_before(node, cast)


def index_with_int64(graph: ir.Graph) -> None:
    """Cast the indices of GatherND and ScatterND, which torch's exporter leaves in the model's own type, int32 for instance."""
    for node in list(graph):
        if node.op_type not in ("GatherND", "ScatterND"):
            continue
        indices = node.inputs[1]
        if indices is not None and indices.dtype not in (None, ir.DataType.INT64):
            cast = ir.node("Cast", [indices], {"to": ir.DataType.INT64})
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.INT64), indices.shape
            node.replace_input_with(1, cast.outputs[0])
            graph.insert_before(node, cast)


# 4. names


def name_after_modules(graph: ir.Graph) -> None:
    """Name nodes by module and operator, their outputs like the node, and constants by what reads them.

    torch numbers all of them through (`node_linear_3`, `val_73`), which does not show their module.
    """
    kept = [*graph.inputs, *graph.outputs, *(w for w in graph.initializers.values() if "." in (w.name or ""))]
    taken = {value.name or "" for value in kept}
    keep = {id(value) for value in kept}
    for node in graph.all_nodes():
        scope = _module_of(node)
        node.name = _free(f"{scope}.{node.op_type}" if scope else node.op_type, taken)
        for index, output in enumerate(node.outputs):
            if id(output) not in keep and output.name:
                # The node's own name was just taken; values are another namespace, but one name for both reads best.
                output.name = node.name if index == 0 else _free(f"{node.name}.{index}", taken)
    for weight in list(graph.initializers.values()):
        if id(weight) not in keep:
            weight.name = _free(_name_of_constant(weight), taken)


def _module_of(node: ir.Node) -> str:
    """The path of the module the node was traced in, as in the checkpoint's tensor names; empty if in none."""
    scopes = ast.literal_eval(node.metadata_props.get(_NAME_SCOPES, "[]"))
    module = scopes[-2] if len(scopes) > 1 else ""
    return "" if module.startswith("_") else module  # torch's word for "none" begins with an underscore


def _name_of_constant(weight: ir.Value) -> str:
    """A projection's weight is stored transposed, as MatMul reads it; anything else is a number of the trace."""
    reader = next((use.node for use in weight.uses()), None)
    tensor = weight.const_value
    if reader is not None and reader.op_type == "MatMul" and tensor is not None and len(tensor.shape) == 2:
        return f"{(reader.name or '').removesuffix('.MatMul')}.weight.T"
    return "constant"


def _free(name: str, taken: set[str]) -> str:
    """`name`, or the first of name_1, name_2, ... that nothing has; takes it."""
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


# 5. traces


def strip_traces(model: ir.Model) -> None:
    """Remove every note about how the graph was made: it names folders and library versions of one machine."""
    assert not model.functions, "the tracer inlines its functions"
    model.doc_string = None
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.doc_string = None
        graph.metadata_props.clear()
        for node in graph:
            node.doc_string = None
            node.metadata_props.clear()
        for value in _all_values(graph):
            value.doc_string = None
            value.metadata_props.clear()
            if value.const_value is not None:
                value.const_value.doc_string = None


def weight_bytes(model: ir.Model) -> int:
    """Size of the file, except for a few bytes per node."""
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    return int(np.sum([tensor.nbytes for tensor in tensors if tensor is not None], dtype=np.int64))


def _all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    produced: Iterable[ir.Value] = (output for node in graph.all_nodes() for output in node.outputs)
    yield from graph.inputs
    yield from graph.initializers.values()
    yield from produced
