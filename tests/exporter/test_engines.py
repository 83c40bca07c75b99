"""Engines, truly parsed and compiled by TensorRT-RTX, which needs no GPU for that: the guard is in them, and what it adds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from random_directions import random_directions
from tiny_vlm_paths import SOURCE, Guarded
from zoo.model import ZooModel
from zoo_fixtures import zoo

from vlmguard.exporter.engines.build import BuildOptions, Engine, build_engine
from vlmguard.exporter.engines.commands import commands_for
from vlmguard.exporter.engines.folder import build_engines
from vlmguard.exporter.engines.layers import require_guard
from vlmguard.exporter.engines.profile import EngineProfile, Span, decoder_shapes
from vlmguard.exporter.verify import verify
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.errors import GuardError, ManifestMismatch
from vlmguard.graphs.manifest import read_manifest
from vlmguard.graphs.package import load_graph
from vlmguard.graphs.plan import plan_guard
from vlmguard.graphs.rewrite import rewrite
from vlmguard.graphs.spec import GuardSpec, Mode
from vlmguard.graphs.tensorrt import require_readable, settle_sizes, unreadable_nodes
from vlmguard.runtime.guarded import GuardedVLM
from vlmguard.runtime.tensorrt_backend import find_backend

pytest.importorskip("tensorrt_rtx")
pytest_plugins = ("tiny_vlm_fixtures",)
__all__ = ["zoo"]

PROFILES = (
    EngineProfile("prefill", Span(1, 2, 4), Span(1, 8, 32), Span(0, 0, 0)),
    EngineProfile("decode", Span(1, 2, 4), Span(1, 1, 1), Span(1, 16, 64)),
)


def build(path: Path, spec: GuardSpec | None = None, rank: int = 2) -> tuple[Engine, list[str]]:
    """The engine of a graph, guarded in every layer if a spec is given, and the names of the guard's arithmetic."""
    model = load_graph(path)
    settle_sizes(model)
    names: list[str] = []
    if spec is not None:
        anatomy = dissect(model)
        directions = random_directions(anatomy.width, range(anatomy.layer_count), rank)
        report = rewrite(model, plan_guard(model, anatomy, directions, spec))
        kinds = {node.name: node.op_type for node in model.graph.all_nodes()}
        names = [n for s in report.sites for n in s.nodes if kinds[n] in {"ReduceSum", "Add", "Greater", "Clip"}]
    shapes = [decoder_shapes(model.graph, profile, {}) for profile in PROFILES]
    return build_engine(find_backend("tensorrt_rtx"), model, path, shapes, BuildOptions(), lambda *_: None), names


@pytest.mark.parametrize(
    "name", ["llava-transformers-fp16", "llava-transformers-fp32", "llava-transformers-fp32-opset23"]
)
def test_rank1_adds_no_layer(zoo: Callable[[str], ZooModel], name: str) -> None:
    """All layers guarded, every token: the chain is fused into the kernels that are there anyway, gated or not."""
    path = zoo(name).path
    bare, _ = build(path)
    modes: tuple[Mode, ...] = ("project", "steer", "restore") if name.endswith("fp16") else ("restore",)
    for mode in modes:
        engine, names = build(path, GuardSpec(mode=mode, lowering="rank1", positions="all"))
        require_guard(engine.layers, names, len(PROFILES), name)
        for profile in range(len(PROFILES)):
            assert engine.layers.of_profile(profile).kernels == bare.layers.of_profile(profile).kernels, (mode, profile)


def test_our_verdict_is_the_parsers(zoo: Callable[[str], ZooModel]) -> None:
    """What is refused before a build is what the parser refuses, and each operator says what to do instead."""
    for name, refused in (
        ("llama-genai-fp32", "GroupQueryAttention"),
        ("llama-genai-int4", "MatMulNBits"),
        ("llava-merged-fp32", "If"),
        ("llava-transformers-fp32", None),
        ("llama-torchscript-fp32", None),
    ):
        path = zoo(name).path
        model = load_graph(path)
        found = {one.operator.rpartition(".")[2] for one in unreadable_nodes(model)}
        assert (refused in found) if refused else not found, (name, found)
        if refused:
            with pytest.raises(GuardError, match=rf"TensorRT cannot read .*{refused} \(\d+ nodes, the first is "):
                require_readable(model, str(path))


@pytest.fixture(scope="module")
def engines(guarded: Guarded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines") / "restore-engine"
    build_engines(guarded("restore"), out, backend="tensorrt_rtx")
    return out


def test_the_folder_of_engines(guarded: Guarded, engines: Path) -> None:
    manifest = read_manifest(engines)
    assert [engine.role for engine in manifest.engines] == ["decoder", "vision_encoder", "embed_tokens"]
    decoder = manifest.engines[0]
    assert [profile["name"] for profile in decoder.profiles] == ["prefill", "decode"]
    for shown in decoder.layers["profiles"]:
        assert list(shown["guard_nodes"]) == [str(layer) for layer in manifest.plan["layers"]]
    assert (decoder.backend, decoder.pads, manifest.proved) == ("tensorrt_rtx", True, "structure")
    assert not list(engines.rglob("*.onnx")) and (engines / "tokenizer.json").is_file()
    found = verify(engines, guarded("restore"))
    assert found.ok and {check.name for check in found.checks} >= {
        "the builder showed the guard's nodes in every guarded layer",
        "every engine was built from the guarded folder's graph",
    }


def test_an_engine_that_nobody_vouches_for_is_not_opened(engines: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestMismatch, match="only the structure of its guard was proved"):
        GuardedVLM.open(engines)
    copy = tmp_path / "copy"
    shutil.copytree(engines, copy)
    path = copy / read_manifest(copy).engines[0].path
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ManifestMismatch, match="SHA-256 differs"):
        GuardedVLM.open(copy)
    shutil.copy(engines / path.relative_to(copy), path)
    shutil.copy(path, path.with_name("other.engine"))
    with pytest.raises(ManifestMismatch, match=r"other\.engine was added after the proof"):
        GuardedVLM.open(copy)


def test_what_cannot_be_built_is_refused_and_nothing_is_written(
    guarded: Guarded, engines: Path, tmp_path: Path
) -> None:
    out, rtx = tmp_path / "out", "tensorrt_rtx"
    for model, options, why in (
        (SOURCE, {}, "has no guard.json"),
        (engines, {}, "holds engines already"),
        (
            guarded("restore"),
            {"options": BuildOptions(("9.9",))},
            "cannot build for compute capability 9.9; choose among 7.5",
        ),
        (
            guarded("restore"),
            {"profiles": [EngineProfile.parse("long:sequence=1:1:99999")]},
            "profile long reaches 99999",
        ),
        (guarded("restore"), {"shapes": ["nobody=1"]}, "--shape names 'nobody'"),
        (guarded("restore"), {"backend": "other"}, "backend 'other' is unknown"),
    ):
        with pytest.raises(GuardError, match=why):
            build_engines(model, out, **{"backend": rtx, **options})
        assert not list(tmp_path.iterdir())


def test_the_commands_for_another_machine(guarded: Guarded) -> None:
    decoder, vision, embed = commands_for(guarded("restore"), None, [], [], BuildOptions(workspace=512))
    assert decoder.startswith("trtexec --onnx=") and "--stronglyTyped --profile=0 --minShapes=" in decoder
    assert "--memPoolSize=workspace:512" in decoder and decoder.count("--optShapes=") == 2
    assert vision.count("--profile=") == embed.count("--profile=") == 0
    rtx = commands_for(guarded("restore"), "tensorrt_rtx", [], [], BuildOptions(("8.9", "12.0")))[0]
    assert rtx.startswith("tensorrt_rtx ") and "--computeCapabilities=89,120" in rtx and "--stronglyTyped" not in rtx
