"""`verify` from the files alone: a guarded folder that was tampered with is caught even if its manifest was made to fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from random_directions import random_directions, write_directions
from small_guarded import edit_manifest, make_the_manifest_fit
from tiny_vlm_paths import DECODER, SOURCE, Guarded

import vlmguard
from vlmguard.exporter.proof.verify import Verification, verify
from vlmguard.graphs.errors import GuardError, GuardIncomplete, ManifestMismatch

pytest_plugins = ("tiny_vlm_fixtures", "zoo_fixtures")

DIGESTS = "every file has the manifest's SHA-256"
NO_FEWER = "no fewer harmful prompts refused than without the guard, as counted at export"
REMADE = "the guard is what the manifest's plan and directions make"
LAYOUT = "the folder has the layout that its manifest names"
NAMES = "only the planned guard bears the guard's names"
FOLDER = [
    "every graph is a verified decoder or holds none",
    "all weights outside the graphs are listed",
    "no config leads to another graph or to code",
    "no code and no checkpoint lies in the folder",
]
ONCE = "every planned site guarded exactly once"
DOMINATES = "no path avoids a guard (dominators)"
STRIPPED = "without its guard it is the source, node for node"
SIGNATURE = "inputs and outputs unchanged"
UNTOUCHED = "untouched initializers identical"
EXTERNAL = "external weights are the source's files"
AROUND = "files around the decoder are the source's"


@pytest.fixture
def folder(guarded: Guarded, tmp_path: Path) -> Path:
    return shutil.copytree(guarded("restore"), tmp_path / "guarded")


def failing(result: Verification) -> set[str]:
    assert not result.ok or all(check.ok for check in result.checks)
    return {check.name for check in result.checks if not check.ok}


def plan_in(manifest: dict) -> dict:
    return manifest["decoders"][0]["plan"]


def tamper(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    path = folder / DECODER
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    with pytest.raises(ManifestMismatch, match="is not the file that was proved"):
        verify(folder)
    make_the_manifest_fit(folder)


def guard_layer(model: onnx.ModelProto) -> str:
    name = next(node.name for node in model.graph.node if node.name.startswith("vlmguard/layer_"))
    return name.rpartition("/")[0]


def numbers(part: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == f"{guard_layer(model)}/{part}")
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(array), array.dtype), tensor.name))

    return edit


def bypass(model: onnx.ModelProto) -> None:
    """One reader of the guarded state reads the raw one."""
    guarded = next(node for node in model.graph.node if node.name == f"{guard_layer(model)}/guarded")
    reader = next(node for node in model.graph.node if guarded.output[0] in node.input)
    reader.input[list(reader.input).index(guarded.output[0])] = guarded.input[0]


def mute(model: onnx.ModelProto) -> None:
    """A node more, outside the guard's names, that turns the edit into nothing."""
    guarded = next(node for node in model.graph.node if node.name == f"{guard_layer(model)}/guarded")
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "scale"))
    at = list(model.graph.node).index(guarded)
    model.graph.node.insert(at, helper.make_node("Mul", [guarded.input[1], "scale"], ["muted"], name="muted"))
    guarded.input[1] = "muted"


def one_weight(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if not t.name.startswith("vlmguard/") and len(t.dims) == 2)
    array = numpy_helper.to_array(tensor).copy()
    array[0, 0] += 0.25
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


# ------------------------------------------------------------------------------------------------------------ untouched


@pytest.mark.parametrize("mode", ["restore", "supervise"])
def test_an_untouched_folder_is_verified(guarded: Guarded, mode: str) -> None:
    alone = verify(guarded(mode))
    assert (alone.ok, alone.state) == (True, "verified")
    proof = [DIGESTS, NO_FEWER, LAYOUT, REMADE, ONCE, NAMES, DOMINATES]
    assert [check.name for check in alone.checks] == [*proof, *FOLDER]
    for source in (SOURCE, SOURCE / DECODER, str(SOURCE)):
        beside = verify(guarded(mode), source)
        assert beside.ok
        assert [check.name for check in beside.checks] == [*proof, STRIPPED, SIGNATURE, UNTOUCHED, *FOLDER, AROUND]
        assert all(check.compared > 0 and check.worst == 0 for check in beside.checks)
    assert beside.checks[0].compared == len(beside.manifest.files) == 10
    nodes = len(onnx.load(SOURCE / DECODER).graph.node)
    assert beside.checks[7].compared > nodes  # nodes and initializers


def test_a_verification_is_told_as_plain_data(guarded: Guarded) -> None:
    result = verify(guarded("restore"), SOURCE)
    told = json.loads(json.dumps(result.to_json()))
    assert (told["state"], told["missing"]) == ("verified", "")
    assert (told["ok"], told["mode"], told["layers"]) == (True, "restore", result.manifest.plan["layers"])
    assert [check["name"] for check in told["checks"]] == [check.name for check in result.checks]
    assert set(told["checks"][0]) == {"name", "compared", "worst", "limit", "ok", "note"}


# -------------------------------------------------------------------------------- tampered with, and the manifest as well


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (numbers("tau", lambda a: a + 100), {REMADE}),  # the gate never opens
        (numbers("tau", lambda a: np.nextafter(a, np.float32(9))), {REMADE}),  # the least that can be changed
        (numbers("ssd", np.zeros_like), {REMADE}),
        (numbers("target", lambda a: -a), {REMADE}),
        (numbers("rows", lambda a: np.roll(a, 1, axis=1)), {REMADE}),
    ],
)
def test_other_numbers_are_caught(folder: Path, change: Callable, expected: set[str]) -> None:
    tamper(folder, change)
    assert failing(verify(folder)) == expected
    assert failing(verify(folder, SOURCE)) == expected


def test_a_reader_that_goes_round_the_guard_is_caught(folder: Path) -> None:
    tamper(folder, bypass)
    assert failing(verify(folder)) >= {REMADE, DOMINATES}


def test_a_muted_edit_is_caught(folder: Path) -> None:
    """The node lies in the guard without its name: it is no part of any guard, and of no source."""
    tamper(folder, mute)
    try:
        found = verify(folder)
    except GuardError as error:
        assert "\n" not in str(error)
    else:
        assert REMADE in failing(found)


def test_a_decoder_without_a_guard_is_caught(folder: Path) -> None:
    shutil.copyfile(SOURCE / DECODER, folder / DECODER)
    make_the_manifest_fit(folder)
    with pytest.raises(GuardIncomplete) as caught:
        verify(folder)
    assert str(caught.value) == "the decoder carries no guard; it was never guarded, or the guard was removed"


def test_another_models_weights_are_caught_beside_the_source(folder: Path) -> None:
    """From the folder alone nobody can know the model's own weights; the source does."""
    tamper(folder, one_weight)
    assert verify(folder).ok
    assert failing(verify(folder, SOURCE)) == {STRIPPED, UNTOUCHED}


def test_weights_outside_the_graph_are_caught_beside_the_source(zoo: Callable[[str], Any], tmp_path: Path) -> None:
    """The graph only refers to them: the same reference says nothing about the bytes."""
    source = zoo("llama-genai-fp32").folder
    directions = write_directions(tmp_path / "d.safetensors", random_directions(64, [1]))
    out = vlmguard.export(source, tmp_path / "out", directions=directions).out
    before = verify(out, source)
    external = next(check for check in before.checks if check.name == EXTERNAL)
    assert before.ok and external.compared == 1
    data = next(out.glob("*.data"))
    data.unlink()  # it may be a hard link to the source's
    content = bytearray((source / data.name).read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    make_the_manifest_fit(out)
    assert verify(out).ok
    after = verify(out, source)
    assert failing(after) == {EXTERNAL, STRIPPED, UNTOUCHED}  # tensors are compared by what their files hold
    note = next(check for check in after.checks if check.name == EXTERNAL).note
    assert note == f"a file of the source is missing; {data.name}"


def guarded_layers(folder: Path) -> list[int]:
    return json.loads((folder / "guard.json").read_text(encoding="utf-8"))["decoders"][0]["plan"]["layers"]


def test_other_directions_are_caught(folder: Path, guarded: Guarded) -> None:
    shutil.copyfile(guarded("supervise") / "directions.safetensors", folder / "directions.safetensors")
    make_the_manifest_fit(folder)
    with pytest.raises(GuardError) as caught:
        verify(folder)
    assert str(caught.value) == (
        f"{folder}: the manifest's spec and the directions beside it give no guard (the directions' thresholds were calibrated "
        "for supervise, not for restore; give --tau, or calibrate again with --anchors); export again"
    )


def test_other_directions_are_caught_where_the_spec_follows_them(folder: Path, guarded: Guarded) -> None:
    shutil.copyfile(guarded("supervise") / "directions.safetensors", folder / "directions.safetensors")
    manifest = json.loads((folder / "guard.json").read_text(encoding="utf-8"))
    manifest["spec"]["mode"] = None
    (folder / "guard.json").write_text(json.dumps(manifest), encoding="utf-8")
    make_the_manifest_fit(folder)
    differ = ["mode", "layers", "added_inputs", "added_outputs", "sites"]
    if guarded_layers(guarded("supervise")) == guarded_layers(folder):
        differ.remove("layers")
    with pytest.raises(GuardError) as caught:
        verify(folder)
    assert str(caught.value) == (
        f"{folder}: the manifest's plan is not what its spec and directions give ({', '.join(differ)} differ); export again"
    )


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        (lambda m: plan_in(m).update(positions="all"), "positions"),
        (lambda m: plan_in(m)["sites"][0].update(tau=99.0), "sites"),
        (lambda m: plan_in(m).update(mode="steer", layers=[0]), "mode, layers"),
        (lambda m: plan_in(m).pop("width"), "width"),
        (lambda m: m["spec"].update(positions="all"), "positions"),
    ],
)
def test_a_plan_that_is_not_that_of_the_folder_is_refused(folder: Path, change: Callable, differing: str) -> None:
    edit_manifest(folder, change)
    with pytest.raises(ManifestMismatch) as caught:
        verify(folder)
    assert str(caught.value) == (
        f"{folder}: the manifest's plan is not what its spec and directions give ({differing} differ); export again"
    )


def test_a_tampered_threshold_with_directions_and_manifest_made_to_fit_is_another_guard(folder: Path) -> None:
    """All three changed together are a folder that says what it does: only who compares manifests can know better."""
    edit_manifest(folder, lambda manifest: manifest["spec"].update(tau=99.0))
    with pytest.raises(ManifestMismatch, match="sites differ"):
        verify(folder)
    edit_manifest(folder, lambda manifest: plan_in(manifest)["sites"][0].update(tau=99.0))
    assert failing(verify(folder)) == {REMADE}  # the graph still has the old one
    tamper(folder, numbers("tau", lambda a: np.full_like(a, 99)))
    with pytest.raises(
        ManifestMismatch, match=r"guard\.toml: layers\.3\.threshold is [\d.]+, the graph has 99; export again"
    ):
        verify(folder)
    (folder / "guard.toml").unlink()
    assert verify(folder).ok


@pytest.mark.parametrize("spec", [{"strength": 3}, {"rank": "two"}, {"layers": 3}])
def test_a_spec_that_cannot_be_read_is_refused_in_one_line(folder: Path, spec: dict) -> None:
    edit_manifest(folder, lambda manifest: manifest["spec"].update(spec))
    with pytest.raises(ManifestMismatch) as caught:
        verify(folder)
    sentence = str(caught.value)
    assert sentence.startswith(f"{folder}: the manifest's spec cannot be read (")
    assert sentence.endswith("); export again") and "\n" not in sentence


# --------------------------------------------------------------------------------------------------------------- source


def test_another_source_is_refused(folder: Path, guarded: Guarded, zoo: Callable[[str], Any], tmp_path: Path) -> None:
    other = shutil.copytree(SOURCE, tmp_path / "other")
    model = onnx.load(other / DECODER)
    one_weight(model)
    onnx.save(model, other / DECODER)
    for source, decoder in (
        (other, other / DECODER),
        (folder, folder / DECODER),  # the guarded model is not its own source
        (zoo("llama-torchscript-fp32").path, zoo("llama-torchscript-fp32").path),
    ):
        with pytest.raises(ManifestMismatch) as caught:
            verify(folder, source)
        assert str(caught.value) == (
            f"{decoder}: is not the model that {DECODER} was made from (SHA-256 differs); give that one"
        )


def test_a_source_that_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(GuardError) as caught:
        verify(folder, tmp_path / "gone")
    assert str(caught.value) == f"{tmp_path / 'gone'}: no such file or folder; give a .onnx file or a model folder"


def test_a_folder_that_was_never_guarded_is_refused() -> None:
    with pytest.raises(ManifestMismatch) as caught:
        verify(SOURCE)
    assert str(caught.value) == (f"{SOURCE}: has no guard.json, so it is not a guarded folder; export it first")
