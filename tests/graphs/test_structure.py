"""Every static check can fail: graphs that were tampered with, the check that catches each, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hand_graphs import KINDS, Kind, copy_of, decoder, directions, guard_model, node_called, text_model, value_called

from vlmguard.graphs.anatomy import DecoderAnatomy, dissect
from vlmguard.graphs.graph_io import load_graph
from vlmguard.graphs.modes import MODES, POSITIONS
from vlmguard.graphs.node_builder import NodeBuilder
from vlmguard.graphs.plan import GuardPlan
from vlmguard.graphs.proof.structure import (
    Check,
    exact,
    guard_dominates,
    initializers_untouched,
    prove_structure,
    same_graph,
    signature_unchanged,
    sites_guarded_once,
)
from vlmguard.graphs.rewrite import GuardReport
from vlmguard.graphs.spec import GuardSpec

SIGNATURE = "inputs and outputs unchanged"
ONCE = "every planned site guarded exactly once"
DOMINATES = "no path avoids a guard (dominators)"
UNTOUCHED = "untouched initializers identical"


@dataclass
class Case:
    """A guarded graph, to be tampered with."""

    source: ir.Model
    guarded: ir.Model
    anatomy: DecoderAnatomy
    plan: GuardPlan
    report: GuardReport

    @property
    def graph(self) -> ir.Graph:
        return self.guarded.graph

    def node(self, name: str) -> ir.Node:
        return node_called(self.guarded, name)

    def value(self, name: str) -> ir.Value:
        return value_called(self.guarded, name)

    def weight(self, name: str) -> ir.Value:
        return self.graph.initializers[name]

    def failures(self) -> dict[str, str]:
        """What the checks that do not hold say."""
        checks = prove_structure(self.source, self.guarded, self.anatomy, self.plan, self.report)
        assert [check.name for check in checks] == [SIGNATURE, ONCE, DOMINATES, UNTOUCHED]
        return {check.name: check.note for check in checks if not check.ok}


def case(kind: Kind = "add", layers: tuple[int, ...] = (0, 1), mode: str = "restore", positions: str = "all") -> Case:
    source, model = decoder(kind, layers=3), decoder(kind, layers=3)
    made = guard_model(model, directions(layers), GuardSpec(mode=mode, positions=positions))  # type: ignore[arg-type]
    return Case(source, copy_of(model), made.anatomy, made.plan, made.report)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mode", MODES)
def test_an_honest_rewrite_passes(mode: str, positions: str, kind: Kind) -> None:
    honest = case(kind, (0, 2), mode, positions)
    checks = prove_structure(honest.source, honest.guarded, honest.anatomy, honest.plan, honest.report)
    assert [check.ok for check in checks] == [True] * 4
    # two inputs and two outputs, two sites, two sites, every weight
    assert [check.compared for check in checks] == [4, 2, 2, len(honest.source.graph.initializers)]
    assert checks[1].note == f"{honest.report.node_count} nodes"
    assert all(check.worst == check.limit == 0.0 for check in checks)


# ------------------------------------------------------------------------------------------------ the guard, gone or avoided


def test_a_guard_node_that_is_gone_is_noticed() -> None:
    tampered = case(mode="project")
    guard, raw = tampered.node("vlmguard/layer_0/guarded"), tampered.value("layer_0_sum")
    for reader, index in tuple(guard.outputs[0].uses()):
        reader.replace_input_with(index, raw)
    tampered.graph.remove(guard)
    assert tampered.failures() == {
        ONCE: "5 guard nodes in the graph, 6 reported",
        DOMINATES: "layer 0: the guarded value is gone",
    }


def test_a_consumer_that_reads_past_the_guard_is_noticed() -> None:
    """Four nodes read the sum; it is enough that one of them reads the old one."""
    for reader in ("make layer_1_keys", "make layer_1_scores", "make layer_1_mixed", "make layer_1_attention_sum"):
        tampered = case()
        node = tampered.node(reader)
        at = [value.name for value in node.inputs].index("vlmguard/layer_0/guarded")
        node.replace_input_with(at, tampered.value("layer_0_sum"))
        assert tampered.failures() == {
            DOMINATES: "layer 0: 'layer_0_sum' is read past the guard; layer 0: a path avoids the guard"
        }


def test_a_sum_that_is_made_again_past_the_guard_is_noticed() -> None:
    """Nobody reads the raw sum, and still there is a way around: the same Add once more."""
    tampered = case()
    builder = NodeBuilder(tampered.graph, "x")
    again = builder.op("again", "Add", [tampered.value("layer_0_attention_sum"), tampered.value("layer_0_branch")])
    builder.nodes[0].name = "innocent"
    tampered.graph.insert_after(tampered.node("make layer_0_sum"), builder.nodes)
    tampered.node("make layer_1_attention_sum").replace_input_with(0, again)
    assert tampered.failures() == {DOMINATES: "layer 0: a path avoids the guard"}


def branch(name: str, value: ir.Value) -> ir.Graph:
    node = ir.node("Identity", [value], outputs=[ir.Value(name=f"{name} of {value.name}")])
    return ir.Graph([], node.outputs, nodes=[node], name=name)


def test_an_if_that_routes_around_the_guard_is_noticed() -> None:
    tampered = case()
    raw, guarded = tampered.value("layer_0_sum"), tampered.value("vlmguard/layer_0/guarded")
    readers = tuple(guarded.uses())
    first = readers[0][0]
    condition = ir.node("IsNaN", [tampered.value("inputs_embeds")])
    condition.outputs[0].name = "some condition"
    route = ir.node(
        "If",
        [condition.outputs[0]],
        {"then_branch": branch("then", guarded), "else_branch": branch("else", raw)},
        outputs=[ir.Value(name="routed")],
    )
    tampered.graph.insert_before(first, [condition, route])
    for reader, index in readers:
        reader.replace_input_with(index, route.outputs[0])
    assert tampered.failures() == {
        DOMINATES: "layer 0: 'layer_0_sum' is read past the guard; layer 0: a path avoids the guard"
    }


def test_a_guard_that_hangs_loose_is_noticed() -> None:
    """All of its nodes are there, and nobody reads what they make."""
    tampered = case()
    for reader, index in tuple(tampered.value("vlmguard/layer_1/guarded").uses()):
        reader.replace_input_with(index, tampered.value("layer_1_sum"))
    assert tampered.failures() == {
        DOMINATES: "layer 1: 'layer_1_sum' is read past the guard; layer 1: a path avoids the guard"
    }


def test_a_raw_sum_that_leaks_as_an_output_is_noticed() -> None:
    tampered = case()
    tampered.graph.outputs.append(tampered.value("layer_1_sum"))
    assert tampered.failures() == {
        SIGNATURE: "added outputs are ('layer_1_sum',), planned ()",
        DOMINATES: "layer 1: 'layer_1_sum' is read past the guard",
    }


def test_a_last_sum_that_stays_an_output_is_noticed() -> None:
    """The graph gives out its last state: it must be the guarded one, under the old name."""
    tampered = case(layers=(2,))
    raw, guarded = tampered.value("hidden/unguarded"), tampered.value("hidden")
    guarded.name, raw.name = "vlmguard/layer_2/guarded", "hidden"
    tampered.graph.outputs[1] = raw
    tampered.report = replace(
        tampered.report, sites=(replace(tampered.report.sites[0], raw="hidden", guarded="vlmguard/layer_2/guarded"),)
    )
    assert tampered.failures() == {DOMINATES: "layer 2: 'hidden' is read past the guard"}


# ----------------------------------------------------------------------------------------------------- fused nodes, the same


def test_a_fused_node_that_gets_its_old_branch_back_is_noticed() -> None:
    tampered = case("skip_norm", (1,))
    tampered.node("make layer_1_norm").replace_input_with(1, tampered.value("layer_1_branch"))
    assert tampered.failures() == {
        DOMINATES: "layer 1: 'layer_1_branch' is read past the guard; layer 1: a path avoids the guard"
    }


def test_a_guarded_branch_that_goes_to_another_layer_is_noticed() -> None:
    tampered = case("skip_norm", (1,))
    tampered.node("make layer_1_norm").replace_input_with(1, tampered.value("layer_1_attention_norm"))
    tampered.node("make layer_2_attention_norm").replace_input_with(1, tampered.value("vlmguard/layer_1/guarded"))
    assert tampered.failures() == {DOMINATES: "layer 1: a path avoids the guard"}


def test_a_guarded_branch_that_is_used_as_something_else_is_noticed() -> None:
    """As the weight of the norm it reaches the node, but not the sum."""
    tampered = case("skip_norm", (1,))
    node = tampered.node("make layer_1_norm")
    node.replace_input_with(1, tampered.value("layer_1_attention_norm"))
    node.replace_input_with(2, tampered.value("vlmguard/layer_1/guarded"))
    assert tampered.failures() == {DOMINATES: "layer 1: a path avoids the guard"}


def test_a_way_around_a_fused_node_is_noticed() -> None:
    tampered = case("skip_norm", (1,))
    tampered.node("make layer_2_attention_norm").replace_input_with(0, tampered.value("layer_0_sum"))
    assert tampered.failures() == {DOMINATES: "layer 1: a path avoids the guard"}


# ---------------------------------------------------------------------------------------------------- where it says it is not


def test_a_guard_at_another_layer_is_noticed() -> None:
    """Guarded at layer 0, reported at layer 1, and every name of the guard says layer 1."""
    tampered, honest = case(layers=(0,)), case(layers=(1,))
    for node in tampered.graph:
        if (node.name or "").startswith("vlmguard/"):
            node.name = node.name.replace("layer_0", "layer_1")
            node.outputs[0].name = str(node.outputs[0].name).replace("layer_0", "layer_1")
    tampered.plan, tampered.report = honest.plan, honest.report
    assert tampered.failures() == {
        DOMINATES: "layer 1: 'layer_1_sum' is read past the guard",
    }


def test_names_of_another_layer_are_noticed() -> None:
    tampered, honest = case(layers=(0,)), case(layers=(1,))
    tampered.plan, tampered.report = honest.plan, honest.report
    failures = tampered.failures()
    assert set(failures) == {ONCE, DOMINATES}
    assert failures[DOMINATES] == "layer 1: the guarded value is gone"


def test_a_layer_that_was_planned_and_not_guarded_is_noticed() -> None:
    honest, less = case(layers=(0, 1)), case(layers=(0,))
    check = sites_guarded_once(less.guarded, honest.plan, less.report)
    assert not check.ok
    assert check.note == "planned layers (0, 1), guarded (0,) (1 of 2 sites)"


def test_a_layer_that_is_reported_twice_is_noticed() -> None:
    honest = case(layers=(0,))
    twice = replace(honest.report, sites=honest.report.sites * 2)
    check = sites_guarded_once(honest.guarded, honest.plan, twice)
    assert not check.ok
    assert check.note == "planned layers (0,), guarded (0,) (2 of 1 sites); 8 guard nodes in the graph, 16 reported"


@pytest.mark.parametrize("name", ["vlmguard/layer_0/opens", "vlmguard/extra"])
def test_a_node_too_many_is_noticed(name: str) -> None:
    tampered = case(layers=(0,))
    extra = ir.node("Identity", [tampered.value("logits")], name=name)
    tampered.graph.append(extra)
    assert tampered.failures() == {ONCE: "9 guard nodes in the graph, 8 reported"}


def test_a_source_or_sink_that_is_gone_is_noticed() -> None:
    honest = case()
    for part in ("source", "sink"):
        (stream,) = honest.anatomy.streams
        anatomy = replace(honest.anatomy, streams=(replace(stream, **{part: "elsewhere"}),))
        check = guard_dominates(honest.guarded, anatomy, honest.plan, honest.report)
        assert not check.ok
        names = [anatomy.source, anatomy.sink]
        assert check.note == f"'{names[0]}' or '{names[1]}' is no longer in the graph"


# -------------------------------------------------------------------------------------------------------------- the signature


def renamed_input(graph: ir.Graph) -> None:
    graph.inputs[0].name = "embeds"


def other_dtype(graph: ir.Graph) -> None:
    graph.inputs[1].dtype = ir.DataType.INT32


def other_shape(graph: ir.Graph) -> None:
    graph.inputs[0].shape = ir.Shape([1, "sequence", 16])


def swapped_inputs(graph: ir.Graph) -> None:
    first = graph.inputs.pop(0)
    graph.inputs.append(first)


def dropped_input(graph: ir.Graph) -> None:
    del graph.inputs[1]


@pytest.mark.parametrize("change", [renamed_input, other_dtype, other_shape, swapped_inputs])
def test_an_input_that_is_not_the_sources_is_noticed(change: Callable[[ir.Graph], None]) -> None:
    tampered = case()
    change(tampered.graph)
    check = signature_unchanged(tampered.source, tampered.guarded, tampered.plan)
    assert not check.ok
    assert check.note == "inputs differ from the source"


def test_an_input_that_is_gone_is_noticed() -> None:
    tampered = case()
    dropped_input(tampered.graph)
    assert tampered.failures()[SIGNATURE] == "inputs differ from the source"


def test_an_output_that_is_not_the_sources_is_noticed() -> None:
    tampered = case()
    tampered.graph.outputs[0].name = "scores"
    assert (
        signature_unchanged(tampered.source, tampered.guarded, tampered.plan).note == "outputs differ from the source"
    )
    swapped = case()
    swapped.graph.outputs.append(swapped.graph.outputs.pop(0))
    assert swapped.failures()[SIGNATURE] == "outputs differ from the source"


def test_an_input_too_many_is_noticed() -> None:
    tampered = case()
    tampered.graph.inputs.append(ir.Value(name="extra", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1])))
    assert tampered.failures() == {SIGNATURE: "added inputs are ('extra',), planned ()"}


def test_planned_inputs_and_outputs_must_be_there() -> None:
    tampered = case(mode="supervise")
    tampered.graph.outputs.pop()
    assert tampered.failures()[SIGNATURE] == "added outputs are (), planned ('vlmguard.coordinates',)"


# ---------------------------------------------------------------------------------------------------------------- the weights


def flip_last_bit(value: ir.Value) -> None:
    """One unit in the last place of the last number."""
    array = value.const_value.numpy()
    content = bytearray(array.tobytes())
    content[-array.itemsize] ^= 1
    changed = np.frombuffer(bytes(content), array.dtype).reshape(array.shape)
    assert (changed != array).sum() == 1
    value.const_value = ir.Tensor(changed, name=value.name)


def test_a_changed_bit_of_a_weight_is_noticed() -> None:
    for name in decoder(layers=3).graph.initializers:
        tampered = case()
        flip_last_bit(tampered.weight(name))
        assert tampered.failures() == {UNTOUCHED: name}


def test_a_weight_of_another_dtype_or_shape_is_noticed() -> None:
    for change in (lambda array: array.view(np.int32), lambda array: array.reshape(-1)):
        tampered = case()
        weight = tampered.weight("w1")
        weight.const_value = ir.Tensor(change(weight.const_value.numpy()), name="w1")
        assert tampered.failures() == {UNTOUCHED: "w1"}


def test_a_weight_that_is_gone_or_new_is_noticed() -> None:
    gone = case()
    gone.graph.initializers.pop("w2")
    assert gone.failures() == {UNTOUCHED: "w2"}
    new = case()
    new.graph.register_initializer(ir.Value(name="w9", const_value=ir.tensor([1.0], name="w9")))
    assert new.failures() == {UNTOUCHED: "w9"}


def test_many_changes_are_told_by_the_first_three() -> None:
    tampered = case()
    for name in ("w0", "w1", "w2", "lm_head"):
        flip_last_bit(tampered.weight(name))
    assert tampered.failures() == {UNTOUCHED: "w0; w1; w2 ..."}


@pytest.fixture
def external(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(ir.to_proto(decoder()), path, save_as_external_data=True, location="w.data", size_threshold=0)
    return path


def test_external_weights_are_compared_by_reference(external: Path) -> None:
    """Gigabytes are not read: the digest of their file covers the bytes."""
    source = load_graph(external)
    assert initializers_untouched(source, load_graph(external)).ok
    for part in ("location", "offset", "length"):
        tampered = load_graph(external)
        weight = tampered.graph.initializers["w0"]
        old = weight.const_value
        parts = {"location": old.location, "offset": old.offset, "length": old.length}
        parts[part] = "other.data" if part == "location" else (parts[part] or 0) + 4
        weight.const_value = ir.ExternalTensor(
            **parts, dtype=old.dtype, shape=old.shape, name="w0", base_dir=str(external.parent)
        )
        check = initializers_untouched(source, tampered)
        assert (check.ok, check.note) == (False, "w0")
        assert not same_graph("x", source, tampered).ok
    assert same_graph("x", source, load_graph(external)).ok


# ----------------------------------------------------------------------------------------------------- nothing compared is no


def test_a_check_counts_and_says_what_it_saw() -> None:
    assert exact("x", 3, [], "fine") == Check("x", 3, 0.0, 0.0, True, "fine")
    assert exact("x", 3, ["a", "b"], "fine") == Check("x", 3, 2.0, 0.0, False, "a; b")
    assert exact("x", 3, ["a"]).to_json() == {
        "name": "x",
        "compared": 3,
        "worst": 1.0,
        "limit": 0.0,
        "ok": False,
        "note": "a",
    }


def test_an_empty_comparison_is_not_ok() -> None:
    assert exact("x", 0, [], "fine") == Check("x", 0, 0.0, 0.0, False, "nothing was compared")
    assert exact("x", 0, ["gone"]) == Check("x", 0, 1.0, 0.0, False, "gone")


def test_proofs_about_nothing_are_not_ok() -> None:
    honest = case()
    nothing = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 18}), ir_version=9)
    no_plan, no_report = replace(honest.plan, sites=()), replace(honest.report, sites=(), shared_nodes=())
    checks = [
        signature_unchanged(nothing, nothing, honest.plan),
        sites_guarded_once(nothing, no_plan, no_report),
        guard_dominates(honest.source, honest.anatomy, no_plan, no_report),
        initializers_untouched(nothing, nothing),
        same_graph("the same", nothing, nothing),
    ]
    assert [(check.ok, check.compared, check.note) for check in checks] == [(False, 0, "nothing was compared")] * 5


# ----------------------------------------------------------------------------------------------------------- node for node


def same(expected: ir.Model, found: ir.Model) -> tuple[bool, str]:
    check = same_graph("the same", expected, found)
    assert check.ok == (not check.note)
    return check.ok, check.note


def test_a_graph_is_the_same_as_its_copy() -> None:
    for kind in KINDS:
        model = guard_model(decoder(kind, layers=2), directions(), GuardSpec()).model
        check = same_graph("the same", model, copy_of(model))
        assert check.ok
        assert check.compared == len(model.graph) + len(model.graph.initializers)


def test_one_unit_in_the_last_place_of_the_ssd_is_noticed() -> None:
    """The dominators cannot see it: this comparison with a fresh rewrite does."""
    honest, tampered = case(), case()
    flip_last_bit(tampered.weight("vlmguard/layer_1/ssd"))
    assert tampered.failures() == {}
    assert same(honest.guarded, tampered.guarded) == (False, "initializer 'vlmguard/layer_1/ssd' differs")


@pytest.mark.parametrize("name", ["vlmguard/layer_0/tau", "vlmguard/layer_0/target", "vlmguard/layer_1/rows", "w1"])
def test_a_changed_bit_of_any_number_is_noticed(name: str) -> None:
    honest, tampered = case(), case()
    flip_last_bit(tampered.weight(name))
    assert same(honest.guarded, tampered.guarded) == (False, f"initializer '{name}' differs")


def test_initializers_that_are_gone_or_new_are_noticed() -> None:
    honest, less = case(), case()
    less.graph.initializers.pop("vlmguard/layer_0/tau")
    assert same(honest.guarded, less.guarded) == (False, "initializer 'vlmguard/layer_0/tau' differs")
    assert same(less.guarded, honest.guarded) == (False, "initializer 'vlmguard/layer_0/tau' was added")


def other_operator(node: ir.Node, model: ir.Model) -> None:
    node.op_type = "Less"


def other_domain(node: ir.Node, model: ir.Model) -> None:
    node.domain = "com.example"


def other_input(node: ir.Node, model: ir.Model) -> None:
    node.replace_input_with(1, model.graph.initializers["vlmguard/layer_1/tau"])


def no_input(node: ir.Node, model: ir.Model) -> None:
    node.replace_input_with(1, None)


def swapped(node: ir.Node, model: ir.Model) -> None:
    first, second = node.inputs
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)


def new_attribute(node: ir.Node, model: ir.Model) -> None:
    node.attributes["axis"] = ir.AttrInt64("axis", 1)


@pytest.mark.parametrize("change", [other_operator, other_domain, other_input, no_input, swapped, new_attribute])
def test_a_node_that_is_another_is_noticed(change: Callable[[ir.Node, ir.Model], None]) -> None:
    honest, tampered = case(), case()
    change(tampered.node("vlmguard/layer_0/opens"), tampered.guarded)
    assert same(honest.guarded, tampered.guarded) == (False, "node 'vlmguard/layer_0/opens' differs")


def test_a_node_that_is_gone_is_noticed() -> None:
    honest, tampered = case(), case()
    tampered.graph.append(ir.node("Identity", [tampered.value("logits")], name="more"))
    assert same(honest.guarded, tampered.guarded)[1].startswith(
        f"{len(honest.graph) + 1} nodes, expected {len(honest.graph)}"
    )
    assert same(tampered.guarded, honest.guarded)[1].startswith(
        f"{len(honest.graph)} nodes, expected {len(honest.graph) + 1}"
    )


def test_another_output_name_is_noticed() -> None:
    honest, tampered = case(), case()
    tampered.value("layer_0_branch").name = "other"
    assert same(honest.guarded, tampered.guarded) == (
        False,
        "node 'make layer_0_branch' differs; node 'make layer_0_sum' differs",
    )


def test_another_signature_is_noticed() -> None:
    honest, tampered = case(), case()
    tampered.graph.inputs[0].dtype = ir.DataType.FLOAT16
    assert same(honest.guarded, tampered.guarded) == (False, "inputs or outputs differ")


def test_other_operator_sets_are_noticed() -> None:
    """The same operators may mean something else there."""
    honest, tampered = case(), case()
    tampered.guarded.graph.opset_imports[""] = 21
    assert same(honest.guarded, tampered.guarded) == (False, "operator sets differ")


def test_a_changed_number_among_thousands_in_a_node_is_noticed() -> None:
    """TorchScript keeps weights in Constant nodes; printed, a tensor of more than 1000 numbers is cut short."""

    def model(number: float) -> ir.Model:
        array = np.arange(5000, dtype=np.float32)
        array[2500] = number
        made = text_model("g (float[5000] x) => (float[5000] y) { y = Neg(x) }")
        constant = ir.node("Constant", [], {"value": ir.tensor(array)}, name="constant")
        constant.outputs[0].name = "k"
        made.graph.insert_before(next(iter(made.graph)), constant)
        return made

    assert same(model(2500), model(2500)) == (True, "")
    near = float(np.nextafter(np.float32(2500), np.float32(2501)))
    assert same(model(2500), model(near)) == (False, "node 'constant' differs")


BODY = "b () => (float[2] t) <float[2] w = {WEIGHT, 2}> { k = Constant <value_float = NUMBER> () u = Add(x, w) t = OP(u, k) }"


def with_body(weight: str = "1", number: str = "1.0", op: str = "Mul") -> ir.Model:
    body = BODY.replace("WEIGHT", weight).replace("NUMBER", number).replace("OP", op)
    return text_model(
        f"g (float[2] x, bool c) => (float[2] y) {{ y = If (c) < then_branch = {body}, else_branch = {body} > }}"
    )


@pytest.mark.parametrize("change", [{"weight": "1.0000001"}, {"number": "1.0000001"}, {"op": "Add"}])
def test_a_change_inside_a_body_is_noticed(change: dict[str, str]) -> None:
    # an If with nothing at top level but itself: one node, no initializers
    assert same(with_body(), with_body()) == (True, "")
    assert same(with_body(), with_body(**change)) == (False, "node 'y' differs")


def test_what_a_body_reads_from_outside_is_compared() -> None:
    other = with_body()
    (node,) = other.graph
    first = next(n for n in node.attributes["then_branch"].as_graph() if n.op_type == "Add")
    first.replace_input_with(0, other.graph.inputs[1])
    assert same(with_body(), other) == (False, "node 'y' differs")


# ------------------------------------------------------------------------------------------------------------- a real export


def test_the_checks_on_a_real_export(zoo) -> None:
    """One tampered reader among the hundreds of nodes that TorchScript writes."""
    path = zoo("llama-torchscript-fp16").path
    source, model = load_graph(path), load_graph(path)
    dissect(source)
    made = guard_model(model, directions((1, 3), width=64), GuardSpec())
    for index, (site, check) in enumerate(zip(made.report.sites, made.plan.sites, strict=True)):
        tampered = Case(source, copy_of(made.model), made.anatomy, made.plan, made.report)
        assert tampered.failures() == {}
        guarded, raw = tampered.value(site.guarded), tampered.value(site.raw)
        reader, at = next((r, i) for r, i in guarded.uses() if not (r.name or "").startswith("vlmguard/"))
        reader.replace_input_with(at, raw)
        failures = tampered.failures()
        assert set(failures) == {DOMINATES}, index
        assert f"layer {check.layer_index}: {site.raw!r} is read past the guard" in failures[DOMINATES]
