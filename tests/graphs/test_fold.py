"""`fold`: what is folded equals projections by nodes, to the last writer; and where it would be wrong it is refused.

The decoders are text: embedding, one attention and one MLP per layer, all that a fold has to look through.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hand_graphs import WIDTH, copy_of, directions, orthonormal, run, text_model, uncalibrated
from text_decoder import EMBED, IDS, decoder

from vlmguard.graphs.anatomy import DecoderAnatomy, dissect
from vlmguard.graphs.dtypes import NUMPY_DTYPES
from vlmguard.graphs.errors import DirectionMismatch, GuardError
from vlmguard.graphs.lowerings.fold import (
    SCOPE,
    find_writers,
    folded_weights,
    left_over,
    original_name,
    projected,
    subspace,
)
from vlmguard.graphs.plan import GuardPlan
from vlmguard.graphs.planner import last_sites, plan_guard
from vlmguard.graphs.proof.fold_proof import (
    nodes_unchanged,
    other_weights_untouched,
    project_explicitly,
    prove_fold,
    refolded,
    writers_orthogonal,
)
from vlmguard.graphs.proof.strip import strip_guard
from vlmguard.graphs.proof.structure import Check
from vlmguard.graphs.rewrite import GuardReport, rewrite
from vlmguard.graphs.spec import GuardSpec

SPEC = GuardSpec(mode="project", positions="all", lowering="fold", direction_of=0)


def planned(model: ir.Model, rank: int = 1, spec: GuardSpec = SPEC) -> tuple[DecoderAnatomy, GuardPlan]:
    anatomy = dissect(model)
    return anatomy, plan_guard(model, anatomy, uncalibrated((0,), rank), spec)


def folded(source: ir.Model, rank: int = 1) -> tuple[ir.Model, DecoderAnatomy, GuardPlan, GuardReport]:
    model = copy_of(source)
    anatomy, plan = planned(model, rank)
    return model, anatomy, plan, rewrite(model, plan)


def by_name(checks: tuple[Check, ...]) -> dict[str, bool]:
    return {check.name: check.ok for check in checks}


# ------------------------------------------------------------------------------------------ what is linear is looked through

SPELLINGS: dict[str, dict[str, str]] = {
    "plain": {},
    "scaled embedding": {"embed": "e0 = Gather(table, input_ids) e = Mul(e0, four)", "weights": "float four"},
    "positions": {
        "embed": "i = Cast <to = 7> (input_ids) e0 = Gather(table, input_ids) e1 = Gather(places, i) e = Add(e0, e1)",
        "weights": "float[8, 16] places",
    },
    "biases": {
        "attention": "c{n} = MatMul(m{n}, o{n}) a{n} = Add(bias{n}, c{n})",
        "weights": "float[16] bias0, float[16] bias1",
    },
    "Gemm": {
        "attention": "r{n} = Reshape(m{n}, flat) g{n} = Gemm <transB = 1> (r{n}, o{n}, bias{n}) a{n} = Reshape(g{n}, rows)",
        "weights": "int64[2] flat, int64[3] rows, float[16] bias0, float[16] bias1",
    },
    "transposed weight": {
        "mlp": "w{n} = Transpose <perm = [1, 0]> (t{n}) b{n} = MatMul(f{n}, w{n})",
        "weights": "float[16, 24] t0, float[16, 24] t1",
    },
    "cast weight": {"mlp": "w{n} = Cast <to = 1> (d{n}) b{n} = MatMul(f{n}, w{n})"},
    "scaled branch": {"mlp": "w{n} = MatMul(f{n}, d{n}) b{n} = Div(w{n}, four)", "weights": "float four"},
    "parallel": {"mlp": "b0{n} = MatMul(f{n}, d{n}) b1{n} = MatMul(m{n}, o{n}) b{n} = Sum(b0{n}, b1{n})"},
    "tied head": {"head": "t = Transpose <perm = [1, 0]> (table) logits = MatMul(y1, t)"},
}


def spelled(name: str) -> ir.Model:
    model = decoder(**SPELLINGS[name])
    if "flat" in model.graph.initializers:
        model.graph.initializers["flat"].const_value = ir.Tensor(np.array([-1, WIDTH]), name="flat")
        model.graph.initializers["rows"].const_value = ir.Tensor(np.array([*IDS.shape, WIDTH]), name="rows")
    if "four" in model.graph.initializers:
        model.graph.initializers["four"].const_value = ir.Tensor(np.array(4, np.float32), name="four")
    return model


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", SPELLINGS)
def test_a_folded_graph_is_the_graph_with_every_writer_projected(name: str, rank: int) -> None:
    source = spelled(name)
    model, anatomy, plan, report = folded(source, rank)
    reference = copy_of(source)
    dissect(reference)
    assert project_explicitly(reference, plan) >= 5
    expected, found, plain = (run(one, {"input_ids": IDS})["logits"] for one in (reference, model, source))
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < 1e-5 * scale
    assert np.abs(found - plain).max() > 1e-2 * scale
    dissect(source)
    assert set(by_name(prove_fold(source, model, anatomy, plan, report)).values()) == {True}


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_sum_of_the_stream_is_orthogonal(dtype: str, rank: int) -> None:
    source = decoder(dtype=dtype)
    model, _, plan, _ = folded(source, rank)
    names = ["e", "x0", "y0", "x1", "y1"]
    shares = {}
    for what, one in (("plain", source), ("folded", model)):
        values = {value.name: value for node in one.graph for value in node.outputs}
        one.graph.outputs.extend(values[name] for name in names)
        states = run(one, {"input_ids": IDS})
        c = [states[name].astype(np.float64) @ plan.sites[0].guard.ssd.T for name in names]
        shares[what] = [np.abs(each).max() / np.abs(states[name]).max() for each, name in zip(c, names, strict=True)]
    assert min(shares["plain"]) > 0.05
    assert max(shares["folded"]) < (1e-6 if dtype == "float32" else 2e-3)


def test_both_branches_of_a_merged_decoder_read_the_same_folded_weights() -> None:
    source = decoder(merged=True)
    model, anatomy, plan, report = folded(source)
    assert anatomy.bodies == ("else_branch", "then_branch")
    assert len(report.initializers) == 5
    reference = copy_of(source)
    dissect(reference)
    assert project_explicitly(reference, plan) == 10
    for use_cache in (False, True):
        feeds = {"input_ids": IDS, "use_cache": np.array(use_cache)}
        expected, found, plain = (run(one, feeds)["logits"] for one in (reference, model, source))
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max() < np.abs(found - plain).max()
    dissect(source)
    assert set(by_name(prove_fold(source, model, anatomy, plan, report)).values()) == {True}


def test_nothing_is_added_but_weights() -> None:
    source = decoder()
    model, _, plan, report = folded(source)
    assert report.layers == (0, 1) and report.node_count == 0
    assert sorted(report.initializers) == [f"{SCOPE}{name}" for name in ("d0", "d1", "o0", "o1", "table")]
    assert not {"d0", "d1", "o0", "o1", "table"} & set(model.graph.initializers)
    assert [node.name for node in model.graph] == [node.name for node in source.graph]
    assert set(folded_weights(model.graph)) == set(report.initializers)
    assert model.metadata_props["vlmguard.lowering"] == "fold"
    assert "fold: 5 weights write the stream, and are written again without the direction" in plan.notes


def test_a_tied_head_keeps_the_table_that_it_had() -> None:
    model, _, plan, _ = folded(spelled("tied head"))
    assert {"table", f"{SCOPE}table"} <= set(model.graph.initializers)
    assert node_readers(model, "table") == {"Transpose"} and node_readers(model, f"{SCOPE}table") == {"Gather"}
    assert any("table has other readers too" in note for note in plan.notes)


def node_readers(model: ir.Model, name: str) -> set[str]:
    return {node.op_type for node in model.graph.initializers[name].consumers()}


def test_weights_are_read_when_they_are_written_out() -> None:
    """Planning and folding a graph of tens of gigabytes reads none of them."""
    source = decoder()
    dissect(source)  # the text syntax has no types, and inferring them reads
    read: list[str] = []
    for name, value in source.graph.initializers.items():
        value.const_value = watched(value.const_value, name, read)
    _, plan = planned(source)
    report = rewrite(source, plan)
    assert read == []
    for name in report.initializers:
        source.graph.initializers[name].const_value.numpy()  # type: ignore[union-attr]
    assert sorted(read) == ["d0", "d1", "o0", "o1", "table"]


def watched(tensor: ir.TensorProtocol | None, name: str, read: list[str]) -> ir.LazyTensor:
    assert tensor is not None

    def load() -> ir.TensorProtocol:
        read.append(name)
        return tensor

    return ir.LazyTensor(load, tensor.dtype, ir.Shape(tensor.shape.numpy()), name=name)


# -------------------------------------------------------------------------------------------------------------- refusals

NORM = "n{n} = MatMul(f{n}, d{n}) "
REFUSED: dict[str, tuple[Callable[[], ir.Model], str]] = {
    "norm": (
        lambda: decoder(mlp=NORM + "b{n} = LayerNormalization <axis = -1> (n{n}, gain)", weights="float[16] gain"),
        "LayerNormalization 'b1' writes to the stream, and a norm stands between the projection and the sum",
    ),
    "norm spelled out": (
        lambda: decoder(mlp=NORM + "b{n} = Mul(gain, n{n})", weights="float[16] gain"),
        "Mul 'b1' writes to the stream, and it scales each channel by its own number, as a norm between projection and sum "
        "does",
    ),
    "gate": (
        lambda: decoder(mlp="w{n} = MatMul(f{n}, d{n}) b{n} = Mul(w{n}, m{n})"),
        "Mul 'b1' writes to the stream, and it multiplies two parts of the flow (a gate, or a norm), which is not linear",
    ),
    "activation": (
        lambda: decoder(mlp="w{n} = MatMul(f{n}, d{n}) b{n} = Tanh(w{n})"),
        "Tanh 'b1' writes to the stream, and it is no lookup and no product with a float weight",
    ),
    "injection": (
        lambda: decoder(
            embed="t = Gather(table, input_ids) c = Cast <to = 9> (input_ids) z = Unsqueeze(c, last) e = Where(z, t, spare)",
            weights="int64[1] last, float[16] spare",
        ),
        "Where 'e' writes to the stream, and it puts numbers into the stream that no weight made (image features, an injection "
        "between layers)",
    ),
    "two parts of the flow": (
        lambda: decoder(attention="q{n} = MatMul(k{n}, m{n}) a{n} = MatMul(m{n}, q{n})"),
        "MatMul 'a1' writes to the stream, and it multiplies two parts of the flow, so there is no weight to fold",
    ),
    "quantized weight": (
        lambda: decoder(
            mlp="w{n} = DequantizeLinear(i{n}, step) b{n} = MatMul(f{n}, w{n})",
            weights="int8[24, 16] i0, int8[24, 16] i1, float step",
        ),
        "MatMul 'b1' writes to the stream, and its weights are quantized",
    ),
    "quantized product": (
        lambda: decoder(
            mlp="b{n} = com.microsoft.MatMulNBits <K = 24, N = 16, bits = 4, block_size = 16> (f{n}, i{n}, step{n})",
            weights="uint8[16, 2, 8] i0, uint8[16, 2, 8] i1, float[32] step0, float[32] step1",
        ),
        "MatMulNBits 'b1' writes to the stream, and its weights are quantized",
    ),
    "a shared transposed table": (
        lambda: decoder(
            embed="t = Transpose <perm = [1, 0]> (lm) e = Gather(t, input_ids)",
            head="v = Transpose <perm = [1, 0]> (t) logits = MatMul(y1, v)",
            weights="float[16, 8] lm",
        ),
        "Gather 'e' writes to the stream, and its weight 'lm' is shared with others behind a Transpose",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_it_would_be_wrong_it_is_refused(name: str) -> None:
    make, sentence = REFUSED[name]
    model = make()
    for node in model.graph:  # the text syntax has no node names
        node.name = ""
        for value in node.outputs:
            if value.name in {"b0", "b1", "a0", "a1", "e"}:
                value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["B", "S", WIDTH])
    with pytest.raises(GuardError) as refusal:
        planned(model)
    assert str(refusal.value) == f"fold: {sentence}; choose --lowering lowrank"


def test_embeddings_from_outside_are_refused() -> None:
    model = decoder()
    dissect(model)
    (gather,) = (node for node in model.graph if node.op_type == "Gather")
    outside = ir.Value(name="inputs_embeds", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", "S", WIDTH]))
    model.graph.inputs[0] = outside
    gather.outputs[0].replace_all_uses_with(outside)
    model.graph.remove(gather)
    with pytest.raises(GuardError) as refusal:
        planned(model)
    assert str(refusal.value) == (
        "fold: the stream begins at the input 'inputs_embeds', whose numbers come from outside the graph; choose --lowering "
        "lowrank"
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"positions": "last"},
            "fold changes weights, so every token; use --positions all, or choose --lowering lowrank",
        ),
        (
            {"layers": (1,)},
            "fold changes the whole stream, layer 0 is not among the requested layers; guard all of them with one direction "
            "(--direction-of N), or choose --lowering lowrank",
        ),
        (
            {"direction_of": None},
            "fold projects the whole stream by one direction, the layers have different ones; name the layer whose direction "
            "all of them take (--direction-of N), or choose --lowering lowrank",
        ),
        ({"mode": "restore"}, "lowering 'fold' cannot write mode 'restore'; choose lowrank or rank1"),
    ],
)
def test_it_takes_one_direction_everywhere(changes: dict[str, object], sentence: str) -> None:
    parts = {"mode": "project", "positions": "all", "lowering": "fold", "direction_of": 0} | changes
    model = decoder()
    with pytest.raises(GuardError) as refusal:
        plan_guard(model, dissect(model), directions((0, 1)), GuardSpec(**parts))  # type: ignore[arg-type]
    assert str(refusal.value) == sentence


# ----------------------------------------------------------------------------------------- one layer's direction everywhere


def test_one_layers_direction_serves_all_layers() -> None:
    model = decoder()
    spec = GuardSpec(mode="project", direction_of=1)
    plan = plan_guard(model, dissect(model), directions((1,)), spec)
    assert plan.layers == (0, 1)
    for site in plan.sites:
        np.testing.assert_array_equal(site.guard.ssd, orthonormal(2, seed=1))
    assert "the direction of layer 1 in every guarded layer, as requested" in plan.notes


def test_a_direction_that_is_not_there_is_refused() -> None:
    model = decoder()
    with pytest.raises(DirectionMismatch, match="the directions have no layer 1 for --direction-of, only layers 0"):
        plan_guard(model, dissect(model), directions((0,)), GuardSpec(mode="project", direction_of=1))
    with pytest.raises(GuardError, match="--direction-of is for mode project, restore reads each layer's own"):
        plan_guard(model, dissect(model), directions((0,)), GuardSpec(mode="restore", direction_of=0))
    with pytest.raises(GuardError, match="layers count from 0"):
        GuardSpec(direction_of=-1)


# ----------------------------------------------------------------------------------------------- the proof fails where it must


def test_a_writer_that_was_left_out_is_seen() -> None:
    source = decoder()
    model, anatomy, plan, report = folded(source)
    tampered = model.graph.initializers[f"{SCOPE}d1"]
    tampered.const_value = source.graph.initializers["d1"].const_value
    check = writers_orthogonal(model, anatomy, plan, report.initializers)
    assert not check.ok and "'vlmguard/fold/d1' writes" in check.note
    assert check.worst > 1000


def test_a_number_that_is_none_is_seen() -> None:
    model, anatomy, plan, _ = folded(decoder())
    value = model.graph.initializers[f"{SCOPE}o0"]
    array = value.const_value.numpy().copy()  # type: ignore[union-attr]
    array[0, 0] = np.nan
    value.const_value = ir.Tensor(array, name=value.name)
    assert not writers_orthogonal(model, anatomy, plan).ok


def test_another_writer_is_seen() -> None:
    """A weight that goes into the stream and was never folded, and a node that was added for it."""
    source = decoder()
    model, anatomy, plan, _ = folded(source)
    extra = copy_of(model)
    value = ir.Value(name="late", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([WIDTH]))
    value.const_value = ir.Tensor(np.ones(WIDTH, np.float32), name="late")
    extra.graph.register_initializer(value)
    node = next(node for node in extra.graph if node.outputs[0].name == "b1")
    sum_node = ir.node("Add", [node.outputs[0], value], outputs=[ir.Value(name="b1_late", type=node.outputs[0].type)])
    node.outputs[0].replace_all_uses_with(sum_node.outputs[0])
    sum_node.replace_input_with(0, node.outputs[0])
    extra.graph.insert_after(node, [sum_node])
    assert "'late' writes the stream, and was not folded" in writers_orthogonal(extra, anatomy, plan).note
    assert not nodes_unchanged(source, extra).ok
    assert not other_weights_untouched(source, extra, anatomy).ok


def test_a_weight_that_does_not_write_the_stream_is_compared() -> None:
    source = decoder()
    model, anatomy, *_ = folded(source)
    assert other_weights_untouched(source, model, anatomy).ok
    up = model.graph.initializers["up0"]
    up.const_value = ir.Tensor(up.const_value.numpy() * 2, name="up0")  # type: ignore[union-attr]
    assert not other_weights_untouched(source, model, anatomy).ok


def test_folding_again_gives_the_same_bits() -> None:
    source = decoder()
    model, *_ = folded(source)
    again, *_ = folded(source)
    assert refolded(again, model).ok
    one = model.graph.initializers[f"{SCOPE}table"]
    array = one.const_value.numpy().copy()  # type: ignore[union-attr]
    array[0, 0] = np.nextafter(array[0, 0], np.float32(9))
    one.const_value = ir.Tensor(array, name=one.name)
    assert not refolded(again, model).ok


def test_without_its_names_a_folded_graph_has_the_sources_nodes() -> None:
    for name in ("plain", "tied head"):
        source = spelled(name)
        model, anatomy, *_ = folded(source)
        strip_guard(model)
        assert set(model.graph.initializers) == set(source.graph.initializers)
        dissect(source)
        assert nodes_unchanged(source, model).ok
        assert dissect(model).sites == anatomy.sites


# ------------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_left_is_what_rounding_explains(dtype: str, axis: int) -> None:
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(NUMPY_DTYPES[dtype])
    basis = subspace(orthonormal(3, 64))
    seen, explained = left_over(projected(weight, axis, basis), axis, basis)
    assert 0 < seen <= explained
    before, allowed = left_over(weight, axis, basis)
    assert before > 10 * allowed
    twice = projected(projected(weight, axis, basis), axis, basis)
    assert np.abs(twice.astype(np.float64) - projected(weight, axis, basis).astype(np.float64)).max() <= explained


def test_a_large_weight_is_read_in_blocks() -> None:
    weight = np.random.default_rng(0).normal(size=(300_000, 16)).astype(np.float32)
    basis = subspace(orthonormal(1))
    whole = weight.astype(np.float64)
    np.testing.assert_allclose(projected(weight, 1, basis), whole - (whole @ basis.T) @ basis, atol=1e-6)


def test_a_name_says_what_it_stands_for() -> None:
    assert original_name(f"{SCOPE}a/b.weight") == "a/b.weight"
    assert original_name(f"{SCOPE}table/axis_0") == "table"
    assert original_name("a/b.weight") == "a/b.weight"


def test_the_writers_of_a_fused_sum_are_found() -> None:
    """`SkipLayerNormalization` sums inside: residual, branch and a bias of its own."""
    text = f"""
    g (int64[B, S] input_ids) => (float[B, S, 5] logits) <float[8, 16] table, float[16, 16] o, float[16] gain, float[16] shift,
        float[16] bias, float[16, 5] head> {{
        {EMBED}
        k = Transpose <perm = [0, 2, 1]> (e)
        s = MatMul(e, k)
        p = Softmax <axis = -1> (s)
        m = MatMul(p, e)
        a = MatMul(m, o)
        n, , , h = com.microsoft.SkipLayerNormalization(e, a, gain, shift, bias)
        logits = MatMul(n, head)
    }}"""
    source = text_model(text)
    anatomy = dissect(source)
    assert {writer.weight.name for writer in find_writers(source, last_sites(anatomy), WIDTH)} == {"table", "o", "bias"}
