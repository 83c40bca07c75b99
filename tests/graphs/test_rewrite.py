"""The rewrite, on real exports of every pattern: counted, proved, equal to PyTorch with hooks, and undone to the source."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
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
    layer_directions,
    node_called,
    run,
    supervisor_input,
    text_model,
    value_called,
)
from zoo.makers import ZooModel
from zoo.table import SELDOM

from vlmguard.graphs import reference
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.directions import Directions, LayerDirections
from vlmguard.graphs.errors import GuardError, GuardIncomplete
from vlmguard.graphs.graph_io import external_files, graph_bytes, load_graph, save_graph
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.modes import POSITIONS, guard_mode
from vlmguard.graphs.package import ModelPackage
from vlmguard.graphs.plan import SUPERVISOR_INPUT, GuardPlan
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.proof.strip import strip_guard
from vlmguard.graphs.proof.structure import guard_dominates, prove_structure, same_graph
from vlmguard.graphs.rewrite import rewrite
from vlmguard.graphs.spec import GuardSpec

pytest.importorskip("onnxruntime")

from zoo.oracle import SLACK

from vlmguard.exporter.proof.inputs import random_inputs
from vlmguard.exporter.proof.prove import prove_by_running
from vlmguard.runtime.decoder import open_decoder

Zoo = Callable[[str], ZooModel]
Feeds = dict[str, np.ndarray]
Execute = Callable[[Feeds], Feeds]
MIDDLE, LAST = 1, 3


# -------------------------------------------------------------------------------------------- real exports, every pattern


@dataclass(frozen=True)
class Row:
    """A real export, the guard that it gets, and how much of it there must be.

    Attributes:
        readers: how many uses of each guarded sum now read the guard instead.
    """

    name: str
    mode: str
    positions: str
    nodes: int
    initializers: int
    readers: tuple[int, int]
    lowering: str = "auto"

    @property
    def spec(self) -> GuardSpec:
        return GuardSpec(mode=self.mode, positions=self.positions, lowering=self.lowering)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.name}-{self.mode}-{self.positions}"


ROWS = (
    # A: the sum is read by the spelled-out norm twice and by the next sum; behind the last layer there is no next sum
    Row("llava-transformers-fp32", "restore", "last", nodes=60, initializers=17, readers=(3, 2)),
    Row("llama-dynamo-cache-fp32-opset20", "supervise", "last", nodes=73, initializers=18, readers=(3, 2)),
    # A with one RMSNormalization
    Row("llama-dynamo-fp32-opset23", "project", "all", nodes=2, initializers=2, readers=(2, 1), lowering="dense"),
    # A3: the norm reads a Cast of the sum
    Row("llava-transformers-fp16", "steer", "all", nodes=22, initializers=15, readers=(2, 1)),
    # A'': norm and next sum both read one Cast
    Row("llama-torchscript-fp32", "supervise", "all", nodes=57, initializers=16, readers=(1, 1)),
    # A4: float16 weights, float32 sums, so a float32 guard
    Row("llama-torchscript-fp16", "restore", "last", nodes=53, initializers=16, readers=(2, 1)),
    Row("llava-torchscript-fp16", "project", "last", nodes=49, initializers=10, readers=(2, 1)),
    # B: one fused node reads the branch
    Row("llama-genai-fp32", "restore", "last", nodes=53, initializers=17, readers=(1, 1)),
    Row("llama-genai-fp32", "supervise", "last", nodes=65, initializers=18, readers=(1, 1)),
    Row("llama-genai-fp32", "combined", "last", nodes=71, initializers=23, readers=(1, 1)),
    Row("llama-genai-fp32", "steer", "all", nodes=18, initializers=11, readers=(1, 1)),
    Row("llama-genai-fp32", "project", "last", nodes=40, initializers=8, readers=(1, 1), lowering="dense"),
    Row("llama-genai-fp16", "restore", "last", nodes=59, initializers=21, readers=(1, 1)),
    Row("llama-genai-fp16", "supervise", "all", nodes=65, initializers=24, readers=(1, 1)),
    Row("llama-genai-fp16", "combined", "all", nodes=71, initializers=27, readers=(1, 1)),
    Row("llama-genai-int4", "restore", "all", nodes=18, initializers=9, readers=(1, 1)),
    Row("llama-genai-embeds-fp32", "steer", "last", nodes=53, initializers=17, readers=(1, 1)),
    # B': the summands the other way round
    Row("llava-transformers-ort-fp32", "restore", "all", nodes=18, initializers=9, readers=(1, 1)),
    Row("llava-transformers-ort-fp16", "supervise", "last", nodes=82, initializers=25, readers=(1, 1)),
)


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.zoo if row.name in SELDOM else (), id=str(row)) for row in ROWS]
)
def test_a_real_export_is_guarded_and_proved(zoo: Zoo, row: Row, tmp_path: Path) -> None:
    model = zoo(row.name)
    package = open_package(model.path)
    graph, source = package.load_decoder(), package.load_decoder()
    dissect(source)
    guarded = guard_model(graph, directions_for(row, model), row.spec)
    assert_counted(row, guarded, source)
    staged = saved_beside_its_weights(graph, package, tmp_path)
    assert_proved(row, model, package, staged, source, guarded)
    assert_equals_hooks(row, model, guarded.plan, open_decoder(package, staged).runner.run)
    stripped = load_graph(staged)
    strip_guard(stripped)
    assert same_graph("stripped", source, stripped).note == ""


def assert_counted(row: Row, guarded: Guarded, source: ir.Model) -> None:
    report = guarded.report
    assert report.layers == (MIDDLE, LAST)
    assert (report.node_count, len(report.initializers)) == (row.nodes, row.initializers)
    assert tuple(site.readers for site in report.sites) == row.readers
    assert len(guarded.model.graph) == len(source.graph) + row.nodes


def saved_beside_its_weights(graph: ir.Model, package: ModelPackage, folder: Path) -> Path:
    staged = folder / package.decoder.name
    save_graph(graph, staged)
    for data in external_files(package.decoder):
        shutil.copyfile(data, folder / data.name)
    return staged


def assert_proved(
    row: Row, model: ZooModel, package: ModelPackage, staged: Path, source: ir.Model, guarded: Guarded
) -> None:
    """Every check of the proof holds for the file as it would ship."""
    plan, report = guarded.plan, guarded.report
    checks = prove_structure(source, load_graph(staged), guarded.anatomy, plan, report)
    inputs = random_inputs(open_decoder(package), model.width, 299, pads=model.padding == "left", why="no tokenizer")
    checks += prove_by_running(package, staged, plan, report, inputs)
    assert [check for check in checks if not check.ok] == []
    half = any(site.site.dtype == "float16" for site in plan.sites)  # then the headroom is one check more
    # tokens outside the positions, where there are such; forced gates, where there are gates; the text-only pass, likewise
    assert (
        len(checks)
        == 6 + (row.positions == "last") + (row.mode != "project") + (guard_mode(row.mode).supervisor) + half
    )


def directions_for(row: Row, model: ZooModel) -> Directions:
    """Thresholds in the middle of what the layers' gates read here, so that some open and some do not."""
    layers = {number: layer_directions(2, model.width, number, threshold=0.0) for number in (MIDDLE, LAST)}
    if guard_mode(row.mode).has_threshold and not guard_mode(row.mode).toward_text:
        for number in layers:
            threshold = widest_gap(gate_scores(row, model, layers, number))
            layers[number] = layer_directions(2, model.width, number, threshold=threshold)
    return Directions(model.width, layers, alpha=1.5)


def gate_scores(row: Row, model: ZooModel, layers: dict[int, LayerDirections], number: int) -> np.ndarray:
    """What the gate of a layer reads in torch, with the layers below it guarded already."""
    from zoo.truth import recorded_layers

    feeds = prompt(model)
    below = {n: numbers_of(layer) for n, layer in layers.items() if n < number}
    with (
        hooked(model, below, row, feeds, supervisor_for(row, len(below))),
        recorded_layers(model.torch_decoder) as states,
    ):
        model.run_torch(feeds)
    layer = layers[number]
    scores = states[number] @ (layer.readout if guard_mode(row.mode).has_readout else layer.ssd[0])
    return scores[edited_tokens(row, model, feeds)]


def edited_tokens(row: Row, model: ZooModel, feeds: Feeds) -> np.ndarray:
    counted = model.counted(feeds)
    return counted if row.positions == "all" else reference.last_token(counted)[..., 0] == 1


def widest_gap(scores: np.ndarray) -> float:
    """The middle of the widest gap among the middle half of the scores."""
    ordered = np.sort(scores)
    middle = ordered[len(ordered) // 4 : 1 + 3 * len(ordered) // 4]
    at = int(np.diff(middle).argmax())
    return float(np.float32(middle[at : at + 2].mean()))


def numbers_of(layer: LayerDirections) -> reference.LayerGuard:
    shift = float(np.float32(layer.threshold - layer.text_threshold))
    return reference.LayerGuard(layer.ssd, layer.origin, layer.target, layer.readout, layer.threshold, 1.5, shift)


def prompt(model: ZooModel) -> Feeds:
    return model.make_feeds(batch=4, sequence=7, pad=3)


def hooked(model: ZooModel, layers: dict, row: Row, feeds: Feeds, supervisor: np.ndarray | None):
    import torch
    from torch_hooks import HookedGuard

    guard = HookedGuard(layers, row.mode, row.positions)
    rows = None
    if supervisor is not None:
        rows = {number: torch.from_numpy(supervisor[:, index]) for index, number in enumerate(layers)}
    guard.set_call(torch.from_numpy(feeds["attention_mask"]), rows)
    return guard.attached(model.torch_decoder.layers)


def supervisor_for(row: Row, layers: int = 2) -> np.ndarray | None:
    """`[batch, layers, rank]`: every pair of open and closed gates, of the first so many layers."""
    if not guard_mode(row.mode).supervisor:
        return None
    coordinates = np.random.default_rng(0).normal(size=(4, 2, 2)).astype(np.float32)
    coordinates[:, :, 0] = [(1, -1), (-1, 1), (-1, -1), (1, 1)]
    return coordinates[:, :layers]


def assert_equals_hooks(row: Row, model: ZooModel, plan: GuardPlan, execute: Execute) -> None:
    """The guarded graph's logits are those of the torch model with hooks, and not those without."""
    feeds, supervisor = prompt(model), supervisor_for(row)
    extra = {} if supervisor is None else {SUPERVISOR_INPUT: supervisor}
    found = execute(feeds | extra)["logits"].astype(np.float32)
    unguarded = model.logits(feeds)
    with hooked(model, {site.layer_index: site.guard for site in plan.sites}, row, feeds, supervisor):
        expected = model.logits(feeds)
    counted = model.counted(feeds)
    assert np.abs(found - expected)[counted].max() < SLACK * model.tolerance
    moved = np.abs(expected - unguarded).max(axis=-1)
    assert moved[counted].max() > 2 * SLACK * model.tolerance
    if plan.mode != "project" and plan.positions == "last":  # else each token sees those before it, which were edited
        assert (moved[edited_tokens(row, model, feeds)] == 0).any()


# --------------------------------------------------------------------------------------------------- outputs that are the sum


@pytest.mark.parametrize("positions", POSITIONS)
def test_an_output_that_is_the_sum_keeps_its_name_and_is_guarded(positions: str) -> None:
    source, model = decoder(), decoder()
    report = guard_model(model, directions(), GuardSpec(mode="project", positions=positions)).report  # type: ignore[arg-type]
    assert [output.name for output in model.graph.outputs] == ["logits", "hidden"]
    (site,) = report.sites
    assert (site.raw, site.guarded) == ("hidden/unguarded", "hidden")
    assert site.readers == 2  # the head and the output
    assert model.graph.outputs[1].dtype == ir.DataType.FLOAT
    assert str(model.graph.outputs[1].shape) == str(source.graph.outputs[1].shape)
    feeds = {"inputs_embeds": np.ones((1, 2, WIDTH), np.float32), "attention_mask": np.ones((1, 2), np.int64)}
    ssd = directions().layers[0].ssd
    assert np.abs(run(source, feeds)["hidden"][:, -1] @ ssd.T).max() > 0.1
    assert np.abs(run(model, feeds)["hidden"][:, -1] @ ssd.T).max() < 1e-5


def test_a_middle_sum_that_is_an_output_is_guarded_too() -> None:
    """As `output_hidden_states` exports them: read by the next layer, and given out."""
    source, model = decoder(layers=2, hidden=False), decoder(layers=2, hidden=False)
    for graph in (source.graph, model.graph):
        total = value_called(source if graph is source.graph else model, "layer_0_sum")
        graph.outputs.append(total)
    made = guard_model(model, directions(), GuardSpec(mode="restore", tau=-100.0))
    assert [output.name for output in model.graph.outputs] == ["logits", "layer_0_sum"]
    assert made.report.sites[0].readers == 5  # four in the next layer, and the output
    checks = prove_structure(source, model, made.anatomy, made.plan, made.report)
    assert all(check.ok for check in checks)
    strip_guard(model)
    assert same_graph("stripped", source, model).ok


def test_a_body_that_captures_the_sum_reads_the_guard() -> None:
    """The head inside an If: only for the last token, or not at all."""
    text = """
        g (float[B, S, 8] x, bool short) => (float[B, S, 8] y) <float[8, 8] w> {
            t = Transpose <perm = [0, 2, 1]> (x)
            s = MatMul(x, t)
            p = Softmax <axis = -1> (s)
            a = MatMul(p, x)
            h = Add(x, a)
            y = If (short) <
                then_branch = one () => (float[B, S, 8] y1) { y1 = MatMul(h, w) },
                else_branch = two () => (float[B, S, 8] y2) { y2 = Neg(h) }
            >
        }
    """
    source, model = text_model(text), text_model(text)
    made = guard_model(model, directions(width=8), GuardSpec(mode="project", positions="all"))
    assert made.report.sites[0].readers == 2
    assert guard_dominates(model, made.anatomy, made.plan, made.report).ok
    x = np.random.default_rng(0).normal(size=(1, 3, 8)).astype(np.float32)
    found = run(model, {"x": x, "short": np.array(False)})["y"]
    assert np.abs(found @ directions(width=8).layers[0].ssd.T).max() < 1e-5
    strip_guard(model)
    dissect(source)  # which infers the types that the file does not have
    assert same_graph("stripped", source, model).ok


# ------------------------------------------------------------------------------------------------------- what is written down


def test_the_report_counts_what_was_done() -> None:
    model = decoder("skip_norm", layers=2)
    report = guard_model(model, directions((0, 1)), GuardSpec(mode="project")).report
    assert report.to_json() == {
        "layers": [0, 1],
        "nodes": 35,
        "initializers": len([name for name in model.graph.initializers if name.startswith("vlmguard/")]),
        "added_inputs": [],
        "added_outputs": [],
        "sites": [
            {
                "layer": number,
                "body": "",
                "kind": "skip_norm",
                "raw": f"layer_{number}_branch",
                "guarded": f"vlmguard/layer_{number}/guarded",
                "nodes": 5,
            }
            for number in (0, 1)
        ],
    }
    names = [node.name for node in model.graph if (node.name or "").startswith("vlmguard/")]
    assert sorted(names) == sorted([*report.shared_nodes, *report.sites[0].nodes, *report.sites[1].nodes])
    assert {name for name in model.graph.initializers if name.startswith("vlmguard/")} == set(report.initializers)


def test_the_supervised_signature_is_reported() -> None:
    model = decoder(layers=2)
    report = guard_model(model, directions((0, 1), rank=3), GuardSpec(mode="supervise")).report
    assert (report.added_inputs, report.added_outputs) == (("vlmguard.supervisor",), ("vlmguard.coordinates",))
    supervisor, coordinates = model.graph.inputs[-1], model.graph.outputs[-1]
    for value in (supervisor, coordinates):
        assert value.dtype == ir.DataType.FLOAT
        assert list(map(str, value.shape)) == ["batch", "2", "3"]
    assert (supervisor.name, coordinates.name) == ("vlmguard.supervisor", "vlmguard.coordinates")


def test_the_file_itself_says_what_was_done() -> None:
    model = guard_model(decoder(layers=2), directions((0, 1)), GuardSpec(mode="steer", positions="all")).model
    again = copy_of(model)
    assert again.metadata_props == {
        "vlmguard.schema": "vlmguard.guarded/1",
        "vlmguard.mode": "steer",
        "vlmguard.layers": "0,1",
        "vlmguard.positions": "all",
        "vlmguard.lowering": "lowrank",
    }
    node = node_called(again, "vlmguard/layer_1/guarded")
    assert node.metadata_props == {
        "vlmguard.layer": "1",
        "vlmguard.mode": "steer",
        "vlmguard.positions": "all",
        "vlmguard.lowering": "lowrank",
    }


def test_the_same_plan_gives_the_same_bytes() -> None:
    contents = {graph_bytes(guard_model(decoder(), directions(), GuardSpec()).model) for _ in range(3)}
    assert len(contents) == 1


# ------------------------------------------------------------------------------------------------------- graphs that are valid


@pytest.mark.parametrize("opset", [13, 15, 17, 18, 20, 21, 23, 24])
def test_the_guard_is_valid_in_every_operator_set(opset: int) -> None:
    """Operators changed under way: axes became inputs (13), new attributes appeared (18), new dtypes (21, 23)."""
    feeds = {"inputs_embeds": np.ones((2, 3, WIDTH), np.float32), "attention_mask": np.ones((2, 3), np.int64)}
    seen = []
    for spec in all_guards():
        model = guard_model(decoder(opset=opset), directions(), spec).model
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        extra = (
            {supervisor_input(str(spec.mode)): np.ones((2, 1, 2), np.float32)}
            if guard_mode(spec.mode).supervisor
            else {}
        )
        seen.append(run(model, feeds | extra)["hidden"])
    assert all(np.isfinite(hidden).all() for hidden in seen)
    oldest = guard_model(decoder(opset=13), directions(), GuardSpec(mode="restore", positions="all")).model
    newest = guard_model(decoder(opset=opset), directions(), GuardSpec(mode="restore", positions="all")).model
    np.testing.assert_allclose(run(newest, feeds)["hidden"], run(oldest, feeds)["hidden"], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_nodes_are_in_order_and_names_are_not_used_twice(kind: Kind) -> None:
    for spec in all_guards():
        model = guard_model(decoder(kind, layers=3), directions((0, 1, 2)), spec).model
        known = {value.name for value in model.graph.inputs} | set(model.graph.initializers)
        names = []
        for node in model.graph:
            assert {value.name for value in node.inputs if value is not None} <= known
            made = [value.name for value in node.outputs if value.name]
            assert not known & set(made)
            known.update(made)
            names.append(node.name)
        assert len(set(names)) == len(names)


# ---------------------------------------------------------------------------------------------------------------- refusals


def unchanged_after(model: ir.Model, action: Callable[[], object], kind: type[GuardError]) -> str:
    before = graph_bytes(model)
    with pytest.raises(GuardError) as refusal:
        action()
    assert type(refusal.value) is kind and "\n" not in str(refusal.value)
    assert graph_bytes(model) == before
    return str(refusal.value)


def test_a_plan_for_another_graph_is_refused() -> None:
    """Before anything changes: the first site fits, the second does not."""
    other = decoder(layers=2)
    plan = plan_guard(other, dissect(other), directions((0, 1)), GuardSpec())
    model = decoder(layers=3)
    assert unchanged_after(model, lambda: rewrite(model, plan), GuardIncomplete) == (
        "layer 1: 'hidden' sums ['layer_2_attention_sum', 'layer_2_branch'], the plan has "
        "['layer_1_attention_sum', 'layer_1_branch']; was the plan made for this graph?"
    )
    model = decoder(layers=2, hidden=False)
    assert unchanged_after(model, lambda: rewrite(model, plan), GuardIncomplete) == (
        "layer 1: no node makes 'hidden'; was the plan made for this graph?"
    )


def test_a_plan_for_another_export_is_refused(zoo: Zoo) -> None:
    other = load_graph(zoo("llama-torchscript-fp32").path)
    plan = plan_guard(other, dissect(other), directions((1,), width=64), GuardSpec())
    model = load_graph(zoo("llama-genai-fp32").path)
    anchor = plan.sites[0].site.anchor
    assert unchanged_after(model, lambda: rewrite(model, plan), GuardIncomplete) == (
        f"layer 1: no node makes {anchor!r}; was the plan made for this graph?"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_guarded_graph_is_not_guarded_again(kind: Kind) -> None:
    source = decoder(kind, layers=2)
    plan = plan_guard(source, dissect(source), directions((1,)), GuardSpec())
    model = guard_model(decoder(kind, layers=2), directions((0,)), GuardSpec()).model
    assert unchanged_after(model, lambda: rewrite(model, plan), GuardError) == (
        "this decoder already carries a guard; start again from the unguarded model"
    )


def test_a_plan_without_layers_guards_nothing_and_says_so() -> None:
    model = decoder()
    plan = replace(plan_guard(model, dissect(model), directions(), GuardSpec(mode="project")), sites=())
    with pytest.raises(GuardIncomplete) as refusal:
        rewrite(model, plan)
    assert str(refusal.value) == "the plan names no layer to guard; nothing was written"
