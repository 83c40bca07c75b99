"""Attacks on a guarded folder, one test each: what catches it when the attacker makes the manifest fit as well.

`FROM_FILES`: the folder alone gives it away. `BESIDE_SOURCE`: only `--source` does, because the folder is a guarded model,
just not of this model. `SIGNED_ONLY`: a folder that is consistent in itself and is another guard; a signature tells.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hand_graphs import directions
from onnx import TensorProto, helper, numpy_helper
from random_directions import write_directions
from small_guarded import (
    NAME,
    edit_graph,
    edit_manifest,
    guard_small,
    make_the_manifest_fit,
    make_the_plan_fit,
    node_called,
    one_ulp,
    set_numbers,
    small_model,
    tensor_called,
)
from tampering_folders import FOLDER_ATTACKS, SOURCE_ATTACKS
from tampering_graphs import GRAPH_ATTACKS
from tiny_vlm_paths import digests

from vlmguard.exporter.proof.both_sides import BothSides, open_both_sides
from vlmguard.exporter.proof.verify import Verification, verify
from vlmguard.graphs.errors import GuardError, ManifestMismatch
from vlmguard.graphs.manifest import read_manifest
from vlmguard.runtime.guarded import open_guarded_package

Attack = Callable[[Path], Any]
GUARD = "vlmguard/layer_1/guarded"
RAW = "layer_1_sum"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/`, `restore/`, `steer/` (alpha 1.5) and what else an attacker has: `other/`, guarded alike."""
    root = tmp_path_factory.mktemp("tampering")
    model = small_model(root / "model")
    guard_small(model, root / "restore", mode="restore")
    guard_small(model, root / "steer", mode="steer", alpha=1.5, tau=0.25)
    guard_small(small_model(root / "other_model", seed=1), root / "other", mode="restore")
    return root


def graph(change: Callable[[onnx.ModelProto], Any]) -> Attack:
    return lambda folder: edit_graph(folder, change)


def planned(change: Callable[[onnx.ModelProto], Any]) -> Attack:
    """The graph is changed, and the manifest's plan is what our own code makes of it."""

    def attack(folder: Path) -> None:
        edit_graph(folder, change)
        make_the_plan_fit(folder)

    return attack


def numbers(part: str, change: Callable[[np.ndarray], np.ndarray]) -> Attack:
    return graph(lambda model: set_numbers(tensor_called(model, f"vlmguard/layer_1/{part}"), change))


# ---------------------------------------------------------------------------------------------- the guard's nodes and place


def without_guard(model: onnx.ModelProto) -> None:
    """The last guard's nodes are gone, its readers read the raw sum."""
    for node in [node for node in model.graph.node if node.name.startswith("vlmguard/layer_1/")]:
        model.graph.node.remove(node)
    read_instead(model, GUARD, RAW)


def without_any_guard(model: onnx.ModelProto) -> None:
    for layer in (0, 1):
        read_instead(model, f"vlmguard/layer_{layer}/guarded", f"layer_{layer}_sum")
    for node in [node for node in model.graph.node if node.name.startswith("vlmguard/")]:
        model.graph.node.remove(node)


def read_instead(model: onnx.ModelProto, old: str, new: str, only: str | None = None) -> None:
    for node in model.graph.node:
        if only is None or node.name == only:
            node.input[:] = [new if name == old else name for name in node.input]


def bypass(model: onnx.ModelProto) -> None:
    """One consumer of three: the residual goes round the guard, attention does not."""
    read_instead(model, GUARD, RAW, only="make layer_2_attention_sum")


def bypass_by_copy(model: onnx.ModelProto) -> None:
    """The same through a copy of the sum that is added up before the guard's own."""
    at = list(model.graph.node).index(node_called(model, "make layer_1_sum"))
    model.graph.node.insert(
        at, helper.make_node("Add", ["layer_1_attention_sum", "layer_1_branch"], ["copy"], name="copy")
    )
    read_instead(model, GUARD, "copy", only="make layer_2_attention_sum")


def move_to_layer_2(model: onnx.ModelProto) -> None:
    """Layer 1's guard, with its names, behind layer 2."""
    read_instead(model, GUARD, RAW)
    own = [node for node in model.graph.node if node.name.startswith("vlmguard/layer_1/")]
    for node in own:
        model.graph.node.remove(node)
        node.input[:] = ["hidden" if name == RAW else name for name in node.input]
    model.graph.node.extend(own)
    head = node_called(model, "make logits")
    model.graph.node.remove(head)
    head.input[0] = GUARD
    model.graph.node.append(head)


def zero_times(model: onnx.ModelProto) -> None:
    """A node outside the guard's names makes nothing of its edit."""
    guard = node_called(model, GUARD)
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "scale"))
    at = list(model.graph.node).index(guard)
    model.graph.node.insert(at, helper.make_node("Mul", [guard.input[1], "scale"], ["muted"], name="muted"))
    guard.input[1] = "muted"


def if_around(model: onnx.ModelProto) -> None:
    """An If behind the guard: its other branch is the raw sum."""
    switch_off(model, GUARD)


def if_inside(model: onnx.ModelProto) -> None:
    """An If around what the guard adds, under a name of the guard's."""
    guard = node_called(model, GUARD)
    own = helper.make_graph(
        [helper.make_node("Identity", [guard.input[1]], ["on"])], "on", [], [helper.make_empty_tensor_value_info("on")]
    )
    nothing = helper.make_graph(
        [helper.make_node("Sub", [guard.input[1], guard.input[1]], ["off"])],
        "off",
        [],
        [helper.make_empty_tensor_value_info("off")],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(False), "never"))
    at = list(model.graph.node).index(guard)
    node = helper.make_node(
        "If", ["never"], ["maybe"], name="vlmguard/layer_1/maybe", then_branch=own, else_branch=nothing
    )
    model.graph.node.insert(at, node)
    guard.input[1] = "maybe"


def switch_off(model: onnx.ModelProto, value: str) -> None:
    on, off = (
        helper.make_graph(
            [helper.make_node("Identity", [read], [name])], name, [], [helper.make_empty_tensor_value_info(name)]
        )
        for name, read in (("on", value), ("off", RAW))
    )
    at = list(model.graph.node).index(node_called(model, GUARD))
    read_instead(model, value, "either")
    node = helper.make_node("If", ["switch"], ["either"], name="either", then_branch=on, else_branch=off)
    model.graph.node.insert(at + 1, node)
    model.graph.initializer.append(numpy_helper.from_array(np.array(False), "switch"))


def other_operator(model: onnx.ModelProto) -> None:
    node_called(model, "vlmguard/layer_1/opens").op_type = "Less"


# ------------------------------------------------------------------------------------------------ outputs that show too much


def output(model: onnx.ModelProto, name: str, first: bool = False) -> None:
    value = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "sequence", None])
    model.graph.output.insert(0, value) if first else model.graph.output.append(value)


def leak(model: onnx.ModelProto) -> None:
    output(model, RAW)


def leak_by_copy(model: onnx.ModelProto) -> None:
    """The unguarded sum is added up once more: no node of the source or the guard is touched."""
    model.graph.node.append(helper.make_node("Add", ["layer_1_attention_sum", "layer_1_branch"], ["copy"], name="copy"))
    output(model, "copy")


def leak_logits(model: onnx.ModelProto) -> None:
    """All of the decoder once more, unguarded, from the same embeddings to logits of its own."""
    nodes = [node for node in model.graph.node if not node.name.startswith("vlmguard/")]
    back = {f"vlmguard/layer_{layer}/guarded": f"layer_{layer}_sum" for layer in (0, 1)}
    made = {name for node in nodes for name in node.output}
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = f"second {node.name}"
        read = [back.get(name, name) for name in node.input]
        copy.input[:] = [f"second_{name}" if name in made else name for name in read]
        copy.output[:] = [f"second_{name}" for name in node.output]
        model.graph.node.append(copy)
    output(model, "second_logits")


def swap_logits(model: onnx.ModelProto) -> None:
    """The same, and the unguarded ones are called `logits`; the guarded ones are shown first, under another name."""
    leak_logits(model)
    model.graph.output.pop()
    node_called(model, "make logits").output[0] = "decoy"
    node_called(model, "second make logits").output[0] = "logits"
    output(model, "decoy", first=True)


# -------------------------------------------------------------------------------------- files that two readers read otherwise


def second_threshold(model: onnx.ModelProto) -> None:
    """Two initializers of one name: which of them a runtime takes is its own affair."""
    tensor = tensor_called(model, "vlmguard/layer_1/tau")
    model.graph.initializer.append(
        numpy_helper.from_array(np.full_like(numpy_helper.to_array(tensor), 99), tensor.name)
    )


def sparse_threshold(model: onnx.ModelProto) -> None:
    values = numpy_helper.from_array(np.array([99], np.float32), "vlmguard/layer_1/tau")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0], np.int64), "at"), [1])
    model.graph.sparse_initializer.append(sparse)


def second_form(model: onnx.ModelProto) -> None:
    """Numbers in two fields of one tensor."""
    tensor = tensor_called(model, "vlmguard/layer_1/tau")
    tensor.float_data.append(99)


def own_greater(model: onnx.ModelProto) -> None:
    """A model-local function that makes another Greater of Greater: no gate ever opens."""
    body = [helper.make_node("Less", ["a", "b"], ["c"])]
    made = helper.make_function("", "Greater", ["a", "b"], ["c"], body, [helper.make_opsetid("", 18)])
    model.functions.append(made)


def second_attribute(model: onnx.ModelProto) -> None:
    gate = node_called(model, "vlmguard/layer_1/gate")
    gate.attribute.append(helper.make_attribute("to", int(TensorProto.BOOL)))


def threshold_as_input(model: onnx.ModelProto) -> None:
    """An initializer that is an input too is a default: whoever runs the model sets another threshold."""
    tensor = tensor_called(model, "vlmguard/layer_1/tau")
    model.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, list(tensor.dims)))


# ------------------------------------------------------------------------------------------------------------ other files


def swap_decoder(folder: Path) -> None:
    """The unguarded decoder under the guarded one's name."""
    shutil.copyfile(folder.parent / "model" / NAME, folder / NAME)


def swap_guarded_decoder(folder: Path) -> None:
    """Another model's decoder, guarded alike: nothing in the folder contradicts it."""
    for name in (NAME, f"{NAME}.data"):
        shutil.copyfile(folder.parent / "other" / name, folder / name)


def truncate(folder: Path) -> None:
    data = folder / f"{NAME}.data"
    data.write_bytes(data.read_bytes()[:-4])


def edit_weight(folder: Path) -> None:
    data = folder / f"{NAME}.data"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)


def swap_offsets(model: onnx.ModelProto) -> None:
    first, second = tensor_called(model, "w0"), tensor_called(model, "w1")
    places = [list(tensor.external_data) for tensor in (first, second)]
    for tensor, place in ((first, places[1]), (second, places[0])):
        kept = [(entry.key, entry.value) for entry in place]
        del tensor.external_data[:]
        for key, value in kept:
            tensor.external_data.add(key=key, value=value)


def other_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')


def other_directions(folder: Path) -> None:
    write_directions(folder / "directions.safetensors", directions((0, 1), parts={"threshold": 7.0}))


def plan_says(change: Callable[[dict], Any]) -> Attack:
    return lambda folder: edit_manifest(folder, lambda manifest: change(manifest["decoders"][0]["plan"]))


def fewer_layers(plan: dict) -> None:
    """As if layer 1 had never been planned."""
    plan.update(layers=[0], sites=plan["sites"][:1])


def without_numbers(model: onnx.ModelProto) -> None:
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name.startswith("vlmguard/layer_1/")]:
        model.graph.initializer.remove(tensor)


def one_gate(model: onnx.ModelProto) -> None:
    """The gates of all layers as they are written for layer 0 alone."""
    for name in ("thresholds", "level"):
        model.graph.node.remove(next(node for node in model.graph.node if node.name == f"vlmguard/gates/{name}"))
    for node in model.graph.node:
        for old, new in (("thresholds", "layer_0/tau"), ("level_of_layer_0", "gates/levels_selected")):
            for index, name in enumerate(node.input):
                if name == f"vlmguard/gates/{old}":
                    node.input[index] = f"vlmguard/{new}"


def metadata(model: onnx.ModelProto, key: str, value: str) -> None:
    entry = next((entry for entry in model.metadata_props if entry.key == key), None)
    (entry if entry is not None else model.metadata_props.add(key=key)).value = value


def fewer_layers_everywhere(folder: Path) -> None:
    """The guard of layer 1 is gone from the graph, the plan and the spec."""
    edit_graph(folder, without_guard)
    edit_graph(folder, without_numbers)
    edit_graph(folder, one_gate)
    edit_graph(folder, lambda model: metadata(model, "vlmguard.layers", "0"))
    edit_manifest(folder, lambda manifest: manifest["spec"].update(layers=[0]))
    plan_says(fewer_layers)(folder)


def everything_fits(folder: Path) -> None:
    """Graph, directions and plan together: a threshold that no state passes."""
    before = directions((0, 1))
    after = directions((0, 1), parts={"threshold": 9e5})
    write_directions(folder / "directions.safetensors", after)
    assert before.layers[0].threshold != after.layers[0].threshold
    for layer in (0, 1):
        edit_graph(
            folder,
            lambda model, layer=layer: set_numbers(
                tensor_called(model, f"vlmguard/layer_{layer}/tau"),
                lambda old: old * np.float32(9e5 / before.layers[0].threshold),
            ),
        )
        plan_says(lambda plan, layer=layer: plan["sites"][layer].update(tau=9e5))(folder)


FROM_FILES: dict[str, tuple[str, Attack]] = {
    "the guard of one layer removed": ("restore", graph(without_guard)),
    "every guard removed": ("restore", graph(without_any_guard)),
    "bypassed for one consumer": ("restore", graph(bypass)),
    "bypassed for one consumer by a copy of the sum": ("restore", graph(bypass_by_copy)),
    "moved to another layer": ("restore", graph(move_to_layer_2)),
    "its edit times zero": ("restore", graph(zero_times)),
    "an If around the guard": ("restore", graph(if_around)),
    "an If inside the guard": ("restore", graph(if_inside)),
    "Less instead of Greater": ("restore", graph(other_operator)),
    "V changed": ("restore", numbers("ssd", np.zeros_like)),
    "V changed by one ulp": ("restore", numbers("ssd", one_ulp)),
    "alpha changed": ("steer", numbers("alpha", np.zeros_like)),
    "alpha changed by one ulp": ("steer", numbers("alpha", one_ulp)),
    "tau changed": ("restore", numbers("tau", lambda a: a + 99)),
    "tau changed by one ulp": ("restore", numbers("tau", one_ulp)),
    "the readout changed": ("restore", numbers("rows", lambda a: np.roll(a, 1, axis=1))),
    "the readout changed by one ulp": ("restore", numbers("rows", one_ulp)),
    "the target changed": ("restore", numbers("target", np.negative)),
    "the target changed by one ulp": ("restore", numbers("target", one_ulp)),
    "an output more: the raw sum": ("restore", graph(leak)),
    "an output more: a copy of the raw sum": ("restore", graph(leak_by_copy)),
    "an output more: unguarded logits": ("restore", graph(leak_logits)),
    "unguarded logits under the guarded ones' name": ("restore", graph(swap_logits)),
    "a second threshold of the same name": ("restore", graph(second_threshold)),
    "a sparse threshold of the same name": ("restore", graph(sparse_threshold)),
    "a threshold in two forms": ("restore", graph(second_form)),
    "an attribute twice": ("restore", graph(second_attribute)),
    "Greater defined anew": ("restore", graph(own_greater)),
    "the threshold made an input": ("restore", graph(threshold_as_input)),
    "the unguarded decoder swapped in": ("restore", swap_decoder),
    "external data truncated": ("restore", truncate),
    "other directions": ("restore", other_directions),
    "the plan says fewer layers": ("restore", plan_says(fewer_layers)),
    "the plan says another threshold": ("restore", plan_says(lambda plan: plan["sites"][0].update(tau=9.0))),
    "the plan says other positions": ("restore", plan_says(lambda plan: plan.update(positions="all"))),
    **{name: ("restore", planned(change)) for name, change in GRAPH_ATTACKS.items()},
}
BESIDE_SOURCE: dict[str, Attack] = {
    "another guarded decoder swapped in": swap_guarded_decoder,
    "external data edited": edit_weight,
    "two weights change places": graph(swap_offsets),
    "another tokenizer": other_tokenizer,
}
SIGNED_ONLY: dict[str, Attack] = {
    "one layer less, in graph, plan and spec": fewer_layers_everywhere,
    "another threshold, in graph, plan and directions": everything_fits,
}


REMADE = "the guard is what the manifest's plan and directions make"
EXTERNAL = "external weights are the source's files"
PLAN = "the manifest's plan is not what its spec and directions give"
LEAKS = "shows the state from before the guard"
AROUND = "on a way around the guard"
# What must be said of an attack; what is not here is found by making the guard again.
SAID = {
    "every guard removed": "the decoder carries no guard",
    "bypassed for one consumer by a copy of the sum": PLAN,
    "its edit times zero": "does not lead back to the value it guards",
    "an If inside the guard": "does not lead back to the value it guards",
    "an output more: a copy of the raw sum": f"layer 1: output 'copy' {LEAKS}",
    "an output more: unguarded logits": f"layer 1: output 'second_logits' {LEAKS}",
    "unguarded logits under the guarded ones' name": "layer 1: 'inputs_embeds' reaches 'logits' on a way around the guard",
    **{name: f"layer 1: 'inputs_embeds' reaches 'logits' {AROUND}" for name in GRAPH_ATTACKS if "comes back" in name},
    "a decoy carries the guard, the text goes round it": f"layer 1: 'inputs_embeds' reaches 'logits' {AROUND}",
    **dict.fromkeys(
        [
            "a second decoder's token comes back: ArgMax",
            "a second decoder's token comes back: a sum over an axis of that size",
            "a second decoder's token comes back: the trip count of a Loop",
            "a second decoder's token comes back: conditions of Ifs",
        ],
        "the stream splits",  # the anatomy refuses them before any proof
    ),
    "a second decoder behind the guard reads the text anew": "the stream splits",
    "an If around the guard": "some layers end in a norm behind their last sum and others do not",
    "a second decoder reads an input of its own": (
        "layer 1: an attention that the guard does not change reaches 'logits' on a way around it"
    ),
    "an output more: how long the unguarded token counts": f"layer 1: output 'told' {LEAKS}",
    "an output more: the raw sum under a name like the guard's": (
        "only the planned guard bears the guard's names: 'vlmguard.coordinates/then_branch' is left"
    ),
    "the metadata configures the runtime": "configures onnxruntime by its metadata (ort_config)",
    "metadata more under the guard's name": f"{REMADE}: metadata differ",
    "a guarded state is declared to be one token long": f"{REMADE}: 'vlmguard/layer_1/guarded' is declared otherwise",
    "a state is declared twice": "has value_info 'layer_0_sum' twice",
    "a second threshold of the same name": "has initializer 'vlmguard/layer_1/tau' twice",
    "a sparse threshold of the same name": "keeps weights as sparse_initializer",
    "a threshold in two forms": "has its numbers in several forms",
    "an attribute twice": "has attribute of 'vlmguard/layer_1/gate' 'to' twice",
    "Greater defined anew": "defines its own 'Greater'",
    "the unguarded decoder swapped in": "the decoder carries no guard",
    "external data truncated": "it is truncated",
    "other directions": PLAN,
    "the plan says fewer layers": PLAN,
    "the plan says another threshold": PLAN,
    "the plan says other positions": PLAN,
    "another guarded decoder swapped in": EXTERNAL,
    "external data edited": EXTERNAL,
    "two weights change places": "untouched initializers identical: w0; w1",
    "another tokenizer": "files around the decoder are the source's: tokenizer.json",
}


def caught(folder: Path, source: Path | None = None) -> str:
    """What is said: a refusal in one line, or the checks that do not hold; "" if nothing is caught."""
    try:
        found: Verification = verify(folder, source)
    except GuardError as error:
        assert "\n" not in str(error)
        return str(error)
    return " | ".join(f"{check.name}: {check.note}" for check in found.checks if not check.ok)


def attacked(made: Path, folder: Path, mode: str, attack: Attack) -> Path:
    """A copy beside the model, tampered with; the manifest still has the old digests."""
    shutil.copytree(made / mode, folder)
    for name in ("model", "other"):
        if not (folder.parent / name).exists():
            (folder.parent / name).symlink_to(made / name)
    before = digests(folder)
    attack(folder)
    assert digests(folder) != before
    return folder


@pytest.mark.parametrize("name", FROM_FILES)
def test_caught_from_the_files_alone(made: Path, tmp_path: Path, name: str) -> None:
    mode, attack = FROM_FILES[name]
    folder = attacked(made, tmp_path / "g", mode, attack)
    assert caught(folder)
    make_the_manifest_fit(folder)
    assert SAID.get(name, REMADE) in caught(folder)
    assert caught(folder, made / "model")


@pytest.mark.parametrize("name", BESIDE_SOURCE)
def test_caught_beside_the_source(made: Path, tmp_path: Path, name: str) -> None:
    folder = attacked(made, tmp_path / "g", "restore", BESIDE_SOURCE[name])
    assert caught(folder)  # the digests
    make_the_manifest_fit(folder)
    assert not caught(folder)  # a guarded model like any other
    assert SAID[name] in caught(folder, made / "model")


@pytest.mark.parametrize("name", SIGNED_ONLY)
def test_a_guard_that_is_consistent_in_itself_is_another_guard(made: Path, tmp_path: Path, name: str) -> None:
    """Said in docs/security.md: only a signature (tests/exporter/test_signing.py) tells whose guard it is."""
    folder = attacked(made, tmp_path / "g", "restore", SIGNED_ONLY[name])
    assert caught(folder)
    make_the_manifest_fit(folder)
    assert not caught(folder) and not caught(folder, made / "model")


@pytest.mark.parametrize("mode", ["restore", "steer"])
def test_nothing_is_caught_where_nothing_was_done(made: Path, tmp_path: Path, mode: str) -> None:
    """Neither by reading the graph and writing it again, nor by making a manifest fit that fits."""
    folder = shutil.copytree(made / mode, tmp_path / "g")
    edit_graph(folder, lambda model: None)
    make_the_manifest_fit(folder)
    assert not caught(folder) and not caught(folder, made / "model")


@pytest.mark.parametrize(
    "name", ["more.onnx", "MORE.ONNX", "more.ort", "chat_template.jinja", "libop.so", "vocab.json"]
)
def test_a_file_that_a_runtime_would_go_by_cannot_be_added(made: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(made / "restore", tmp_path / "g")
    (folder / "NOTES.txt").write_text("mine")
    assert verify(folder).ok
    (folder / name).write_text("{}")
    with pytest.raises(ManifestMismatch) as raised:
        verify(folder)
    assert str(raised.value) == f"{folder}: {name} was added after the proof; remove it, or export again"


def test_no_report_and_no_page_is_about_another_guard(made: Path, tmp_path: Path) -> None:
    """What `report` and `playground` look at is put in afresh: it must be what was shipped."""

    def both_sides(folder: Path) -> BothSides:
        manifest = read_manifest(folder)
        package = open_guarded_package(folder, manifest)
        return open_both_sides(package, manifest, manifest.decoders[0], None, "--source")

    assert both_sides(made / "restore").plan.mode == "restore"
    folder = attacked(made, tmp_path / "g", "restore", FROM_FILES["V changed"][1])
    make_the_manifest_fit(folder)
    with pytest.raises(ManifestMismatch, match="its guard is not what its plan and directions make"):
        both_sides(folder)


def test_the_documentation_counts_these_attacks() -> None:
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    files, beside = [*FROM_FILES, *FOLDER_ATTACKS], [*BESIDE_SOURCE, *SOURCE_ATTACKS]
    total = len(files) + len(beside) + len(SIGNED_ONLY)
    assert f"{total} attacks: {len(files)} are caught from the files alone, {len(beside)} with `--source`" in text
    assert f"{len(SIGNED_ONLY)} by a signature alone" in text
    for name in (*files, *beside, *SIGNED_ONLY):
        assert f"- {name}\n" in text, json.dumps(name)
