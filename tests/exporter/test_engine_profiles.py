"""Profiles and the layer dump: what is asked of the builder, and how its answer is read. No TensorRT is needed here."""

from __future__ import annotations

import json

import onnx_ir as ir
import pytest

from vlmguard.exporter.engines.layers import layers_from_inspector, layers_from_log, require_guard
from vlmguard.exporter.engines.profile import (
    EngineProfile,
    Span,
    decoder_shapes,
    default_profiles,
    parse_shapes,
    part_shapes,
    require_within,
)
from vlmguard.graphs.errors import GuardError, GuardIncomplete


def graph(**inputs: list[int | str]) -> ir.Graph:
    values = [
        ir.Value(name=name.replace("__", "."), type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        for name, shape in inputs.items()
    ]
    return ir.Graph(values, [], nodes=[], opset_imports={"": 18})


@pytest.mark.parametrize(
    ("text", "span"), [("4", (4, 4, 4)), ("1:8", (1, 1, 8)), ("1:4:8", (1, 4, 8)), ("0", (0, 0, 0))]
)
def test_a_range_is_read(text: str, span: tuple[int, int, int]) -> None:
    assert Span.parse(text) == Span(*span)


@pytest.mark.parametrize("text", ["", "a", "1:2:3:4", "-1", "1.5", "8:4", "1:9:8"])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(GuardError, match="range"):
        Span.parse(text)


def test_a_profile_is_read_and_says_itself() -> None:
    profile = EngineProfile.parse("decode:batch=1:4,sequence=1,past=1:512:4096")
    assert profile == EngineProfile("decode", Span(1, 1, 4), Span(1, 1, 1), Span(1, 512, 4096))
    assert profile.to_json() == {"name": "decode", "batch": "1:1:4", "sequence": "1", "past": "1:512:4096"}


@pytest.mark.parametrize("text", ["decode", ":batch=1", "decode:rows=1", "decode:batch"])
def test_a_profile_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(GuardError, match="profile"):
        EngineProfile.parse(text)


def test_the_shapes_of_every_input_of_a_decoder() -> None:
    profile = EngineProfile("any", Span(1, 2, 4), Span(1, 3, 5), Span(0, 10, 20))
    found = decoder_shapes(
        graph(
            inputs_embeds=["b", "s", 64],
            attention_mask=["b2", "t"],
            position_ids=[3, "b", "s"],
            past_key_values__0__key=["b", "h", "p", "w"],
            vlmguard_supervisor=["vlmguard_batch", 2, 1],
        ),
        profile,
        {},
        heads=(2, 16),
    )
    assert found["inputs_embeds"] == ((1, 1, 64), (2, 3, 64), (4, 5, 64))
    assert found["attention_mask"] == ((1, 1), (2, 13), (4, 25))
    assert found["position_ids"] == ((3, 1, 1), (3, 2, 3), (3, 4, 5))
    assert found["past_key_values.0.key"] == ((1, 2, 0, 16), (2, 2, 10, 16), (4, 2, 20, 16))


def test_embeddings_for_each_layer_and_layers_with_other_heads() -> None:
    """Gemma 4: what the graph says of a layer's heads counts, and the config's where it says nothing."""
    profile = EngineProfile("any", Span(1, 2, 4), Span(1, 3, 5), Span(0, 10, 20))
    found = decoder_shapes(
        graph(
            inputs_embeds=["b", "s", 64],
            per_layer_inputs=["b", "s", 4, 8],
            past_key_values__0__key=["b", "h", "p", 16],
            past_key_values__1__key=["b", 1, "p", 512],
        ),
        profile,
        {},
        heads=(2, 16),
    )
    assert found["per_layer_inputs"] == ((1, 1, 4, 8), (2, 3, 4, 8), (4, 5, 4, 8))
    assert found["past_key_values.0.key"] == ((1, 2, 0, 16), (2, 2, 10, 16), (4, 2, 20, 16))
    assert found["past_key_values.1.key"] == ((1, 1, 0, 512), (2, 1, 10, 512), (4, 1, 20, 512))


def test_a_profile_outside_the_graph_is_refused() -> None:
    with pytest.raises(GuardError, match=r"has size 8 on axis 0, profile any has 1:2:4"):
        decoder_shapes(graph(input_ids=[8, "s"]), EngineProfile("any", Span(1, 2, 4), Span(1, 1, 1), Span(0, 0, 0)), {})


def test_open_sizes_that_nobody_knows_are_asked_for() -> None:
    profiles = default_profiles(128, caches=True)
    with pytest.raises(GuardError, match=r"'pixel_values' has an open size on axis 2 .*--shape pixel_values="):
        part_shapes(graph(pixel_values=["b", 3, "h", "w"]), profiles, {})
    given = parse_shapes(["pixel_values=1x3x8x8:2x3x8x8:4x3x8x8"])
    assert part_shapes(graph(pixel_values=["b", 3, "h", "w"]), profiles, given)["pixel_values"][2] == (4, 3, 8, 8)


@pytest.mark.parametrize("text", ["pixel_values", "a=1x2:3", "a=1x", "=", "a=1x2:1x2"])
def test_a_shape_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(GuardError, match="shape"):
        parse_shapes([text])


def test_default_profiles_end_where_the_model_ends() -> None:
    prefill, decode = default_profiles(256, caches=True)
    assert (prefill.sequence.largest, decode.past.largest, prefill.past.largest) == (256, 255, 0)
    require_within((prefill, decode), 256)
    (only,) = default_profiles(None, caches=False)
    assert only.sequence.largest == 4096


def test_default_profiles_take_two_rows_for_each_prompt_where_rows_are_paired() -> None:
    prefill, decode = default_profiles(256, caches=True, pairs=True)
    assert (prefill.batch, decode.batch) == (Span(1, 2, 8), Span(1, 1, 4))


def test_profiles_that_reach_further_than_the_model_are_refused() -> None:
    with pytest.raises(GuardError, match=r"profile decode reaches 300 tokens, the model's config ends at 256"):
        require_within([EngineProfile("decode", Span(1, 1, 1), Span(1, 1, 1), Span(1, 1, 299))], 256)
    with pytest.raises(GuardError, match="two profiles share a name"):
        require_within([*default_profiles(8, True), *default_profiles(8, True)], None)


LOG = """Name: head_myl1_0, LayerType: shape_call, Inputs: [], Metadata:
Name: __myl_A_myl1_1, LayerType: kgen, Inputs: [], Metadata: [ONNX Layer: add][ONNX Layer: vlmguard/layer_3/guarded]
Name: __myl_A_myl3_0, LayerType: kgen, Inputs: [ { Name: x [profile 1] }], Metadata: [ONNX Layer: add]
Name: __myl_B_myl3_1, LayerType: gemm, Inputs: [], Metadata: [ONNX Layer: vlmguard/layer_3/guarded]"""


def test_layers_are_told_apart_by_profile() -> None:
    layers = layers_from_log(["something else", LOG])
    assert [layer.profile for layer in layers.layers] == [0, 0, 1, 1]
    assert [layers.of_profile(number).kernels for number in (0, 1)] == [1, 2]
    assert layers.guard_nodes() == {3: frozenset({"vlmguard/layer_3/guarded"})}


def test_the_inspectors_json_says_the_same() -> None:
    rows = [
        {"Name": "__myl_A_myl1_1", "LayerType": "kgen", "Metadata": "[ONNX Layer: add]"},
        {"Name": "B [profile 1]", "LayerType": "gemm", "Metadata": "[ONNX Layer: vlmguard/layer_0/guarded]"},
    ]
    layers = layers_from_inspector(json.dumps({"Layers": rows})).layers
    assert [(layer.kind, layer.nodes, layer.profile) for layer in layers] == [
        ("kgen", ("add",), 0),
        ("gemm", ("vlmguard/layer_0/guarded",), 1),
    ]


def test_an_engine_that_does_not_show_its_guard_is_refused() -> None:
    layers = layers_from_log([LOG])
    require_guard(layers, ["vlmguard/layer_3/guarded"], 2, "x")
    for nodes, profiles, why in (
        (["vlmguard/layer_3/c_0"], 1, "1 of 1 guard nodes are not in the engine's profile 0"),
        (["vlmguard/layer_3/guarded"], 3, "profile 2"),
        ([], 1, "has no guard nodes"),
    ):
        with pytest.raises(GuardIncomplete, match=why):
            require_guard(layers, nodes, profiles, "x")
    with pytest.raises(GuardIncomplete, match="showed no layers"):
        require_guard(layers_from_log(["nothing"]), ["vlmguard/layer_3/guarded"], 1, "x")
