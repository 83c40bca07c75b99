"""A decoder in the branches of an `If` (pattern J): both branches are guarded alike, or nothing is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hand_graphs import (
    KINDS,
    WIDTH,
    Guarded,
    Kind,
    all_guards,
    copy_of,
    decoder,
    directions,
    guard_model,
    merged,
    run,
    supervisor_input,
    text_model,
)

from vlmguard.graphs.anatomy import dissect, guarded_layers
from vlmguard.graphs.errors import AnatomyNotFound, GuardError, GuardIncomplete
from vlmguard.graphs.graph_io import graph_bytes
from vlmguard.graphs.modes import guard_mode, modes_where
from vlmguard.graphs.plan import COORDINATES_OUTPUT
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.proof.strip import strip_guard
from vlmguard.graphs.proof.structure import guard_dominates, prove_structure, same_graph, sites_guarded_once
from vlmguard.graphs.reference import NO_SUPERVISOR
from vlmguard.graphs.rewrite import rewrite
from vlmguard.graphs.spec import GuardSpec
from vlmguard.graphs.subgraphs import DecoderSubgraph, branches, branching, find_bodies, surface, unsurface
from vlmguard.graphs.taps import STATES_OUTPUT, tap_guard, tap_last_token

pytest.importorskip("onnxruntime")

BOTH = ("else_branch", "then_branch")
ONCE = "every planned site guarded exactly once"
DOMINATES = "no path avoids a guard (dominators)"


def inputs(model: ir.Model, dtype: type = np.float32, pad: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Two rows of five tokens, the first with padding on the left."""
    mask = np.ones((2, 5), np.int64)
    mask[0, :pad] = 0
    embeds = np.random.default_rng(seed).normal(size=(2, 5, WIDTH)).astype(dtype)
    given = {"inputs_embeds": embeds, "attention_mask": mask}
    return {name: array for name, array in given.items() if any(value.name == name for value in model.graph.inputs)}


def both(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """What each branch says."""
    switches = {"then_branch": True, "else_branch": False}
    return {name: run(model, feeds | {"use_cache_branch": np.array([switches[name]])}) for name in BOTH}


def body_of(model: ir.Model, name: str) -> DecoderSubgraph:
    (body,) = find_bodies(model, [name])
    return body


def node_of(body: DecoderSubgraph, name: str) -> ir.Node:
    (node,) = (node for node in body.graph if node.name == name)
    return node


def guarded_merged(kind: Kind = "add", layers: int = 3, **wish: Any) -> Guarded:
    return guard_model(merged(kind, layers), directions((0, layers - 1)), GuardSpec(**wish))


# ---------------------------------------------------------------------------------------------------------------- anatomy


@pytest.mark.parametrize("kind", KINDS)
def test_both_branches_show_the_same_layers(kind: Kind) -> None:
    anatomy, plain = dissect(merged(kind, 3), 3), dissect(decoder(kind, 3))
    assert (anatomy.layer_count, anatomy.width, anatomy.certainty, anatomy.bodies) == (3, WIDTH, "confirmed", BOTH)
    assert [(site.layer_index, site.body) for site in anatomy.sites] == [(n, body) for n in range(3) for body in BOTH]
    for stream in anatomy.streams:
        assert (stream.source, stream.sink) == ("inputs_embeds", f"{stream.body}_logits")
        for site, expected in zip(stream.sites, plain.sites, strict=True):
            assert (site.kind, site.dtype) == (expected.kind, expected.dtype)
            assert (site.anchor, site.branch) == (
                f"{stream.body}_{expected.anchor}",
                f"{stream.body}_{expected.branch}",
            )
    told = anatomy.to_json()
    assert told["bodies"] == list(BOTH) and len(told["sites"]) == 6
    assert plain.bodies == ("",) and all(site.body == "" for site in plain.sites)


def refusal(model: ir.Model, expected_layers: int | None = None) -> str:
    with pytest.raises(AnatomyNotFound) as raised:
        dissect(model, expected_layers)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_branches_that_disagree_are_refused() -> None:
    assert refusal(merged(layers=2, other_layers=3)) == (
        f"the branches of the If disagree (else_branch 3 layers of width {WIDTH}, then_branch 2 layers of width {WIDTH}); "
        "a merged decoder holds the same layers in each, export it again"
    )


def test_a_count_that_is_not_the_configs_is_refused_by_branch() -> None:
    assert refusal(merged(layers=2, hidden=False), 3) == (
        "else_branch of the If 'either': the config declares 3 layers, the graph's residual stream shows 2 "
        "(else_branch_layer_0_sum to else_branch_layer_1_sum); check that config.json belongs to this graph, and "
        "that no layer was left out of it"
    )


WHOLE = """
    t{0} = Transpose <perm = [0, 2, 1]> (x) s{0} = MatMul(x, t{0}) p{0} = Softmax <axis = -1> (s{0})
    a{0} = MatMul(p{0}, x) h{0} = Add(x, a{0}) y{0} = MatMul(h{0}, w)
"""


def half_merged(other: str) -> ir.Model:
    return text_model(f"""
        g (float[B, S, 8] x, bool short) => (float[B, S, 8] y) <float[8, 8] w> {{
            y = If (short) <
                then_branch = one () => (float[B, S, 8] y1) {{ {WHOLE.format(1)} }},
                else_branch = two () => (float[B, S, 8] y2) {{ {other} }}
            >
        }}
    """)


def test_an_if_of_which_one_branch_is_no_decoder_is_refused() -> None:
    """Whoever takes that branch would get no guard."""
    sentence = refusal(half_merged("y2 = MatMul(x, w)"))
    assert sentence.startswith("else_branch of the If ")
    assert sentence.endswith(
        ": no attention found among 2 values, so there are no decoder layers; is this the decoder graph?"
    )
    assert dissect(half_merged(WHOLE.format(2))).bodies == BOTH


def test_an_if_that_the_output_does_not_come_out_of_is_no_decoder() -> None:
    text = f"""
        g (float[B, S, 8] x, bool short) => (float[B, S, 8] y, float[B, S, 8] z) <float[8, 8] w> {{
            z = If (short) <
                then_branch = one () => (float[B, S, 8] y1) {{ {WHOLE.format(1)} }},
                else_branch = two () => (float[B, S, 8] y2) {{ {WHOLE.format(2)} }}
            >
            y = MatMul(x, w)
        }}
    """
    assert refusal(text_model(text)).startswith("no attention found among ")


def test_a_small_if_behind_the_decoder_is_not_where_it_lies() -> None:
    """The head in one `If` and the decoder in another: the larger one is the decoder's."""
    model = text_model(f"""
        g (float[B, S, 8] x, bool short) => (float[B, S, 8] y) <float[8, 8] w> {{
            m = If (short) <
                then_branch = one () => (float[B, S, 8] y1) {{ {WHOLE.format(1)} }},
                else_branch = two () => (float[B, S, 8] y2) {{ {WHOLE.format(2)} }}
            >
            y = If (short) <
                then_branch = three () => (float[B, S, 8] y3) {{ y3 = MatMul(m, w) }},
                else_branch = four () => (float[B, S, 8] y4) {{ y4 = Neg(m) }}
            >
        }}
    """)
    made = guard_model(model, directions(width=8), GuardSpec(mode="project", positions="all"))
    assert made.anatomy.layer_count == 1 and made.plan.bodies == BOTH
    assert all(site.body in BOTH and site.guarded.startswith("vlmguard/") for site in made.report.sites)
    assert guard_dominates(model, made.anatomy, made.plan, made.report).ok


# --------------------------------------------------------------------------------------------------------------- guarding


@pytest.mark.parametrize("kind", KINDS)
def test_each_branch_says_what_the_decoder_alone_says(kind: Kind) -> None:
    """Every mode and position, bit for bit, the supervisor's coordinates included."""
    feeds = inputs(merged(kind))
    for spec in all_guards():
        found = directions((0, 2), rank=2, parts={"threshold": -9.0})
        together, alone = guard_model(merged(kind, 3), found, spec), guard_model(decoder(kind, 3), found, spec)
        extra = (
            {supervisor_input(str(spec.mode)): np.ones((2, 2, 2), np.float32)}
            if guard_mode(spec.mode).supervisor
            else {}
        )
        expected = run(alone.model, feeds | extra)
        assert (COORDINATES_OUTPUT in expected) == (guard_mode(spec.mode).supervisor)
        assert not np.array_equal(expected["hidden"], run(decoder(kind, 3), feeds)["hidden"])
        for said in both(together.model, feeds | extra).values():
            assert said.keys() == expected.keys()
            for name, array in expected.items():
                np.testing.assert_array_equal(said[name], array)


def test_the_branches_share_one_set_of_numbers() -> None:
    """Two sets could differ, and would cost twice."""
    together, alone = guarded_merged(), guard_model(decoder(layers=3), directions((0, 2)), GuardSpec())
    names = {name for name in together.model.graph.initializers if name.startswith("vlmguard/")}
    assert names == {name for name in alone.model.graph.initializers if name.startswith("vlmguard/")}
    assert names == set(together.report.initializers)
    assert all(not body.graph.initializers for body in find_bodies(together.model, BOTH))
    assert together.report.node_count == 2 * alone.report.node_count
    for site in together.report.sites:
        assert all(name.startswith(f"vlmguard/{site.body}/layer_{site.layer_index}/") for name in site.nodes)
    assert guarded_layers(together.model.graph) == (0, 2) == together.report.layers == together.plan.layers
    assert len(together.plan.guards) == 2 and len(together.plan.sites) == 4
    told = together.report.to_json()
    assert [(site["layer"], site["body"]) for site in told["sites"]] == [(n, b) for n in (0, 2) for b in BOTH]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", modes_where(has_threshold=True))
def test_a_closed_gate_is_exact_in_both_branches(kind: Kind, mode: str, dtype: str) -> None:
    source = merged(kind, 2, dtype=dtype)
    feeds = inputs(source, np.dtype(dtype).type)
    threshold = -1e6 if mode == "combined" else 1e6  # there listening closes what the readout would open
    closed = guard_model(
        merged(kind, 2, dtype=dtype),
        directions((0, 1), parts={"threshold": threshold}),
        GuardSpec(mode=mode),  # type: ignore[arg-type]
    )
    extra = (
        {supervisor_input(mode): np.full((2, 2, 2), NO_SUPERVISOR, np.float32)} if guard_mode(mode).supervisor else {}
    )
    expected, found = both(source, feeds), both(closed.model, feeds | extra)
    for name in BOTH:
        for output, array in expected[name].items():
            assert array.tobytes() == found[name][output].tobytes(), (name, output)


def test_what_was_merged_by_hand_is_proved_whole() -> None:
    for kind in KINDS:
        for spec in all_guards():
            source = merged(kind, 3)
            made = guard_model(merged(kind, 3), directions((0, 2)), spec)
            checks = prove_structure(source, copy_of(made.model), made.anatomy, made.plan, made.report)
            assert all(check.ok for check in checks), [check.note for check in checks]
            assert [check.compared for check in checks][1:3] == [4, 4]  # two layers, each in two branches


@pytest.mark.parametrize("branch", BOTH)
def test_a_guard_that_is_missing_in_one_branch_is_noticed(branch: str) -> None:
    made = guarded_merged(mode="project", positions="all")
    tampered = copy_of(made.model)
    body = body_of(tampered, branch)
    guard = node_of(body, f"vlmguard/{branch}/layer_0/guarded")
    raw = guard.inputs[0]
    assert raw is not None
    for reader, index in tuple(guard.outputs[0].uses()):
        reader.replace_input_with(index, raw)
    body.graph.remove(guard)
    check = guard_dominates(tampered, made.anatomy, made.plan, made.report)
    assert not check.ok and check.note == "layer 0: the guarded value is gone"
    total = made.report.node_count
    once = sites_guarded_once(tampered, made.plan, made.report)
    assert (once.ok, once.note) == (False, f"{total - 1} guard nodes in the graph, {total} reported")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("branch", BOTH)
def test_a_reader_that_goes_round_the_guard_in_one_branch_is_noticed(branch: str, kind: Kind) -> None:
    made = guarded_merged(kind, mode="project", positions="all")
    tampered = copy_of(made.model)
    body = body_of(tampered, branch)
    guard = node_of(body, f"vlmguard/{branch}/layer_0/guarded")
    raw = guard.inputs[0]
    assert raw is not None
    reader, index = guard.outputs[0].uses()[0]
    reader.replace_input_with(index, raw)
    note = guard_dominates(tampered, made.anatomy, made.plan, made.report).note
    assert f"layer 0: {raw.name!r} is read past the guard" in note


def test_a_branch_that_is_gone_is_noticed() -> None:
    made = guarded_merged()
    tampered = copy_of(made.model)
    (owner,) = branching(tampered.graph)
    owner.attributes["third_branch"] = owner.attributes.pop("else_branch")
    check = guard_dominates(tampered, made.anatomy, made.plan, made.report)
    assert (check.ok, check.note) == (False, "body 'else_branch' is no longer in the graph")


def test_a_plan_for_another_graph_is_refused() -> None:
    model = merged(layers=2)
    plan = plan_guard(model, dissect(model), directions((1,)), GuardSpec(mode="project"))
    with pytest.raises(GuardIncomplete) as refused:
        rewrite(decoder(layers=2), plan)
    assert str(refused.value) == ("layer 1: no node makes 'else_branch_hidden'; was the plan made for this graph?")


def test_a_merged_decoder_is_not_guarded_twice() -> None:
    made = guarded_merged()
    with pytest.raises(GuardError) as refused:
        rewrite(made.model, made.plan)
    assert str(refused.value) == "this decoder already carries a guard; start again from the unguarded model"


# -------------------------------------------------------------------------------------------------------------- taking out


@pytest.mark.parametrize("kind", KINDS)
def test_a_stripped_merged_graph_is_the_source_byte_for_byte(kind: Kind) -> None:
    for spec in all_guards():
        for hidden in (True, False):
            model = merged(kind, 3, hidden=hidden)
            source = graph_bytes(copy_of(model))
            guard_model(model, directions((0, 2)), spec)
            stripped = copy_of(model)
            assert graph_bytes(stripped) != source
            strip_guard(stripped)
            assert same_graph("stripped", merged(kind, 3, hidden=hidden), stripped).ok, spec
            assert graph_bytes(stripped) == source


def test_tampering_inside_a_branch_stays_in_sight() -> None:
    model = guarded_merged().model
    body = body_of(model, "then_branch")
    reader = node_of(body, "then_branch make layer_1_branch")
    weight = reader.inputs[1]
    assert weight is not None and weight.name == "w1"
    reader.replace_input_with(1, model.graph.initializers["w0"])
    strip_guard(model)
    assert not same_graph("stripped", merged(layers=3), model).ok


# ------------------------------------------------------------------------------------------------- values that leave a body


def test_tapped_states_are_the_decoders_own() -> None:
    feeds = inputs(merged())
    for kind in KINDS:
        alone, together = decoder(kind, 3, hidden=False), merged(kind, 3, hidden=False)
        for model in (alone, together):
            tap_last_token(model, dissect(model).sites)
        expected = run(alone, feeds)[STATES_OUTPUT]
        assert expected.shape == (2, 3, WIDTH)
        for said in both(together, feeds).values():
            np.testing.assert_array_equal(said[STATES_OUTPUT], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_states_around_a_guard_are_shown_from_the_branch_that_ran(kind: Kind) -> None:
    feeds = inputs(merged())
    shown = []
    for make in (decoder, merged):
        made = guard_model(make(kind, 2), directions((0, 1)), GuardSpec(mode="project"))
        names = tap_guard(made.model, made.plan, made.report)
        assert names == [(f"vlmguard.raw.{n}", f"vlmguard.guarded.{n}") for n in (0, 1)]
        shown.append((made.model, [name for pair in names for name in pair]))
    (alone, names), (together, _) = shown
    expected = run(alone, feeds)
    for said in both(together, feeds).values():
        for name in names:
            np.testing.assert_array_equal(said[name], expected[name])


@pytest.mark.parametrize("make", [decoder, merged])
def test_unsurface_undoes_surface(make: Callable[..., ir.Model]) -> None:
    model = make(layers=2)
    before = graph_bytes(copy_of(model))
    anatomy = dissect(model)
    for name in ("one", "two"):
        bodies = find_bodies(model, anatomy.bodies)
        values = {}
        for body in bodies:
            node = ir.node("Identity", [body.values()["inputs_embeds"]], name=f"{body.path}{name}")
            body.graph.append(node)
            values[body] = node.outputs[0]
        surface(model, values, name, ir.Shape([None, None, WIDTH]))
        assert model.graph.outputs[-1].name == name
        assert model.graph.outputs[-1].dtype == ir.DataType.FLOAT
    feeds = inputs(model)
    said = both(model, feeds).values() if make is merged else [run(model, feeds)]
    for outputs in said:
        np.testing.assert_array_equal(outputs["one"], feeds["inputs_embeds"])
        np.testing.assert_array_equal(outputs["two"], feeds["inputs_embeds"])
    for name in ("one", "two", "three"):  # in the order of coming, and one that never was
        unsurface(model, name)
    for body in find_bodies(model, anatomy.bodies):
        body.graph.remove([node for node in body.graph if node.op_type == "Identity"], safe=True)
    assert graph_bytes(copy_of(model)) == before


def test_a_branch_with_fewer_outputs_than_its_if_is_refused() -> None:
    """No runtime would open it; whoever made such a file gets a sentence."""
    model = merged()
    body_of(model, "then_branch").graph.outputs.pop()
    assert refusal(model) == "then_branch of the If 'either' has 1 outputs, the If 2; export it again"
    tampered = guarded_merged(mode="supervise").model
    for _ in range(3):
        body_of(tampered, "then_branch").graph.outputs.pop()
    strip_guard(tampered)
    assert "the If 2; export it again" in refusal(tampered)


def test_a_value_leaves_every_branch_or_none() -> None:
    model = merged()
    (owner,) = branching(model.graph)
    first, second = branches(owner)
    value = first.graph.outputs[0]
    with pytest.raises(AssertionError, match="every branch, or none"):
        surface(model, {first: value}, "x", ir.Shape([]))
    with pytest.raises(AssertionError, match="one body, or all branches of one If"):
        surface(model, {first: value, DecoderSubgraph("", model.graph): value}, "x", ir.Shape([]))
    assert [body.name for body in (first, second)] == list(BOTH)
