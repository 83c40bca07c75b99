"""Which sums are layers, and where a layer's state leaves it: cross attention, one-mixer blocks, norms behind sums."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hand_graphs import Guarded, directions, guard_model, run, text_model
from text_layers import STREAM, WEIGHTS, WIDTH, attention, graph, mlp, norm, spelled_norm

from vlmguard.graphs import reference
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.errors import AnatomyNotFound
from vlmguard.graphs.layer_count import LayerCount
from vlmguard.graphs.proof.structure import prove_structure
from vlmguard.graphs.spec import GuardSpec
from vlmguard.graphs.taps import STATES_OUTPUT, tap_last_token

pytest.importorskip("onnxruntime")


def bart(layers: int = 3, post_norm: bool = True, embedding_norm: bool = True) -> ir.Model:
    """Self-attention, cross attention and MLP in every layer, each with a sum and a norm behind it or before the part."""
    body, x = (norm("h", "x"), "h") if embedding_norm else ("", "x")
    for n in range(layers):
        for part in ("self", "cross", "mlp"):
            read = x
            if not post_norm:
                body += norm(f"{part}{n}_in", x)
                read = f"{part}{n}_in"
            if part == "mlp":
                body += mlp(f"{part}{n}", read)
            else:
                body += attention(f"{part}{n}", read, read if part == "self" else "encoder_hidden_states")
            body += f"{part}{n}_sum = Add({x}, {part}{n}) "
            x = f"{part}{n}_sum"
            if post_norm:
                body += norm(f"{part}{n}_out", x)
                x = f"{part}{n}_out"
    return graph(body, x)


def mllama(cross_layers: tuple[bool, ...] = (False, True, False), with_mlp: bool = True) -> ir.Model:
    """Layers of self-attention and layers of cross attention, each with an MLP."""
    body, x = "", "x"
    for n, cross in enumerate(cross_layers):
        body += norm(f"in{n}", x) + attention(f"a{n}", f"in{n}", "encoder_hidden_states" if cross else f"in{n}")
        body += f"s{n} = Add({x}, a{n}) "
        x = f"s{n}"
        if with_mlp:
            body += norm(f"n{n}", x) + mlp(f"m{n}", f"n{n}") + f"h{n} = Add({x}, m{n}) "
            x = f"h{n}"
    return graph(body, x)


def post_norm(layers: int = 2, spelled: bool = False, flat: bool = False) -> ir.Model:
    """OPT-350m's kind: a norm behind each sum; `flat`: the MLP's sum is `[batch * sequence, width]`."""
    behind = spelled_norm if spelled else norm
    body, x = "", "x"
    for n in range(layers):
        body += attention(f"a{n}", x, x) + f"as{n} = Add({x}, a{n}) " + behind(f"an{n}", f"as{n}")
        x = f"an{n}"
        body += (f"flat{n} = Reshape(an{n}, two) " if flat else "") + mlp(f"m{n}", f"flat{n}" if flat else x)
        body += f"sum{n} = Add({f'flat{n}' if flat else x}, m{n}) "
        body += f"back{n} = Reshape(sum{n}, three) " if flat else ""
        body += behind(f"h{n}", f"back{n}" if flat else f"sum{n}")
        x = f"h{n}"
    weights = WEIGHTS.replace(">", ", int64[2] two = {-1, 16}>")
    return graph(body, x, STREAM, weights)


def opt(layers: int = 2) -> ir.Model:
    """OPT as transformers writes it: norms before attention and MLP, the MLP's sum flattened."""
    body, x = "", "x"
    for n in range(layers):
        body += norm(f"in{n}", x) + attention(f"a{n}", f"in{n}", f"in{n}") + f"as{n} = Add({x}, a{n}) "
        body += f"flat{n} = Reshape(as{n}, two) " + norm(f"n{n}", f"flat{n}") + mlp(f"m{n}", f"n{n}")
        body += f"sum{n} = Add(flat{n}, m{n}) h{n} = Reshape(sum{n}, three) "
        x = f"h{n}"
    weights = WEIGHTS.replace(">", ", int64[2] two = {-1, 16}>")
    return graph(body + norm("last", x), "last", STREAM, weights)


def values(model: ir.Model, declared: LayerCount | int | None = None) -> list[str]:
    return [site.value for site in dissect(model, declared).sites]


def refusal(model: ir.Model, declared: LayerCount | int | None = None) -> str:
    with pytest.raises(AnatomyNotFound) as raised:
        dissect(model, declared)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# Cross attention


@pytest.mark.parametrize("declared", [None, 3])
def test_cross_attention_inside_a_layer_begins_none(declared: int | None) -> None:
    """BART's kind: three layers, where each has two attentions; behind the norm and before it."""
    assert values(bart(), declared) == ["mlp0_out", "mlp1_out", "mlp2_out"]
    assert values(bart(post_norm=False, embedding_norm=False), declared) == ["mlp0_sum", "mlp1_sum", "mlp2_sum"]


@pytest.mark.parametrize("declared", [None, 3])
def test_a_layer_of_cross_attention_is_a_layer(declared: int | None) -> None:
    """Mllama's kind: an MLP behind each attention."""
    assert values(mllama(), declared) == ["h0", "h1", "h2"]


def test_the_encoders_layers_are_not_counted() -> None:
    assert refusal(bart(), 6) == (
        "the config declares 6 layers, the graph's residual stream shows 3 with self-attention and 3 with cross attention "
        "alone; check that config.json belongs to this graph"
    )


def test_cross_attention_that_is_not_plain_needs_a_config() -> None:
    """Without MLPs nothing says whether it is a layer."""
    model = mllama((False, True, False, True), with_mlp=False)
    assert refusal(model) == (
        "the decoder has cross attention, and whether that is a layer or a part of one is not plain from the graph; put the "
        "model's config.json beside it"
    )
    assert values(model, 4) == ["s0", "s1", "s2", "s3"]
    assert values(model, 2) == ["s1", "s3"]


def test_a_fused_attention_tells_its_values_apart() -> None:
    """`MultiHeadAttention` over another input's values is cross attention too."""
    body, x = "", "x"
    for n in range(2):
        for part, keys in (("self", x), ("cross", "encoder_hidden_states")):
            body += f"{part}{n} = com.microsoft.MultiHeadAttention <num_heads = 2> ({x}, {keys}, {keys}) "
            body += f"{part}{n}_sum = Add({x}, {part}{n}) "
            x = f"{part}{n}_sum"
        body += mlp(f"m{n}", x) + f"h{n} = Add({x}, m{n}) "
        x = f"h{n}"
    assert values(graph(body, x)) == ["h0", "h1"]


# One block, one mixer


def blocks(*mixes: bool) -> ir.Model:
    body, x = "", "x"
    for n, mixer in enumerate(mixes):
        body += norm(f"n{n}", x) + (attention(f"b{n}", f"n{n}", f"n{n}") if mixer else mlp(f"b{n}", f"n{n}"))
        body += f"h{n} = Add({x}, b{n}) "
        x = f"h{n}"
    return graph(body + norm("last", x), "last", STREAM)


NEMOTRON = (True, False, True, False, False)


def test_every_block_of_one_mixer_is_a_layer() -> None:
    assert values(blocks(*NEMOTRON), LayerCount(5, NEMOTRON)) == ["h0", "h1", "h2", "h3", "h4"]


def test_blocks_in_another_order_are_refused() -> None:
    assert refusal(blocks(*NEMOTRON), LayerCount(5, (True, False, False, True, False))) == (
        "the config lists 5 blocks of one mixer each (mixer MLP MLP mixer MLP), the graph's residual stream shows 5 sums "
        "(mixer MLP mixer MLP MLP); check that config.json belongs to this graph"
    )
    assert "lists 4 blocks" in refusal(blocks(*NEMOTRON), LayerCount(4, NEMOTRON[:4]))


def test_a_count_without_a_list_does_not_make_blocks_of_sums() -> None:
    assert "the config declares 5 layers, the graph's residual stream shows 2" in refusal(blocks(*NEMOTRON), 5)


# A convolution inside the MLP


def with_conv(kernel: str = "k") -> ir.Model:
    """Inkling's kind: attention with one sum, and an MLP with a convolution over the tokens, with one sum."""
    body, x = "", "x"
    for n in range(3):
        body += (
            norm(f"in{n}", x)
            + attention(f"a{n}", f"in{n}", f"in{n}")
            + f"s{n} = Add({x}, a{n}) "
            + norm(f"n{n}", f"s{n}")
        )
        body += f"t{n} = Transpose <perm = [0, 2, 1]> (n{n}) c{n} = Conv <pads = [2, 0]> (t{n}, {kernel}) "
        body += f"b{n} = Transpose <perm = [0, 2, 1]> (c{n}) " + mlp(f"m{n}", f"b{n}") + f"h{n} = Add(s{n}, m{n}) "
        x = f"h{n}"
    return graph(body + norm("last", x), "last", STREAM, WEIGHTS.replace("<", "<float[16, 16, 3] k, ", 1))


def test_a_convolution_inside_the_mlp_is_no_layer_of_its_own() -> None:
    assert values(with_conv(), 3) == ["h0", "h1", "h2"]
    assert values(with_conv(), 6) == ["s0", "h0", "s1", "h1", "s2", "h2"]


def test_a_convolution_behind_every_attention_needs_a_config() -> None:
    assert refusal(with_conv()) == (
        "every attention has one residual sum alone, and behind it a convolution or recurrence has one, so whether the two are "
        "one layer is not plain from the graph; put the model's config.json beside it"
    )
    assert "the config declares 4 layers, the graph's residual stream shows 6" in refusal(with_conv(), 4)


def test_cross_attention_layers_that_were_left_out_are_named() -> None:
    declared = LayerCount(4, cross_attention=(1,))
    assert refusal(mllama((False, False, False)), declared) == (
        "the config declares 4 layers, the graph's residual stream shows 3 (h0 to h2); the layers with cross attention (1) "
        "were left out of it, so its layers are not numbered as the config's are; export the decoder with "
        "cross_attention_states among its inputs"
    )
    assert values(mllama((False, True, False, False)), declared) == ["h0", "h1", "h2", "h3"]


# Behind the sum


def test_a_norm_behind_the_sum_ends_the_layer() -> None:
    for model in (post_norm(), post_norm(spelled=True)):
        anatomy = dissect(model, 2)
        assert [site.value for site in anatomy.sites] == ["h0", "h1"]
        assert {site.kind for site in anatomy.sites} == {"behind"}
        assert anatomy.width == WIDTH


def test_a_norm_inside_the_branch_is_not_behind_the_sum() -> None:
    """OLMo 2: the branch is normed, then summed."""
    body, x = "", "x"
    for n in range(2):
        body += attention(f"a{n}", x, x) + norm(f"an{n}", f"a{n}") + f"s{n} = Add({x}, an{n}) "
        body += mlp(f"m{n}", f"s{n}") + norm(f"mn{n}", f"m{n}") + f"h{n} = Add(s{n}, mn{n}) "
        x = f"h{n}"
    assert values(graph(body + norm("last", x), "last", STREAM)) == ["h0", "h1"]


def test_a_norm_that_may_stand_before_layers_is_refused() -> None:
    """BLOOM with the residual behind the norm: the same graph, and another state is the layer's."""
    model = post_norm()
    text = norm("first", "x")
    body = "".join(
        attention(f"a{n}", x, x) + f"s{n} = Add({x}, a{n}) " + norm(f"h{n}", f"s{n}")
        for n, x in ((0, "first"), (1, "h0"))
    )
    assert refusal(graph(text + body, "h1", STREAM)) == (
        "a norm stands before the first layer and one behind every layer's last sum, so whether a layer's state leaves it "
        "before or behind the norm is not plain; such decoders cannot be guarded"
    )
    assert values(model) == ["h0", "h1"]


def test_layers_that_end_differently_are_refused() -> None:
    body, x = "", "x"
    for n, behind in enumerate((True, False, True)):
        body += attention(f"a{n}", x, x) + f"s{n} = Add({x}, a{n}) "
        x = f"s{n}"
        if behind:
            body += norm(f"h{n}", x)
            x = f"h{n}"
    assert refusal(graph(body, x, STREAM)) == (
        "some layers end in a norm behind their last sum and others do not, so where a layer's state leaves it is not plain; "
        "such decoders cannot be guarded"
    )


def test_the_last_layer_must_end_as_the_others_do() -> None:
    model = post_norm()
    text = "".join(
        attention(f"a{n}", x, x) + f"s{n} = Add({x}, a{n}) " + (norm("h0", "s0") if n == 0 else "")
        for n, x in ((0, "x"), (1, "h0"))
    )
    assert refusal(graph(text, "s1", STREAM)) == (
        "layer 1 does not end as the others do, in LayerNormalization behind its last sum 's1'; such decoders cannot be guarded"
    )
    assert values(model) == ["h0", "h1"]


def test_a_fused_norm_behind_the_sum() -> None:
    """ONNX Runtime's optimiser on a post-norm decoder: the residual reads output 0 of the fused node."""
    body, x = "", "x"
    for n in range(2):
        body += attention(f"a{n}", x, x)
        body += f"an{n} = com.microsoft.SkipLayerNormalization <epsilon = 1e-5> ({x}, a{n}, gain) " + mlp(
            f"m{n}", f"an{n}"
        )
        body += f"h{n} = com.microsoft.SkipLayerNormalization <epsilon = 1e-5> (an{n}, m{n}, gain) "
        x = f"h{n}"
    anatomy = dissect(graph(body, x, STREAM))
    assert [(site.kind, site.value) for site in anatomy.sites] == [("behind", "h0"), ("behind", "h1")]


MODELS = {
    "bart": (bart, ["mlp0_out", "mlp1_out", "mlp2_out"]),
    "post-norm": (post_norm, ["h0", "h1"]),
    "spelled post-norm": (lambda: post_norm(spelled=True), ["h0", "h1"]),
    "flattened post-norm": (lambda: post_norm(flat=True), ["h0", "h1"]),
    "opt": (opt, ["h0", "h1"]),
    "nemotron": (lambda: blocks(*NEMOTRON), ["h0", "h1", "h2", "h3", "h4"]),
}
DECLARED = {"nemotron": LayerCount(5, NEMOTRON)}


def feeds(model: ir.Model) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    sizes = {"x": (2, 4, WIDTH), "encoder_hidden_states": (2, 3, WIDTH)}
    return {v.name or "": random.normal(size=sizes[v.name or ""]).astype(np.float32) for v in model.graph.inputs}


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("what", MODELS)
def test_the_guard_edits_what_the_next_layer_reads(what: str, positions: str) -> None:
    """At every layer: the guarded graph is the unguarded one with the edit put in at the state itself."""
    make, names = MODELS[what]
    for layer, name in enumerate(names):
        spec = GuardSpec(mode="project", positions=positions)  # type: ignore[arg-type]
        done = guard_model(make(), directions((layer,), 2), spec, DECLARED.get(what))
        source = make()
        dissect(source, DECLARED.get(what))  # infers types exactly as was done to the graph that was guarded
        assert all(check.ok for check in prove_structure(source, done.model, done.anatomy, done.plan, done.report))
        states, logits = edited_by_hand(make(), name, done, positions)
        assert states.shape == (2, 4, WIDTH)
        found = run(done.model, feeds(done.model))["logits"]
        np.testing.assert_allclose(found, logits, rtol=2e-4, atol=2e-4)
        assert np.abs(logits - run(make(), feeds(make()))["logits"]).max() > 1e-2


def edited_by_hand(model: ir.Model, name: str, done: Guarded, positions: str) -> tuple[np.ndarray, np.ndarray]:
    """The raw state called `name`, and the logits where it was replaced by the reference's."""
    state = next(output for node in model.graph for output in node.outputs if output.name == name)
    state.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(state)
    given = feeds(model)
    raw = run(model, given)[name]
    model.graph.outputs.remove(state)
    readers = tuple(state.uses())
    delta = ir.Value(name="delta", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 4, WIDTH]))
    total = ir.node("Add", [state, delta], name="by hand")
    total.outputs[0].name = "by_hand"
    for reader, at in readers:
        reader.replace_input_with(at, total.outputs[0])
    model.graph.insert_after(state.producer(), [total])  # type: ignore[arg-type]
    model.graph.inputs.append(delta)
    ends = None if positions == "all" else reference.last_token(np.ones(raw.shape[:2]))
    change = reference.guard("project", done.plan.sites[0].guard, raw, selected=ends) - raw
    return raw, run(model, given | {"delta": change.astype(np.float32)})["logits"]


@pytest.mark.parametrize("what", MODELS)
def test_tapped_states_are_the_layers_own(what: str) -> None:
    make, names = MODELS[what]
    model = make()
    anatomy = dissect(model, DECLARED.get(what))
    tap_last_token(model, anatomy.sites)
    tapped = run(model, feeds(model))[STATES_OUTPUT]
    for layer, name in enumerate(names):
        plain = make()
        state = next(output for node in plain.graph for output in node.outputs if output.name == name)
        state.type = ir.TensorType(ir.DataType.FLOAT)
        plain.graph.outputs.append(state)
        np.testing.assert_allclose(tapped[:, layer], run(plain, feeds(plain))[name][:, -1], rtol=1e-6, atol=1e-6)


# Streams that are no sequences


def test_a_paged_stream_is_refused() -> None:
    """onnxruntime-genai with `use_paged_attention`: ids `[tokens]`, sums `[tokens, width]`."""
    body = "x = Gather(table, input_ids) "
    for n, x in ((0, "x"), (1, "h0")):
        body += f"a{n} = com.microsoft.PagedAttention <num_heads = 2, kv_num_heads = 2> ({x}, {x}, {x}) h{n} = Add({x}, a{n}) "
    weights = "<float[9, 16] table, float[16, 5] head>"
    text = f"g (int64[T] input_ids) => (float[T, 5] logits) {weights} {{ {body} logits = MatMul(h1, head) }}"
    assert refusal(text_model(text)) == (
        "layer 0: the residual sum 'h0' is [tokens, width], with the tokens of all sequences on one axis (a paged or flattened "
        "graph), so which of them ends a sequence is not known; export the decoder without paged attention"
    )


def test_a_stream_with_an_axis_more_is_refused() -> None:
    body, x = "x4 = Unsqueeze(x, first) ", "x4"
    for n in range(2):
        body += attention(f"a{n}", x, x).replace("[0, 2, 1]", "[0, 1, 3, 2]") + f"h{n} = Add({x}, a{n}) "
        x = f"h{n}"
    model = graph(body, x, STREAM, "<float[16, 5] head, int64[1] first = {0}>")
    for node in model.graph:
        if node.op_type == "Add":
            node.outputs[0].shape = ir.Shape([1, "B", "S", 16])
    assert refusal(model) == (
        "layer 0: the residual sum 'h0' has 4 axes and not [batch, sequence, width] (several streams side by side), "
        "so a layer has no single hidden state; such decoders cannot be guarded"
    )


# What configs declare is in test_layer_count.py
