"""Graphs of a few kilobytes that once took minutes or all memory to look at: each is dissected, or refused in one line.

No clock is read here. Where a bound is missing, the test does not end.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from exploding_graphs import (
    chain,
    doubling_functions,
    function_chain,
    many_attentions,
    many_lookups,
    many_softmaxes,
    nested_branches,
    parallel_attentions,
    recursive_function,
    woven,
)
from hand_graphs import WIDTH

from vlmguard.graphs.anatomy import DecoderAnatomy, dissect
from vlmguard.graphs.dataflow import Flow
from vlmguard.graphs.errors import AnatomyNotFound, GuardError, ModelUnreadable
from vlmguard.graphs.graph_io import load_graph
from vlmguard.graphs.inlining import DEEPEST_CALLS


def opened(tmp_path: Path, proto: onnx.ModelProto) -> DecoderAnatomy:
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return dissect(load_graph(path))


def refusal(tmp_path: Path, proto: onnx.ModelProto) -> str:
    with pytest.raises(GuardError) as raised:
        opened(tmp_path, proto)
    assert isinstance(raised.value, AnatomyNotFound | ModelUnreadable) and "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(("depth", "nodes"), [(30, "536870927"), (60, "about 10^17"), (18, "131087")])
def test_functions_that_double_are_counted_before_they_are_inlined(tmp_path: Path, depth: int, nodes: str) -> None:
    line = refusal(tmp_path, doubling_functions(depth))
    written = 15 + 2 * depth  # the decoder, a call, one node in the first function and two in each other
    assert line == (
        f"the graph's own functions give {nodes} nodes when they are inlined, from {written} in the file; is it a decoder?"
    )


def test_functions_that_give_some_hundred_nodes_are_inlined(tmp_path: Path) -> None:
    anatomy = opened(tmp_path, doubling_functions(8))
    assert anatomy.layer_count == 2 and anatomy.nodes == 15 + 2**7


def test_functions_that_call_themselves_or_go_too_deep_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, recursive_function()) == (
        "the graph's own functions cannot be inlined (the function 'again' calls itself)"
    )
    assert opened(tmp_path, function_chain(DEEPEST_CALLS)).layer_count == 2
    assert refusal(tmp_path, function_chain(DEEPEST_CALLS + 1)) == (
        f"the graph's own functions are nested more than {DEEPEST_CALLS} deep; is it a decoder?"
    )


def test_the_width_is_looked_for_once_per_value(tmp_path: Path) -> None:
    """40 ** 5 ways lead from the sum to the weight; each value is looked at once for each distance."""
    assert opened(tmp_path, woven(5, 40, scale=True)).width == WIDTH
    assert refusal(tmp_path, woven(6, 40)).startswith("the width of the residual stream is unknown at ")


def test_many_places_where_the_stream_could_begin_are_refused(tmp_path: Path) -> None:
    assert opened(tmp_path, many_lookups(20)).layer_count == 2
    assert refusal(tmp_path, many_lookups(1500)) == (
        "1501 values could be where the stream begins, among 3018; is this a decoder?"
    )


@pytest.mark.parametrize(
    "proto",
    [
        chain(3000),
        chain(1500, "Conv"),
        many_softmaxes(1000),
        nested_branches(7),
        many_attentions(200),
        parallel_attentions(500),
    ],
    ids=["chain", "convolutions", "softmaxes", "branches", "layers", "parallel attentions"],
)
def test_what_is_long_or_wide_costs_what_it_is_long_or_wide(
    tmp_path: Path, proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every value may be visited some times, never once for each other value."""
    visited = 0
    vertex = Flow.vertex

    def counted(self: Flow, value: object) -> object:
        nonlocal visited
        visited += 1
        return vertex(self, value)  # type: ignore[arg-type]

    monkeypatch.setattr(Flow, "vertex", counted)
    try:
        opened(tmp_path, proto)
    except AnatomyNotFound as error:
        assert "\n" not in str(error) and len(str(error)) < 4000
    assert visited < 40 * sum(1 for _ in _nodes(proto.graph)) + 10_000


def _nodes(graph: onnx.GraphProto):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
