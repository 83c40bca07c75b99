"""Families that differ in what their decoder does: the exporter's graph says what torch says, and where each layer ends."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from zoo.families import FUSED, MAKERS, MLLAMA_CROSS_LAYER, NOT_EXPORTED
from zoo.model import ZooModel
from zoo.table import parameter

pytest.importorskip("onnxruntime")
pytest.importorskip("transformers.exporters")

from zoo.oracle import run_graph, stream_values

from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.errors import AnatomyNotFound
from vlmguard.graphs.graph_io import load_graph

Zoo = Callable[[str], ZooModel]


every_family = pytest.mark.parametrize("name", [parameter(name) for name in MAKERS])


def worst_difference(model: ZooModel, feeds: dict[str, np.ndarray], logits: np.ndarray) -> float:
    """Between the graph's logits and torch's, over the positions that hold a token."""
    expected, counted = model.logits(feeds), model.counted(feeds)
    assert logits.shape == expected.shape == (*counted.shape, model.vocabulary)
    assert counted.any()
    return float(np.abs(logits.astype(np.float32) - expected)[counted].max())


@every_family
def test_prefill_and_steps_say_what_torch_says(zoo: Zoo, name: str) -> None:
    model = zoo(name)
    assert model.name == name
    for batch, sequence, pad in [(1, 6, 0), (3, 7, 2), (1, 1, 0), (2, 9, 3)]:
        feeds = model.make_feeds(batch, sequence, pad)
        assert {key: array.dtype for key, array in feeds.items()} == dict(model.inputs)
        outputs = run_graph(model.path, feeds)
        assert worst_difference(model, feeds, outputs["logits"]) < model.tolerance, (batch, sequence, pad)
        # twice, so that a cache that a step has grown is read too
        for _ in range(2 if model.cache else 0):
            feeds = model.next_feeds(feeds, outputs)
            outputs = run_graph(model.path, feeds)
            assert worst_difference(model, feeds, outputs["logits"]) < model.tolerance, (batch, sequence, pad)


@every_family
def test_each_layers_output_is_found(zoo: Zoo, name: str, tmp_path: Path) -> None:
    model = zoo(name)
    if model.refusal:
        with pytest.raises(AnatomyNotFound) as refused:
            dissect(load_graph(model.path), model.layers)
        assert str(refused.value) == model.refusal
        return
    anatomy = dissect(load_graph(model.path), model.layers)
    assert (anatomy.layer_count, anatomy.width, anatomy.dtypes) == (model.layers, model.width, (model.stream_dtype,))
    for site, holding in zip(anatomy.sites, stream_values(model, tmp_path), strict=True):
        assert site.value == next(iter(holding), "")
        assert holding or site.kind == "skip_norm"


# The last thing that a branch goes through before the sum. D is not told by it: there the sums are fewer, see docs/graphs.md.
# C: the Mul of its norm, or the whole norm where onnxruntime has fused it.
BRANCH_ENDS = {"A": {"MatMul", "Gemm", "Reshape", "Add"}, "C": {"Mul", "SimplifiedLayerNormalization"}, "E": {"Mul"}}


@every_family
def test_the_patterns_are_in_the_graph(zoo: Zoo, name: str) -> None:
    """A letter that does not show in the file would be a word only."""
    model = zoo(name)
    graph = onnx.load(model.path, load_external_data=False).graph
    ops = {node.op_type for node in graph.node}
    assert {letter for letter in model.patterns if letter in FUSED.values()} == {FUSED[op] for op in ops & FUSED.keys()}
    if model.refusal or model.patterns[0] in FUSED.values():
        return
    sites = dissect(load_graph(model.path)).sites
    ends = [last_operation(graph, site.branch) for site in sites]
    if model.patterns[0] in BRANCH_ENDS:
        assert set(ends) <= BRANCH_ENDS[model.patterns[0]]
    if "G" in model.patterns:  # what comes after layers 0 and 1 is not what left them
        assert [reads_it_whole(graph, site.value) for site in sites[:-1]] == [False, False, True]
    if "H" in model.patterns:  # the gated layer alone
        assert [end == "Mul" for end in ends] == [number == MLLAMA_CROSS_LAYER for number in range(model.layers)]


def last_operation(graph: onnx.GraphProto, value: str) -> str:
    """What makes a value, up to casts."""
    made_by = {output: node for node in graph.node for output in node.output}
    node = made_by[value]
    while node.op_type in {"Cast", "Identity"}:
        node = made_by[node.input[0]]
    return node.op_type


def reads_it_whole(graph: onnx.GraphProto, value: str) -> bool:
    """Whether a later sum reads this value itself."""
    return any(node.op_type == "Add" and value in node.input for node in graph.node)


def test_injected_pictures_reach_the_answer(zoo: Zoo) -> None:
    """DeepStack: other features, other logits; and layer 0's output, before they are added, stays what it was."""
    model = zoo("qwen3-vl-fp32")
    feeds = model.make_feeds(2, 7, 2)
    other = feeds | {"deepstack_visual_embeds": feeds["deepstack_visual_embeds"] + 1}
    assert np.abs(run_graph(model.path, feeds)["logits"] - run_graph(model.path, other)["logits"]).max() > 0.1
    before, after = model.hidden_states(feeds), model.hidden_states(other)
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1] - after[1]).max() > 0.1


def test_the_picture_of_cross_attention_reaches_the_answer(zoo: Zoo) -> None:
    model = zoo("mllama-fp32")
    feeds = model.make_feeds(2, 7, 2)
    other = {name: array + 1 if array.shape[2:3] == (10,) else array for name, array in feeds.items()}
    assert np.abs(run_graph(model.path, feeds)["logits"] - run_graph(model.path, other)["logits"]).max() > 0.1


@pytest.mark.zoo
@pytest.mark.parametrize("name", NOT_EXPORTED)
def test_what_cannot_run_on_a_cpu_still_cannot(name: str, tmp_path: Path) -> None:
    """If this fails it was repaired: move the row to `MAKERS`."""
    maker, words = NOT_EXPORTED[name]
    model = maker(tmp_path / name)
    with pytest.raises(Exception, match=re.escape(words)):
        run_graph(model.path, model.make_feeds(1, 4))
