"""Decoder state and the roles of inputs, recognised under every exporter's names and under none."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
from hand_graphs import text_model

from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.decoder_state import StatePair, is_past_name, pairs_by_name, state_name
from vlmguard.graphs.errors import AnatomyNotFound
from vlmguard.graphs.graph_io import graph_bytes
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.roles import InputRoles, declare, declared_by_genai, input_roles, roles_by_name

# input and output names of one key/value pair of layer N, as exporters write them
NAMES = {
    "optimum": ("past_key_values.{n}.key", "present.{n}.key", "past_key_values.{n}.value", "present.{n}.value"),
    "transformers.js": (
        "past_key_values.{n}.key",
        "present_key_values.{n}.key",
        "past_key_values.{n}.value",
        "present_key_values.{n}.value",
    ),
    "transformers 5.23": (
        "input.past_key_values.layers.{n}.keys",
        "output.past_key_values.layers.{n}.keys",
        "input.past_key_values.layers.{n}.values",
        "output.past_key_values.layers.{n}.values",
    ),
    "transformers 5.24": (
        "input.cache.layers.{n}.keys",
        "output.cache.layers.{n}.keys",
        "input.cache.layers.{n}.values",
        "output.cache.layers.{n}.values",
    ),
    "torch's defaults": ("past_key_values_{n}_0", "cat_{n}7", "past_key_values_{n}_1", "cat_{n}3"),
    "misleading": ("present.{n}.value", "past.{n}.key", "present.{n}.key", "past.{n}.value"),
}
_HEADER = '<ir_version: 9, opset_import: ["" : 21, "com.microsoft" : 1]>\n'


def cached(names: tuple[str, str, str, str], fused: bool = False, reverse: bool = False) -> ir.Model:
    """Two layers whose keys and values grow by this call's, `fused` in one attention node; `reverse`: outputs backwards."""
    inputs, outputs, nodes, stream = [], [], [], "x0"
    for n in range(2):
        key, new_key, value, new_value = (name.format(n=n) for name in names)
        ports = {"key": key, "new_key": new_key, "value": value, "new_value": new_value}
        safe = {what: name.replace(".", "_DOT_") for what, name in ports.items()}
        inputs += [f"float[B, 2, P, 4] {safe['key']}", f"float[B, 2, P, 4] {safe['value']}"]
        outputs += [f"float[B, 2, T, 4] {safe['new_key']}", f"float[B, 2, T, 4] {safe['new_value']}"]
        following = f"x{n + 1}"
        if fused:
            nodes.append(
                f"{following}_r, {safe['new_key']}, {safe['new_value']} = com.microsoft.GroupQueryAttention <num_heads = 2, "
                f"kv_num_heads = 2> ({stream}, {stream}, {stream}, {safe['key']}, {safe['value']}, lengths, total)"
            )
        else:
            nodes += [
                f"k{n} = Transpose <perm = [0, 2, 1, 3]> ({stream})",
                f"{safe['new_key']} = Concat <axis = 2> ({safe['key']}, k{n})",
                f"{safe['new_value']} = Concat <axis = 2> ({safe['value']}, k{n})",
                f"s{n} = MatMul (k{n}, {safe['new_key']})",
                f"p{n} = Softmax (s{n})",
                f"{following}_r = MatMul (p{n}, {safe['new_value']})",
            ]
        nodes.append(f"{following} = Add ({stream}, {following}_r)")
        stream = following
    more = ", int32[B] lengths, int32 total" if fused else ""
    listed = ["float[B, S, 5] logits", *(outputs[::-1] if reverse else outputs)]
    text = (
        f"{_HEADER}g (int64[B, S] input_ids, int64[B, A] attention_mask, {', '.join(inputs)}{more}) => "
        f"({', '.join(listed)}) <float[9, 8] table> {{ x0 = Gather (table, input_ids)\n" + "\n".join(nodes)
    ) + f"\nlogits = Identity ({stream}) }}"
    model = text_model(text)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = (value.name or "").replace("_DOT_", ".")
    return model


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_state_is_what_the_graph_updates_whatever_its_name(
    names: tuple[str, str, str, str], fused: bool, reverse: bool
) -> None:
    roles = input_roles(cached(names, fused, reverse).graph)
    key, new_key, value, new_value = names
    pairs = [[(key, new_key), (value, new_value)] for _ in range(2)]
    expected = [StatePair(a.format(n=n), b.format(n=n), 2) for n, layer in enumerate(pairs) for a, b in layer]
    assert list(roles.states) == expected
    assert (roles.tokens, roles.mask, roles.logits) == ("input_ids", "attention_mask", "logits")


def test_states_of_fixed_size_are_state() -> None:
    """The window of a convolution and the matrix of a linear attention, as LFM2 and Qwen 3.5 have them."""
    model = text_model(
        _HEADER
        + """g (float[B, S, 8] inputs_embeds, float[B, 8, 2] past_conv_0, float[B, 2, 4, 4] past_recurrent_1) =>
           (float[B, S, 8] logits, float[B, 8, 2] conv_out, float[B, 2, 4, 4] mixed) <float[8, 8] w, float[2, 4, 4] decay> {
            turned = Transpose <perm = [0, 2, 1]> (inputs_embeds)
            window = Concat <axis = 2> (past_conv_0, turned)
            first, conv_out = Split <axis = 2, num_outputs = 2> (window)
            faded = Mul (past_recurrent_1, decay)
            outer = MatMul (faded, faded)
            mixed = Add (faded, outer)
            logits = MatMul (inputs_embeds, w)
        }"""
    )
    assert input_roles(model.graph).states == (
        StatePair("past_conv_0", "conv_out"),
        StatePair("past_recurrent_1", "mixed"),
    )


def test_what_each_token_brings_is_no_state() -> None:
    """Hidden states that come out, and what is added to them for each token, have one layout."""
    model = text_model(
        """g (float[B, S, 8] inputs_embeds, float[B, S, 8] deepstack_embeds_0) =>
           (float[B, S, 8] logits, float[B, S, 8] hidden) {
            hidden = Add (inputs_embeds, deepstack_embeds_0)
            logits = Neg (hidden)
        }"""
    )
    assert input_roles(model.graph) == InputRoles(embeds="inputs_embeds", logits="logits")


def test_state_of_a_merged_decoder_is_followed_into_both_branches() -> None:
    model = text_model(
        """g (bool use, float[B, S, 8] inputs_embeds, float[B, 2, P, 4] past_a, float[B, 2, P, 4] past_b) =>
           (float[B, S, 8] logits, float[B, 2, T, 4] new_b, float[B, 2, T, 4] new_a) {
            logits = Neg (inputs_embeds)
            new_b, new_a = If (use) <
              then_branch = then () => (float[B, 2, T, 4] b1, float[B, 2, T, 4] a1) { b1 = Neg (past_b) a1 = Neg (past_a) },
              else_branch = other () => (float[B, 2, T, 4] b2, float[B, 2, T, 4] a2) { b2 = Abs (past_b) a2 = Abs (past_a) }
            >
        }"""
    )
    assert input_roles(model.graph).states == (StatePair("past_a", "new_a", 2), StatePair("past_b", "new_b", 2))


def test_a_cache_that_no_output_refills_is_no_state() -> None:
    model = text_model(
        """g (float[B, S, 8] inputs_embeds, float[B, 2, P, 4] past_key_values_0_key) => (float[B, S, 8] logits) {
            logits = Neg (inputs_embeds) }"""
    )
    assert input_roles(model.graph).states == ()


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("past_key_values.0.key", True),
        ("input.cache.layers.3.values", True),
        ("past.1.conv", True),
        ("cache_position", False),
        ("past_sequence_length", False),
        ("attention_mask", False),
    ],
)
def test_names_that_say_cache(name: str, known: bool) -> None:
    assert is_past_name(name) is known


def test_an_engines_state_goes_by_its_names() -> None:
    inputs = ("input_ids", "past_key_values.0.key", "input.cache.layers.1.values", "past_conv.2", "past.9.key")
    outputs = ("logits", "present.0.key", "output.cache.layers.1.values", "present_conv.2", "present.8.key")
    found = [(pair.past, pair.present) for pair in pairs_by_name(inputs, outputs)]
    assert found == [
        ("past_key_values.0.key", "present.0.key"),
        ("input.cache.layers.1.values", "output.cache.layers.1.values"),
        ("past_conv.2", "present_conv.2"),
    ]
    assert roles_by_name(inputs, outputs).tokens == "input_ids"
    assert state_name("input.cache.layers.1.values") == "1.value"


# ------------------------------------------------------------------------------------------------------ renamed inputs

RENAMED = """g (int64[B, S] tokens, int64[B, T] seen, int64[B, S] where) => (float[B, S, 9] scores) <
    float[9, 8] table, float[8, 9] head, float[20, 4] waves> {
    x = Gather (table, tokens)
    place = Gather (waves, where)
    last = ReduceSum <keepdims = 0> (seen)
    scores = MatMul (x, head)
}"""


def test_roles_are_read_from_the_structure() -> None:
    assert input_roles(text_model(RENAMED).graph) == InputRoles("tokens", "", "seen", "where", "scores")


def test_a_table_of_positions_is_no_table_of_tokens() -> None:
    """GPT-2 looks both up in tables of one width; as many rows as logits has the one of tokens."""
    model = text_model(
        """g (int64[B, S] places, int64[B, S] ids) => (float[B, S, 9] scores) <
        float[32, 8] wpe, float[9, 8] wte, float[8, 9] head> {
        p = Gather (wpe, places) t = Gather (wte, ids) x = Add (t, p) scores = MatMul (x, head) }"""
    )
    roles = input_roles(model.graph)
    assert (roles.tokens, roles.positions) == ("ids", "places")


def test_what_structure_leaves_open_stays_open() -> None:
    """Two inputs that may each be the mask: neither is taken for it."""
    model = text_model(RENAMED.replace("int64[B, T] seen,", "int64[B, T] seen, int64[B, T] other,"))
    assert input_roles(model.graph).mask == "seen"  # the other one is read by nothing
    text = RENAMED.replace("int64[B, T] seen,", "int64[B, T] seen, int64[B, T] other,")
    text = text.replace("scores = MatMul", "sum = ReduceSum <keepdims = 0> (other) scores = MatMul")
    assert input_roles(text_model(text).graph).mask == ""


def test_names_in_genai_config_are_the_graphs(tmp_path: Path) -> None:
    """Two inputs could be the mask; the config says which one is."""
    text = RENAMED.replace("int64[B, T] seen,", "int64[B, T] seen, int64[B, T] other,")
    model = text_model(text.replace("scores = MatMul", "sum = ReduceSum <keepdims = 0> (other) scores = MatMul"))
    (tmp_path / "model.onnx").write_bytes(graph_bytes(model))
    decoder = {"filename": "model.onnx", "inputs": {"attention_mask": "other", "position_ids": "position_ids"}}
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))
    package = open_package(tmp_path)
    assert package.roles.mask == "other" and package.roles.positions == "where"
    assert input_roles(package.load_decoder().graph).mask == "other"
    decoder["filename"] = "another.onnx"  # a config that describes another graph
    (tmp_path / "another.onnx").write_bytes(graph_bytes(text_model(RENAMED)))
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))
    assert open_package(tmp_path / "model.onnx").roles.mask == ""


def test_states_in_genai_config_are_its_patterns() -> None:
    model = cached(NAMES["torch's defaults"], fused=True)
    patterns = {
        "inputs": {"past_key_names": "past_key_values_%d_0", "past_value_names": "past_key_values_%d_1"},
        "outputs": {"present_key_names": "cat_%d3", "present_value_names": "cat_%d7"},
    }
    declare(model.graph, declared_by_genai({"model": {"decoder": patterns}}))
    found = [(pair.past, pair.present) for pair in input_roles(model.graph).states]
    assert found[:2] == [("past_key_values_0_0", "cat_03"), ("past_key_values_0_1", "cat_07")]


@pytest.mark.parametrize(
    "config", [{}, {"model": 3}, {"model": {"decoder": []}}, {"model": {"decoder": {"inputs": 1}}}]
)
def test_a_config_of_another_form_declares_nothing(config: dict) -> None:
    assert not declared_by_genai(config).names


def test_tokens_that_are_reshaped_before_their_table_are_the_streams_source() -> None:
    """GPT-2 and OPT: `input_ids.view(-1, length)`. Flattened to one row of tokens, the batch is lost, and it is no source."""
    layer = "t = Transpose <perm = [0, 2, 1]> (x) s = MatMul (x, t) p = Softmax (s) a = MatMul (p, x) y = Add (x, a)"
    text = f"""g (int64[B, S] input_ids) => (float[B, S, 9] logits) <float[9, 8] table, float[8, 9] head> {{
        form = Constant <value_ints = [FORM]> () ids = Reshape (input_ids, form) x = Gather (table, ids)
        {layer} logits = MatMul (y, head) }}"""
    anatomy = dissect(text_model(text.replace("FORM", "-1, 4")))
    assert (anatomy.layer_count, anatomy.source) == (1, "x")
    with pytest.raises(AnatomyNotFound, match="no embedding lookup"):
        dissect(text_model(text.replace("FORM", "-1")))
