"""The builder: everything under one prefix, in the dtype that was asked for, placed where it was asked for."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hand_graphs import text_model

from vlmguard.graphs.node_builder import PREFIX, NodeBuilder


@pytest.fixture
def graph() -> ir.Graph:
    return text_model("g (float[2] x) => (float[2] y) { a = Neg(x) y = Abs(a) }").graph


def test_names_and_properties_tell_whose_node_it_is(graph: ir.Graph) -> None:
    builder = NodeBuilder(graph, "layer_3", {"why": "because"})
    value = builder.op("sum", "Add", [graph.inputs[0], graph.inputs[0]])
    (node,) = builder.nodes
    assert PREFIX == "vlmguard/"
    assert value.name == node.name == "vlmguard/layer_3/sum"
    assert (node.op_type, node.domain, node.outputs) == ("Add", "", (value,))
    assert node.metadata_props == {"why": "because"}
    assert (value.type, value.shape) == (None, None)
    assert next(iter(graph)).op_type == "Neg" and len(graph) == 2  # written, not yet placed


def test_a_value_may_be_like_another(graph: ir.Graph) -> None:
    builder = NodeBuilder(graph, "s")
    like = builder.op("a", "Neg", [graph.inputs[0]], like=graph.inputs[0])
    assert (like.dtype, str(like.shape)) == (ir.DataType.FLOAT, "[2]")
    unknown = ir.Value(name="unknown", shape=ir.Shape([7]))
    assert builder.op("b", "Neg", [unknown], like=unknown).shape is None


def test_attributes_are_written(graph: ir.Graph) -> None:
    builder = NodeBuilder(graph, "s")
    builder.op("a", "ArgMax", [graph.inputs[0]], axis=1, keepdims=0)
    assert {key: value.as_int() for key, value in builder.nodes[0].attributes.items()} == {"axis": 1, "keepdims": 0}


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", np.float32), ("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16), (None, np.float64)],
)
def test_constants_have_the_dtype_that_was_asked_for(graph: ir.Graph, dtype: str | None, expected: type) -> None:
    builder = NodeBuilder(graph, "s")
    value = builder.constant("k", np.array([[1.0, 0.1]]).T, dtype)
    assert graph.initializers["vlmguard/s/k"] is value
    assert builder.initializers == ["vlmguard/s/k"]
    array = value.const_value.numpy()
    assert array.dtype == expected and array.flags.c_contiguous
    np.testing.assert_array_equal(array, np.array([[1.0], [0.1]]).astype(expected))
    assert (value.dtype, value.shape) == (value.const_value.dtype, value.const_value.shape)


def test_a_constant_is_a_copy(graph: ir.Graph) -> None:
    array = np.ones(2, np.float32)
    value = NodeBuilder(graph, "s").constant("k", array, "float32")
    array[0] = 5
    assert value.const_value.numpy().tolist() == [1.0, 1.0]


def test_lists_of_integers_are_shared_by_the_whole_guard(graph: ir.Graph) -> None:
    first, second = NodeBuilder(graph, "one"), NodeBuilder(graph, "two")
    value = first.integers(0, -1)
    assert second.integers(0, -1) is value
    assert second.integers(0) is not value
    assert (first.initializers, second.initializers) == (["vlmguard/constants/0_-1"], ["vlmguard/constants/0"])
    assert value.dtype == ir.DataType.INT64 and value.const_value.numpy().tolist() == [0, -1]


def test_a_cast_goes_to_the_dtype(graph: ir.Graph) -> None:
    builder = NodeBuilder(graph, "s")
    for dtype, number in (("float32", 1), ("float16", 10), ("bfloat16", 16)):
        builder.cast(dtype, graph.inputs[0], dtype)
        assert builder.nodes[-1].attributes["to"].as_int() == number


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("place_before", ["one", "two", "a", "y"]),
        ("place_after", ["a", "one", "two", "y"]),
        ("place_last", ["a", "y", "one", "two"]),
    ],
)
def test_nodes_are_placed_in_their_order(graph: ir.Graph, place: str, expected: list[str]) -> None:
    builder = NodeBuilder(graph, "s")
    builder.op("two", "Neg", [builder.op("one", "Neg", [graph.inputs[0]])])
    getattr(builder, place)(*([] if place == "place_last" else [next(iter(graph))]))
    assert [str(node.outputs[0].name).rpartition("/")[2] for node in graph] == expected
