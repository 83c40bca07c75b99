"""The residual stream is found by structure: in every graph of the zoo, against torch, and in small odd graphs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hand_graphs import KINDS, Kind, decoder, text_model
from zoo.makers import MAKERS, ZooModel
from zoo.table import SELDOM, parameter

from vlmguard.graphs.anatomy import DecoderAnatomy, dissect, prepare
from vlmguard.graphs.errors import AnatomyNotFound
from vlmguard.graphs.graph_io import load_graph
from vlmguard.graphs.layer_count import LayerCount
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.sites import ResidualSite, find_node
from vlmguard.graphs.taps import STATES_OUTPUT, tap_last_token

Zoo = Callable[[str], ZooModel]
every_model = pytest.mark.parametrize("name", [parameter(name, SELDOM) for name in MAKERS])

FUSED = ("llava-transformers-ort", "llama-genai")
# One of each exporter, quick to make.
QUICK = ("llama-torchscript-fp16", "llava-torchscript-fp32", "llama-genai-fp32", "llama-genai-fp16")


# ------------------------------------------------------------------------------------------------------ the zoo: structure


@every_model
def test_every_layer_of_a_real_export_is_found(zoo: Zoo, name: str) -> None:
    model = zoo(name)
    anatomy = dissect(load_graph(model.path), model.layers)
    assert anatomy.layer_count == model.layers
    assert [site.layer_index for site in anatomy.sites] == list(range(model.layers))
    assert anatomy.width == model.width
    assert anatomy.dtypes == (model.stream_dtype,)
    assert {site.kind for site in anatomy.sites} == {"skip_norm" if name.startswith(FUSED) else "add"}
    assert anatomy.sink == "logits"
    assert anatomy.certainty == "confirmed"
    assert dissect(load_graph(model.path)) == replace(anatomy, certainty="structural")


@every_model
def test_the_values_found_are_those_that_hold_torchs_states(zoo: Zoo, name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from zoo.oracle import stream_values

    model = zoo(name)
    anatomy = dissect(load_graph(model.path), model.layers)
    for site, holding in zip(anatomy.sites, stream_values(model, tmp_path), strict=True):
        # the first of several: a guard behind a Cast of the sum would miss those that read the sum itself
        assert site.value == next(iter(holding), "")
        assert holding or site.kind == "skip_norm"


@every_model
def test_tapped_states_are_torchs(zoo: Zoo, name: str) -> None:
    """All layers at the last real token of each row, from the file through the runtime, rows padded differently."""
    pytest.importorskip("onnxruntime")
    from zoo.oracle import SLACK

    from vlmguard.runtime.decoder import open_decoder

    model = zoo(name)
    package = open_package(model.path)
    graph = package.load_decoder()
    anatomy = dissect(graph, package.expected_layers)
    tap_last_token(graph, anatomy.sites)
    session = open_decoder(package, graph)
    for batch, sequence, pad in ((3, 7, 2), (1, 1, 0), (1, 5, 3)):
        feeds = model.make_feeds(batch, sequence, pad)
        states = session.runner.run(feeds)[STATES_OUTPUT]
        expected = at_last_token(model, feeds)
        assert states.shape == expected.shape == (batch, model.layers, model.width)
        assert states.dtype == np.float32
        assert np.abs(states - expected).max() < SLACK * model.tolerance
        # and no other layer would have passed
        assert np.abs(states[:, 1:] - expected[:, :-1]).max() > 4 * SLACK * model.tolerance


def at_last_token(model: ZooModel, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """`[batch, layers, width]`, from torch."""
    counted = model.counted(feeds)
    last = [int(np.flatnonzero(row)[-1]) for row in counted]
    states = np.stack(model.hidden_states(feeds), axis=1)
    return np.stack([row[:, place] for row, place in zip(states, last, strict=True)])


@pytest.mark.parametrize("name", ["llava-torchscript-fp32", "llama-genai-embeds-fp32"])
def test_tapped_states_are_torchs_on_a_filled_cache(zoo: Zoo, name: str) -> None:
    """The mask then covers more than this call: its last columns count."""
    pytest.importorskip("onnxruntime")
    from zoo.oracle import SLACK, run_graph

    from vlmguard.runtime.decoder import open_decoder

    model = zoo(name)
    package = open_package(model.path)
    graph = package.load_decoder()
    tap_last_token(graph, dissect(graph).sites)
    session = open_decoder(package, graph)
    prefill = model.make_feeds(2, 6, 2 if model.padding == "left" else 0)
    feeds = model.next_feeds(prefill, run_graph(model.path, prefill))
    states = session.runner.run(feeds)[STATES_OUTPUT]
    assert np.abs(states - at_last_token(model, feeds)).max() < SLACK * model.tolerance


# ---------------------------------------------------------------------------------------------- the zoo: names mean nothing


@every_model
def test_names_mean_nothing(zoo: Zoo, name: str) -> None:
    """Every value and node renamed at random, inputs and outputs too: the same structure under other names."""
    path = zoo(name).path
    expected = dissect(load_graph(path))
    # weights stay where they are: nothing in the anatomy reads them, but for their shape and dtype
    proto = onnx.load(path, load_external_data=False)
    renamed = rename_at_random(proto.graph, random.Random(name))
    found = dissect(ir.from_proto(proto))
    assert found == under_other_names(expected, renamed)
    assert found.sites != expected.sites


def rename_at_random(graph: onnx.GraphProto, chance: random.Random) -> dict[str, str]:
    """Names of values are shuffled among the values, so that they lie; nodes get none at all."""
    values = list(graph.input) + list(graph.initializer)
    names = [value.name for value in values] + [name for node in graph.node for name in node.output if name]
    names = list(dict.fromkeys(names))
    renamed = dict(zip(names, chance.sample(names, len(names)), strict=True))
    _apply(graph, renamed)
    return renamed


def _apply(graph: onnx.GraphProto, renamed: dict[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.name = renamed.get(value.name, value.name)
    for node in graph.node:
        node.name = ""
        node.ClearField("metadata_props")
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _apply(attribute.g, renamed)


def under_other_names(anatomy: DecoderAnatomy, renamed: dict[str, str]) -> DecoderAnatomy:
    def moved(site: ResidualSite) -> ResidualSite:
        names = {key: renamed.get(getattr(site, key), "") for key in ("anchor", "value", "residual", "branch")}
        return replace(site, **names)

    (stream,) = anatomy.streams
    sites = tuple(moved(site) for site in stream.sites)
    moved_stream = replace(stream, sites=sites, source=renamed[stream.source], sink=renamed[stream.sink])
    return replace(anatomy, streams=(moved_stream,))


@pytest.mark.parametrize("name", QUICK)
def test_the_order_of_the_nodes_means_nothing(zoo: Zoo, name: str) -> None:
    """Any topological order will do; only which summand is called the residual may depend on it."""

    def sums(anatomy: DecoderAnatomy) -> list[tuple[str, str, set[str]]]:
        return [(site.anchor, site.value, {site.residual, site.branch}) for site in anatomy.sites]

    proto = onnx.load(zoo(name).path, load_external_data=False)
    expected = sums(dissect(ir.from_proto(proto)))
    chance, before = random.Random(name), [node.output[0] for node in proto.graph.node]
    for _ in range(3):
        reorder(proto.graph, chance)
        assert [node.output[0] for node in proto.graph.node] != before
        assert sums(dissect(ir.from_proto(proto))) == expected


def reorder(graph: onnx.GraphProto, chance: random.Random) -> None:
    """Another topological order, at random."""
    waiting, known = list(graph.node), {value.name for value in (*graph.input, *graph.initializer)} | {""}
    ordered: list[onnx.NodeProto] = []
    while waiting:
        chance.shuffle(waiting)
        ready = [node for node in waiting if known.issuperset(node.input)][:4]
        ordered += ready
        known.update(name for node in ready for name in node.output)
        waiting = [node for node in waiting if not any(node is taken for taken in ready)]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:]
    graph.node.extend(copies)


# ------------------------------------------------------------------------------------------- the zoo: another layer count


@pytest.mark.parametrize("said", [3, 5])
def test_another_layer_count_in_the_config_is_refused(zoo: Zoo, said: int) -> None:
    graph = load_graph(zoo("llama-torchscript-fp32").path)
    sites = dissect(graph).sites
    with pytest.raises(AnatomyNotFound) as refusal:
        dissect(graph, expected_layers=said)
    assert str(refusal.value) == (
        f"the config declares {said} layers, the graph's residual stream shows 4 ({sites[0].value} to {sites[3].value}); "
        "check that config.json belongs to this graph, and that no layer was left out of it"
    )


def test_the_refusal_names_a_hidden_sum_by_its_node(zoo: Zoo) -> None:
    graph = load_graph(zoo("llama-genai-fp32").path)
    sites = dissect(graph).sites
    assert sites[3].value == ""
    with pytest.raises(AnatomyNotFound) as refusal:
        dissect(graph, expected_layers=1)
    assert f"shows 4 ({sites[0].value} to {sites[3].anchor});" in str(refusal.value)


# ------------------------------------------------------------------------------------------------------------- hand graphs


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hand_made_decoder(kind: Kind, dtype: str) -> None:
    anatomy = dissect(decoder(kind, layers=3, dtype=dtype), 3)
    expected_kind, anchor = ("add", "sum") if kind == "add" else ("skip_norm", "norm")
    assert anatomy.sites[1] == ResidualSite(
        layer_index=1,
        kind=expected_kind,
        anchor=f"layer_1_{anchor}",
        value="layer_1_sum",
        residual="layer_1_attention_sum",
        branch="layer_1_branch",
        dtype=dtype,
    )
    assert [site.value for site in anatomy.sites] == ["layer_0_sum", "layer_1_sum", "hidden"]
    assert (anatomy.source, anatomy.sink, anatomy.width) == ("inputs_embeds", "logits", 16)
    assert anatomy.nodes == len(decoder(kind, layers=3, dtype=dtype).graph)


def test_the_anatomy_is_plain_data() -> None:
    anatomy = dissect(decoder("skip_norm", layers=2, hidden=False))
    shown = anatomy.to_json()
    assert shown["layers"] == 2 and shown["width"] == 16 and shown["certainty"] == "structural"
    assert shown["sites"] == [asdict(site) for site in anatomy.sites]
    assert shown["sites"][1]["value"] == ""


# Sums, in the text graphs below, are called by what they are. `x` is the stream, `m` a mask, 8 the width.
ATTENTION = """
    {to}_t = Transpose <perm = [0, 2, 1]> ({of})
    {to}_s = MatMul({of}, {to}_t)
    {to}_p = Softmax <axis = -1> ({to}_s)
    {to} = MatMul({to}_p, {of})
"""
WEIGHTS = "<float[8, 8] w, float[8] g, float scale = {2.0}>"


def attention(to: str, of: str) -> str:
    return ATTENTION.format(to=to, of=of)


def stream(body: str, outputs: str = "float[B, S, 8] y", inputs: str = "float[B, S, 8] x") -> ir.Model:
    return text_model(f"g ({inputs}) => ({outputs}) {WEIGHTS} {{ {body} }}")


def site_values(model: ir.Model, expected_layers: int | None = None) -> list[str]:
    return [site.value or f"in {site.anchor}" for site in dissect(model, expected_layers).sites]


def layer_by_layer(layer: Callable[[int, str], str], layers: int = 2, after: str = "") -> ir.Model:
    """`layer(number, stream so far)` writes a layer whose output is `h<number>`."""
    body = "".join(layer(number, f"h{number - 1}" if number else "x") for number in range(layers))
    return stream(f"{body} {after} y = Identity(h{layers - 1})")


def sandwich(number: int, x: str) -> str:  # C: Gemma, a norm between projection and sum
    n = f"{number}"
    return (
        attention(f"a{n}", x)
        + f"an{n} = Mul(a{n}, g) s{n} = Add({x}, an{n}) m{n} = MatMul(s{n}, w) mn{n} = Mul(m{n}, g) h{n} = Add(s{n}, mn{n})"
    )


def summed_first(number: int, x: str) -> str:  # D: Phi, Cohere, attention and MLP are summed before they join
    n = f"{number}"
    return attention(f"a{n}", x) + f"m{n} = MatMul({x}, w) both{n} = Add(a{n}, m{n}) h{n} = Add(both{n}, {x})"


def in_parallel(number: int, x: str) -> str:  # D: GPT-NeoX
    n = f"{number}"
    return attention(f"a{n}", x) + f"s{n} = Add({x}, a{n}) m{n} = MatMul({x}, w) h{n} = Add(m{n}, s{n})"


def scaled(number: int, x: str) -> str:  # E: Granite
    n = f"{number}"
    return (
        attention(f"a{n}", x)
        + f"as{n} = Mul(a{n}, scale) s{n} = Add({x}, as{n}) m{n} = MatMul(s{n}, w) ms{n} = Mul(m{n}, scale) "
        + f"h{n} = Add(s{n}, ms{n}) "
    )


def biased(number: int, x: str) -> str:
    """An Add of a weight joins nothing: neither the one before the sum nor one after it."""
    n = f"{number}"
    return attention(f"a{n}", x) + f"ab{n} = Add(a{n}, g) h{n} = Add({x}, ab{n}) "


def three_at_once(number: int, x: str) -> str:
    n = f"{number}"
    return attention(f"a{n}", x) + f"m{n} = MatMul({x}, w) h{n} = Sum({x}, a{n}, m{n})"


def recurrent(number: int, x: str) -> str:  # I: linear attention in one of the layers
    if number == 0:
        return f"a0 = com.microsoft.LinearAttention({x}) h0 = Add({x}, a0) "
    return biased(number, x)


def routed(number: int, x: str) -> str:
    """A mixture of experts: the router's Softmax is no attention, and its weighted sum no layer of its own."""
    n = f"{number}"
    return attention(f"a{n}", x) + (
        f"s{n} = Add({x}, a{n}) r{n} = MatMul(s{n}, w) rp{n} = Softmax <axis = -1> (r{n}) e{n} = MatMul(s{n}, w) "
        f"re{n} = Mul(rp{n}, e{n}) h{n} = Add(s{n}, re{n}) "
    )


@pytest.mark.parametrize(
    "layer", [sandwich, summed_first, in_parallel, scaled, biased, three_at_once, recurrent, routed]
)
def test_a_layers_output_is_its_last_join(layer: Callable[[int, str], str]) -> None:
    assert site_values(layer_by_layer(layer, layers=3), 3) == ["h0", "h1", "h2"]


def test_a_bias_after_the_last_sum_is_not_part_of_the_stream() -> None:
    assert site_values(layer_by_layer(sandwich, after="after = Add(h1, g) ")) == ["h0", "h1"]
    model = stream(sandwich(0, "x") + "after = Add(h0, g) y = Identity(after)")
    assert site_values(model) == ["h0"]


def test_a_fused_sum_may_have_a_constant_part() -> None:
    """Which summand is called the residual does not matter then; the sum is found all the same."""
    fused = "n, mean, deviation, s = com.microsoft.SkipSimplifiedLayerNormalization(PARTS, g) y = Identity(n)"
    for parts in (("h", "w"), ("w", "h")):
        body = attention("a", "x") + "h = Add(x, a) " + fused.replace("PARTS", ", ".join(parts))
        (site,) = dissect(stream(body)).sites
        assert (site.value, site.residual, site.branch) == ("s", *parts)


def test_what_is_added_between_layers_is_no_layers_output() -> None:  # G: Qwen3-VL's DeepStack
    body = sandwich(0, "x") + "deep = Add(h0, picture) " + sandwich(1, "deep") + "y = Identity(h1)"
    model = stream(body, inputs="float[B, S, 8] x, float[B, S, 8] picture")
    # torch's hooks see `h0` too, and the next layer reads what was added to it
    assert site_values(model) == ["h0", "h1"]


def test_the_source_that_gives_most_layers_wins() -> None:
    """A picture joins half-way: from it only one layer can be seen."""
    body = sandwich(0, "x") + "joined = Add(h0, picture) " + sandwich(1, "joined") + "y = Identity(h1)"
    model = stream(body, inputs="float[B, S, 8] picture, float[B, S, 8] x")
    anatomy = dissect(model)
    assert (anatomy.source, anatomy.layer_count) == ("x", 2)


LOOKUPS = {
    "plain": "e = Gather(table, ids)",
    "cast": "i = Cast <to = 7> (ids) e = Gather(table, i)",
    "clipped": "i = Clip(ids, low) e = Gather(table, i)",
    "scaled": "e0 = Gather(table, ids) e = Mul(e0, scale)",
    "with positions": "e0 = Gather(table, ids) e1 = Gather(places, positions) e = Add(e0, e1)",
}


@pytest.mark.parametrize("lookup", LOOKUPS.values(), ids=LOOKUPS)
def test_embeddings_are_table_lookups_indexed_by_an_input(lookup: str) -> None:
    body = lookup + sandwich(0, "e") + sandwich(1, "h0")
    model = text_model(
        f"""g (int64[B, S] ids, int64[B, S] positions) => (float[B, S, 8] y)
        <float[8, 8] w, float[8] g, float scale = {{2.0}}, int64 low = {{0}}, float[9, 8] table, float[9, 8] places>
        {{ {body} y = Identity(h1) }}"""
    )
    anatomy = dissect(model)
    assert [site.value for site in anatomy.sites] == ["h0", "h1"]
    assert anatomy.source == ("e0" if "e0" in lookup else "e")


def test_model_local_functions_are_looked_into() -> None:
    model = text_model(
        """
        <ir_version: 9, opset_import: ["" : 18, "local" : 1]>
        g (float[B, S, 8] x) => (float[B, S, 8] y) <float[8, 8] w> {
            h0 = local.Layer(x, w)
            y = local.Layer(h0, w)
        }
        <opset_import: ["" : 18], domain: "local">
        Layer (x, w) => (h) {
            t = Transpose <perm = [0, 2, 1]> (x)
            s = MatMul(x, t)
            p = Softmax <axis = -1> (s)
            a = MatMul(p, x)
            sum = Add(x, a)
            m = MatMul(sum, w)
            h = Add(sum, m)
        }
        """
    )
    anatomy = dissect(model, 2)
    assert [site.value for site in anatomy.sites] == ["h0", "y"]
    assert not model.functions


def test_the_first_output_of_the_right_rank_is_the_sink() -> None:
    body = "best = ArgMax <axis = -1> (x) pooled = ReduceSum(x)" + sandwich(0, "x") + "y = Identity(h0)"
    model = stream(body, outputs="int64[B, S, 1] best, float pooled, float[B, S, 8] y, float[B, S, 8] a0")
    assert dissect(model).sink == "y"


def test_without_any_shapes_the_first_float_output_is_the_sink() -> None:
    model = layer_by_layer(sandwich)
    model.graph.outputs[0].shape = None
    assert site_values(model) == ["h0", "h1"]


def test_dissecting_adds_types_and_changes_nothing_else(zoo: Zoo) -> None:
    """TorchScript's files have no value types at all."""
    path = zoo("llama-torchscript-fp32").path
    before, after = load_graph(path), load_graph(path)
    assert any(value.dtype is None for node in before.graph for value in node.outputs)
    prepare(after)
    assert all(value.dtype is not None for node in after.graph for value in node.outputs if value.name)
    assert onnx_nodes(after) == onnx_nodes(before)
    assert after.graph.initializers.keys() == before.graph.initializers.keys()


def onnx_nodes(model: ir.Model) -> list[bytes]:
    return [node.SerializeToString(deterministic=True) for node in ir.to_proto(model).graph.node]


def test_a_node_is_found_by_its_first_output() -> None:
    graph = decoder("skip_norm", layers=1).graph
    assert find_node(graph, "layer_0_norm") is list(graph)[-2]
    assert find_node(graph, "hidden") is None  # its fourth


# ---------------------------------------------------------------------------------------------------------------- refusals


def refusal(model: ir.Model, expected_layers: int | LayerCount | None = None) -> str:
    with pytest.raises(AnatomyNotFound) as raised:
        dissect(model, expected_layers)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_graph_without_attention_is_refused() -> None:
    mlp = stream("m = MatMul(x, w) h = Add(x, m) n = Mul(h, g) y = MatMul(n, w)")
    assert refusal(mlp) == (
        "no attention found among 5 values, so there are no decoder layers; is this the decoder graph?"
    )


def test_an_embedding_graph_is_refused() -> None:
    text = "g (int64[B, S] input_ids) => (float[B, S, 8] inputs_embeds) <float[9, 8] table> {BODY}"
    model = text_model(text.replace("BODY", "inputs_embeds = Gather(table, input_ids)"))
    assert refusal(model) == (
        "no attention found among 2 values, so there are no decoder layers; is this the decoder graph?"
    )


def test_a_router_is_no_attention() -> None:
    """Its Softmax meets a MatMul with a weight, or none."""
    body = "r = MatMul(x, w) p = Softmax <axis = -1> (r) e = MatMul(p, w) y = Add(x, e)"
    assert refusal(stream(body)).startswith("no attention found among 5 values")


def test_a_graph_without_a_float_output_is_refused() -> None:
    body = sandwich(0, "x") + "best = ArgMax <axis = -1> (h0)"
    model = stream(body, outputs="int64[B, S, 1] best, float[B] pooled")
    assert refusal(model) == (
        "no rank-2 or rank-3 float output (logits or last_hidden_state) among best, pooled; is it a decoder?"
    )


def test_an_output_that_no_input_reaches_is_refused() -> None:
    model = stream("y = Neg(w)", outputs="float[8, 8] y")
    assert refusal(model) == "output 'y' does not depend on the graph's inputs; is it a decoder?"


def test_attention_without_an_embedding_is_refused() -> None:
    body = "flat = Reshape(picture, shape) " + sandwich(0, "flat") + "y = Identity(h0)"
    model = text_model(
        f"""g (float[B, 3, 8, 8] picture) => (float[B, 24, 8] y)
        <float[8, 8] w, float[8] g, int64[3] shape = {{0, 24, 8}}> {{ {body} }}"""
    )
    assert refusal(model) == (
        "1 attention node but no embedding lookup or inputs_embeds among the inputs picture; is this a decoder graph?"
    )


def test_attention_without_a_residual_sum_is_refused() -> None:
    model = stream(attention("a", "x") + attention("b", "a") + "y = MatMul(b, w)")
    assert refusal(model) == (
        "2 attention nodes but no residual sum that every path from the embedding to the output passes; "
        "this is not a pre-norm or post-norm decoder"
    )


def two_streams(layers: int) -> ir.Model:
    """Gemma3n in small: two streams, each with sums of its own, that meet at the end."""
    body, left, right = "l = Mul(x, g) r = Mul(x, scale)", "l", "r"
    for number in range(layers):
        a, b = f"a{number}", f"b{number}"
        body += attention(a, left) + f"l{number} = Add({left}, {a}) r{number}s = Mul(l{number}, g) "
        body += f"{b} = MatMul({right}, w) r{number} = Add(r{number}s, {b}) "
        left, right = f"l{number}", f"r{number}"
    return stream(f"{body} y = Add({left}, {right})")


def test_several_streams_are_refused() -> None:
    assert refusal(two_streams(3)) == (
        "'b2' enters layer 2 past the 3 layers' residual sums, and it carries the input of layer 2 and enters through Add, not "
        "through attention: several streams, or paths past the sums (embeddings per layer, keys and values that layers "
        "share); such decoders cannot be guarded"
    )
    assert refusal(two_streams(3), 2) == (
        "the stream splits: 3 attention nodes follow one another inside layer 0 without a sum that all paths pass "
        "(best partial match: 1 layers of the config's 2): several streams, or paths past the sums (embeddings per layer, keys "
        "and values that layers share); such decoders cannot be guarded"
    )


def test_a_config_says_what_goes_past_the_sums() -> None:
    """Gemma 4 has one stream: its refusal does not speak of several."""
    shared = LayerCount(3, past_sums=("keys and values that layers share (num_kv_shared_layers 2)",))
    assert refusal(two_streams(3), shared) == (
        "'b2' enters layer 2 past the 3 layers' residual sums, and it carries the input of layer 2 and enters through Add, not "
        "through attention: the config declares keys and values that layers share (num_kv_shared_layers 2); such decoders "
        "cannot be guarded"
    )


def test_several_streams_without_any_sum_in_common_are_refused() -> None:
    """As Gemma3n is really exported: its streams are mixed by a small matrix, never by one Add that all paths pass."""
    body = (
        "l = Mul(x, g) r = Mul(x, scale)"
        + attention("a0", "l")
        + "l0 = Add(l, a0) r0 = Add(r, a0)"
        + attention("a1", "l0")
        + "l1 = Add(l0, a1) both = Concat <axis = 2> (l1, r0) y = ReduceMean(both)"
    )
    assert refusal(stream(body)) == (
        "'r0' enters the end of the graph past the 2 layers' residual sums, and no layer follows: several streams, or paths "
        "past the sums (embeddings per layer, keys and values that layers share); such decoders cannot be guarded"
    )


def test_an_image_tower_in_the_same_graph_is_no_second_stream() -> None:
    """As transformers exports a whole LLaVA: its attentions stand between the embedding and layer 0, on another way."""
    tower = "flat = Reshape(picture, shape) " + attention("v0", "flat") + attention("v1", "v0")
    body = tower + "both = Concat <axis = 1> (v1, x) " + sandwich(0, "both") + sandwich(1, "h0") + "y = Identity(h1)"
    model = text_model(
        f"""g (float[B, S, 8] x, float[B, 3, 8, 8] picture) => (float[B, T, 8] y)
        <float[8, 8] w, float[8] g, int64[3] shape = {{0, 24, 8}}> {{ {body} }}"""
    )
    assert site_values(model) == ["h0", "h1"]


def test_two_attentions_side_by_side_are_one_layer() -> None:
    """They do not follow one another: a hybrid's heads in parallel."""
    body = attention("a", "x") + attention("b", "x") + "ab = Add(a, b) h = Add(x, ab) y = MatMul(h, w)"
    assert site_values(stream(body)) == ["h"]


def test_a_decoder_inside_an_if_is_found_in_both_branches() -> (
    None
):  # J: optimum's merged decoders; see test_subgraphs.py
    def branch(name: str) -> str:
        body = attention(f"{name}a", "x") + f"{name}h = Add(x, {name}a) {name}y = MatMul({name}h, w)"
        return f"{name} () => (float[B, S, 8] {name}y) {{ {body} }}"

    body = f"y = If (use_cache) < then_branch = {branch('t')}, else_branch = {branch('e')} >"
    anatomy = dissect(stream(body, inputs="float[B, S, 8] x, bool use_cache"))
    assert [(site.body, site.value) for site in anatomy.sites] == [("else_branch", "eh"), ("then_branch", "th")]


def test_a_stream_of_integers_is_refused() -> None:  # K
    body = attention("a", "x") + (
        "xi = Cast <to = 6> (x) ai = Cast <to = 6> (a) h = Add(xi, ai) hf = Cast <to = 1> (h) y = MatMul(hf, w)"
    )
    assert refusal(stream(body)) == (
        "layer 0: the residual sum 'h' is INT32, expected a float stream; models whose stream is quantized between "
        "layers cannot be guarded"
    )
    assert refusal(stream(body.replace("to = 6", "to = 11"))) == (
        "layer 0: the residual sum 'h' is DOUBLE, expected a float stream; convert the model to float32"
    )


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("at", [0, 1])
def test_a_fused_sum_of_one_value_is_refused(kind: Kind, at: int) -> None:
    """The input is there and has no name: onnxruntime would refuse the file, onnx_ir opens it."""
    model = decoder(kind, layers=2)
    (node,) = (node for node in model.graph if any(output.name == "layer_0_sum" for output in node.outputs))
    node.replace_input_with(at, None)
    assert refusal(model) == (
        f"layer 0: node {node.name!r} ({node.op_type}) lacks one of its two summands; is the file damaged?"
    )


UNKNOWN = '<ir_version: 9, opset_import: ["" : 18, "strange" : 1, "com.microsoft" : 1]>'


def test_a_stream_of_unknown_dtype_is_refused() -> None:
    body = attention("a", "e") + "h = Add(e, a) y = strange.Head(h)"
    model = text_model(UNKNOWN + f"g (float[B, S, 8] x) => (float[B, S, 8] y) {{ e = strange.Op(x) {body} }}")
    assert refusal(model) == "layer 0: the dtype of 'h' is unknown; run shape inference on the file"


def test_a_stream_of_unknown_width_is_refused() -> None:
    body = attention("a", "x") + "h = Add(x, a) y = Neg(h)"
    model = text_model(f"g (float[B, S, D] x) => (float[B, S, D] y) {{ {body} }}")
    assert refusal(model) == "the width of the residual stream is unknown at 'h'; run shape inference"


def test_the_width_may_come_from_the_norm_that_reads_the_sum() -> None:
    body = attention("a", "x") + "h = Add(x, a) s = Sqrt(h) n = Div(h, s) y = Mul(n, g)"
    model = text_model(f"g (float[B, S, D] x) => (float[B, S, D] y) <float[6] g = {{1,1,1,1,1,1}}> {{ {body} }}")
    assert dissect(model).width == 6
