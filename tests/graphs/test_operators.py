"""Operators that hide a decoder: unknown ones are named, and so are decoders inside onnxruntime's search nodes."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
from hand_graphs import decoder, text_model

from vlmguard.exporter.opened_decoder import inspect
from vlmguard.graphs.errors import AnatomyNotFound
from vlmguard.graphs.graph_io import graph_bytes
from vlmguard.graphs.operators import hidden_decoder, operator_of, uncertain_layers, unknown_operators


def with_plugin(model: ir.Model, layers: int, domain: str = "trt") -> ir.Model:
    """Attention of the first layers through a plugin: what made its probabilities is an operator of another domain."""
    softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
    for node in softmaxes[:layers]:
        node.op_type, node.domain = "AttentionPlugin", domain
        node.attributes.clear()
    if domain:
        model.graph.opset_imports[domain] = 1
    return model


def refusal(model: ir.Model, folder: Path, config: dict[str, int] | None = None) -> str:
    path = folder / "model.onnx"
    path.write_bytes(graph_bytes(model))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AnatomyNotFound) as caught:
        inspect(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def test_an_unknown_attention_is_named_with_its_domain_and_node(tmp_path: Path) -> None:
    said = refusal(with_plugin(decoder("add", 2), 2), tmp_path)
    assert said.startswith("operator trt::AttentionPlugin is unknown (2 nodes, first 'make layer_0_shares')")
    assert ", and without it no decoder is found (no attention found among " in said
    assert said.endswith(
        " values, so there are no decoder layers); export the model with ONNX or onnxruntime operators, for example with "
        "onnxruntime-genai's model builder"
    )


def test_one_in_onnx_own_domain_is_named_without_a_domain(tmp_path: Path) -> None:
    said = refusal(with_plugin(decoder("add", 1), 1, domain=""), tmp_path)
    assert said.startswith("operator AttentionPlugin is unknown (1 node, first 'make layer_0_shares')")


def test_a_layer_count_that_an_unknown_operator_makes_uncertain_is_not_guessed(tmp_path: Path) -> None:
    """One of two attentions is a plugin: structure alone shows one layer, and would number layer 1 as 0."""
    half = with_plugin(decoder("add", 2), 1)
    said = refusal(half, tmp_path)
    assert said.startswith("operator trt::AttentionPlugin is unknown (1 node, first 'make layer_0_shares')")
    assert said.endswith(
        " and may be attention, so that the graph has 1 layer is not certain; put the model's config.json, which has the "
        "number of layers, beside the graph"
    )
    said = refusal(half, tmp_path, {"num_hidden_layers": 2})
    assert (
        "and without it no decoder is found (the config declares 2 layers, the graph's residual stream shows 1 ("
        in said
    )


def test_a_config_that_agrees_makes_an_unknown_operator_harmless(tmp_path: Path) -> None:
    model = decoder("add", 1)
    extra = ir.node("Watermark", [model.graph.outputs[0]], domain="acme", name="mark")
    extra.outputs[0].name, extra.outputs[0].dtype, extra.outputs[0].shape = "mark", ir.DataType.FLOAT, ir.Shape([1])
    model.graph.append(extra)
    model.graph.outputs.append(extra.outputs[0])
    model.graph.opset_imports["acme"] = 1
    assert [operator_of(node) for node in unknown_operators(model)] == ["acme::Watermark"]
    (tmp_path / "model.onnx").write_bytes(graph_bytes(model))
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 1}')
    assert inspect(tmp_path / "model.onnx").layer_count == 1


@pytest.mark.parametrize("kind", ["add", "skip_norm", "skip_norm_bias"])
def test_known_operators_are_not_suspected(kind: str) -> None:
    model = decoder(kind, 2)  # type: ignore[arg-type]
    assert unknown_operators(model) == [] and hidden_decoder(model, "anything") is None
    assert uncertain_layers(model, 2) is None


def test_functions_of_the_model_are_known() -> None:
    model = text_model("""
        <ir_version: 9, opset_import: ["" : 18, "local" : 1]>
        g (float[1] x) => (float[1] y) { y = local.Twice(x) }
        <domain: "local", opset_import: ["" : 18]> Twice (a) => (b) { b = Add(a, a) }
    """)
    assert unknown_operators(model) == []
    model.functions.clear()
    assert [operator_of(node) for node in unknown_operators(model)] == ["local::Twice"]


@pytest.mark.parametrize("search", ["BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch"])
def test_a_decoder_inside_a_search_node_is_named_as_such(search: str, tmp_path: Path) -> None:
    """onnxruntime's `convert_generation` makes the decoder an attribute of the node that generates with it."""
    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape(["batch", "sequence"]))
    inner = decoder("add", 1).graph
    node = ir.node(search, [ids], {"decoder": inner}, domain="com.microsoft", name="generate")
    node.outputs[0].name, node.outputs[0].dtype = "sequences", ir.DataType.INT32
    node.outputs[0].shape = ir.Shape(["batch", 1, "length"])
    graph = ir.Graph([ids], [node.outputs[0]], nodes=[node], opset_imports={"": 18, "com.microsoft": 1}, name="g")
    assert refusal(ir.Model(graph, ir_version=9), tmp_path) == (
        f"the decoder is inside node 'generate' (com.microsoft::{search}), which generates whole answers by itself and cannot "
        "be guarded; give the decoder's own graph, as it was before onnxruntime's convert_generation, or export the model with "
        "onnxruntime-genai's model builder"
    )
