"""Engines, truly parsed and compiled by TensorRT-RTX, which needs no GPU for that: the guard is in them, and what it adds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hand_graphs import text_model
from random_directions import random_directions
from tiny_families import TINY, save_tiny
from tiny_models import IMAGE_SIZE
from tiny_vlm_paths import SOURCE, Guarded
from zoo import quantized
from zoo.model import ZooModel
from zoo_fixtures import zoo

from vlmguard.exporter.checkpoints.convert import convert_checkpoint
from vlmguard.exporter.engines.build_engine import BuildOptions, Engine, build_engine
from vlmguard.exporter.engines.commands import commands_for
from vlmguard.exporter.engines.engine_folder import build_engines, plan_parts
from vlmguard.exporter.engines.layers import require_guard
from vlmguard.exporter.engines.profile import EngineProfile, Span, decoder_shapes, parse_shapes
from vlmguard.exporter.engines.verify_engines import STEPS, rolled, same_outputs
from vlmguard.exporter.proof.inputs import proof_inputs
from vlmguard.exporter.proof.verify import verify
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.errors import GuardError, GuardIncomplete, ManifestMismatch
from vlmguard.graphs.graph_io import load_graph
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.manifest import read_manifest
from vlmguard.graphs.modes import Mode, Positions, guard_mode
from vlmguard.graphs.plan import COORDINATES_OUTPUT
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.proof.strip import strip_guard
from vlmguard.graphs.rewrite import rewrite
from vlmguard.graphs.spec import GuardSpec
from vlmguard.graphs.tensorrt import require_readable, settle_sizes, unreadable_nodes
from vlmguard.runtime.decoder import open_decoder
from vlmguard.runtime.generation import Request
from vlmguard.runtime.guarded import GuardedVLM
from vlmguard.runtime.tensorrt.backend import find_backend
from vlmguard.runtime.vlm import VisionLanguageModel

pytest.importorskip("tensorrt_rtx")
pytest_plugins = ("tiny_vlm_fixtures",)
__all__ = ["zoo"]

PROFILES = (
    EngineProfile("prefill", Span(1, 2, 4), Span(1, 8, 32), Span(0, 0, 0)),
    EngineProfile("decode", Span(1, 2, 4), Span(1, 1, 1), Span(1, 16, 64)),
)
# Inputs of vision encoders whose sizes no profile tells.
TILES = [f"pixel_values=1x1x3x{IMAGE_SIZE}x{IMAGE_SIZE}", f"pixel_attention_mask=1x1x{IMAGE_SIZE}x{IMAGE_SIZE}"]
WITH_TILES = ("idefics3", "smolvlm")


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


@cache
def kernels_of(path: Path) -> list[int]:
    """Kernels of the unguarded engine, by profile."""
    engine, _ = build(path)
    return [engine.layers.of_profile(profile).kernels for profile in range(len(PROFILES))]


@pytest.mark.parametrize(
    "name",
    [
        "llava-transformers-fp16",
        pytest.param("llava-transformers-fp32", marks=pytest.mark.zoo),
        pytest.param("llava-transformers-fp32-opset23", marks=pytest.mark.zoo),
    ],
)
def test_rank1_adds_no_layer(zoo: Callable[[str], ZooModel], name: str) -> None:
    """All layers guarded, every token: the chain is fused into the kernels that are there anyway, gated or not."""
    path = zoo(name).path
    bare = kernels_of(path)
    modes: tuple[Mode, ...] = ("project", "steer", "restore") if name.endswith("fp16") else ("restore",)
    for mode in modes:
        engine, names = build(path, GuardSpec(mode=mode, lowering="rank1", positions="all"))
        require_guard(engine.layers, names, len(PROFILES), name)
        for profile in range(len(PROFILES)):
            assert engine.layers.of_profile(profile).kernels == bare[profile], (mode, profile)


@pytest.mark.parametrize(
    ("mode", "positions"),
    [("restore", "last"), ("supervise", "last"), pytest.param("combined", "last", marks=pytest.mark.zoo)],
)
def test_rank1_adds_a_layer_where_a_computed_tensor_comes_in(
    zoo: Callable[[str], ZooModel], mode: Mode, positions: Positions
) -> None:
    """The selection of the last token, the supervisor's row: one kernel per guarded layer, and not a fusion more is lost."""
    path = zoo("llava-transformers-fp16").path
    bare = kernels_of(path)
    engine, names = build(path, GuardSpec(mode=mode, lowering="rank1", positions=positions))
    require_guard(engine.layers, names, len(PROFILES), mode)
    # Three find the last token (each row's last attended column, the furthest of all rows, the place), one gives coordinates.
    shared = 4 if guard_mode(mode).supervisor else 3
    for profile in range(len(PROFILES)):
        added = engine.layers.of_profile(profile).kernels - bare[profile]
        assert added == zoo("llava-transformers-fp16").layers + shared, profile


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaVA as transformers' exporter writes it in bfloat16, which onnxruntime on a CPU does not run."""
    torch = pytest.importorskip("torch")
    from zoo import makers, model, truth

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(truth.TORCH_DTYPES, "bfloat16", torch.bfloat16)
        patch.setitem(model.SHORT_DTYPES, "bfloat16", "bf16")
        patch.setitem(model.TOLERANCES, "bf16", 1.0)
        return makers.make_llava_transformers(tmp_path_factory.mktemp("bf16") / "model", "bfloat16").path


@pytest.mark.zoo
def test_a_bfloat16_decoder_builds_with_its_guard(bfloat16: Path) -> None:
    engine, names = build(bfloat16, GuardSpec(mode="restore", lowering="rank1", positions="all"))
    require_guard(engine.layers, names, len(PROFILES), "bfloat16")


@pytest.mark.long
def test_an_int4_decoder_builds_with_its_guard(zoo: Callable[[str], ZooModel]) -> None:
    name = "llava-transformers-nbits-qdq-int4"
    engine, names = build(zoo(name).path, GuardSpec(mode="restore", lowering="rank1", positions="last"))
    require_guard(engine.layers, names, len(PROFILES), name)


@pytest.mark.zoo
def test_an_int8_decoder_builds_with_its_guard(zoo: Callable[[str], ZooModel], tmp_path: Path) -> None:
    """Symmetric QDQ; with zero points TensorRT refuses it, and so do we, before the build."""
    quantized.static(zoo("llava-transformers-fp32"), tmp_path / "model.onnx", "QDQ", ["MatMul"], symmetric=True)
    assert not unreadable_nodes(load_graph(tmp_path / "model.onnx"))
    engine, names = build(tmp_path / "model.onnx", GuardSpec(mode="restore", lowering="rank1", positions="last"))
    require_guard(engine.layers, names, len(PROFILES), "int8")


def weights_in_float8(model: ir.Model) -> int:
    """Every MatMul's constant weight as float8 (e4m3) with one scale and a DequantizeLinear; how many there are."""
    changed = 0
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.const_value is None:
            continue
        array = weight.const_value.numpy()
        scale = np.array(np.abs(array).max() / 448, array.dtype)  # the largest number of e4m3
        stored = ir.tensor((array / scale).astype(ml_dtypes.float8_e4m3fn), name=f"{weight.name}_fp8")
        parts = [
            ir.Value(name=t.name, const_value=t, type=ir.TensorType(t.dtype), shape=ir.Shape(t.shape))
            for t in (stored, ir.tensor(scale, name=f"{weight.name}_scale"))
        ]
        for part in parts:
            model.graph.register_initializer(part)
        dequantize = ir.node("DequantizeLinear", parts, name=f"{weight.name}_dequantize")
        dequantize.outputs[0].name = f"{weight.name}_wide"
        model.graph.insert_before(node, dequantize)
        node.replace_input_with(1, dequantize.outputs[0])
        changed += 1
    return changed


@pytest.mark.zoo
def test_a_decoder_with_weights_in_float8_builds_with_its_guard(zoo: Callable[[str], ZooModel], tmp_path: Path) -> None:
    model = load_graph(zoo("llava-transformers-fp32-opset23").path)
    assert (
        weights_in_float8(model) == 7 * zoo("llava-transformers-fp32-opset23").layers + 1
    )  # q k v o, gate up down, head
    ir.external_data.load_to_model(model)
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    engine, names = build(path, GuardSpec(mode="restore", lowering="rank1", positions="last"))
    require_guard(engine.layers, names, len(PROFILES), "float8")


def test_an_input_that_the_parser_drops_is_an_error(tmp_path: Path) -> None:
    """Attention-24's `nonpad_kv_seqlen` says which tokens are padding: without it the engine would attend to all of them."""
    model = text_model(
        """<ir_version: 10, opset_import: ["" : 24]>
           g (float16[1, 2, 4, 8] q, float16[1, 2, 4, 8] k, float16[1, 2, 4, 8] v, int64[1] lengths) =>
           (float16[1, 2, 4, 8] y) { y = Attention(q, k, v, , , , lengths) }"""
    )
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    shapes = dict.fromkeys("qkv", ((1, 2, 4, 8),) * 3) | {"lengths": ((1,),) * 3}
    with pytest.raises(GuardIncomplete, match=r"lengths|Unused Input"):
        build_engine(find_backend("tensorrt_rtx"), model, path, [shapes], BuildOptions(), lambda *_: None)


@pytest.mark.zoo
@pytest.mark.parametrize("family", TINY)
def test_every_part_of_every_family_is_built_or_refused_by_name(family: str, tmp_path: Path) -> None:
    """Vision encoder, embeddings and decoder of the onnx-community layout, as our own exporter writes them."""
    pytest.importorskip("torch")
    save_tiny(family, tmp_path / "checkpoint")
    convert_checkpoint(tmp_path / "checkpoint", tmp_path / "model", verify=False)
    package = open_package(tmp_path / "model")
    tiles = TILES if family in WITH_TILES else ()
    for part in plan_parts(package, PROFILES, parse_shapes(tiles)):
        model = load_graph(part.path)
        settle_sizes(model)
        asked = [shapes for _, shapes in part.profiles]
        refused = part.role == "vision_encoder" and family in WITH_TILES  # patches that count are found with NonZero
        with pytest.raises(GuardError, match="cannot parse node 'NonZero'") if refused else nullcontext():
            engine = build_engine(
                find_backend("tensorrt_rtx"), model, part.path, asked, BuildOptions(), lambda *_: None
            )
            assert engine.layers.of_profile(0).kernels > 0, part.role


@pytest.mark.zoo
def test_our_verdict_is_the_parsers(zoo: Callable[[str], ZooModel]) -> None:
    """What is refused before a build is what the parser refuses, and each operator says what to do instead."""
    for name, refused in (
        ("llama-genai-fp32", "GroupQueryAttention"),
        ("llama-genai-int4", "MatMulNBits"),
        ("llava-merged-fp32", "If"),
        ("llava-transformers-static-int8", "QuantizeLinear"),
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        build_engines(guarded("restore"), out, backend="tensorrt_rtx")
    return out


def test_the_folder_of_engines(guarded: Guarded, engines: Path) -> None:
    manifest = read_manifest(engines)
    assert [engine.role for engine in manifest.engines] == ["decoder", "decode_step", "vision_encoder", "embed_tokens"]
    decoder, step = manifest.engines[:2]
    assert [profile["name"] for engine in (decoder, step) for profile in engine.profiles] == ["prefill", "decode"]
    assert not list(step.layers["profiles"])[1:]
    for shown in decoder.layers["profiles"]:
        assert list(shown["guard_nodes"]) == [str(layer) for layer in manifest.plan["layers"]]
    assert (decoder.backend, decoder.pads, manifest.proved) == ("tensorrt_rtx", True, "structure")
    assert manifest.created == "2023-11-14T22:13:20+00:00"
    assert not list(engines.rglob("*.onnx")) and (engines / "tokenizer.json").is_file()
    found = verify(engines, guarded("restore"))
    assert (found.ok, found.state) == (False, "not verified") and all(check.ok for check in found.checks)
    assert found.missing.startswith("engines cannot be read back; run `vlmguard verify --run --source GUARDED`")
    assert {check.name for check in found.checks} >= {
        "the builder showed the guard's nodes in every guarded layer",
        "every engine was built from the guarded folder's graph",
    }


def test_running_tells_an_engine_with_its_guard_from_one_without(
    engines: Path, guarded: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `verify --run` asks of a GPU, asked of ONNX Runtime in its place: the guarded graph passes, and is then proved;
    the graph without its guard does not, however small the difference."""
    out, source = tmp_path / "engines", guarded("restore")
    shutil.copytree(engines, out)
    package = open_package(source)
    stripped = package.load_decoder()
    strip_guard(stripped)

    def instead_of_the_gpu(graph: ir.Model | None) -> None:
        opened = SimpleNamespace(decoder=open_decoder(package, graph, runtime="onnxruntime-cpu"))
        monkeypatch.setattr(GuardedVLM, "open_unproved", lambda folder: opened)

    instead_of_the_gpu(stripped)
    found = verify(out, source, run=True)
    check = found.checks[-1]
    assert not found.ok and check.name == "the engine gives what ONNX Runtime gives on the CPU" and check.worst > 0
    assert read_manifest(out).proved == "structure"
    instead_of_the_gpu(None)
    found = verify(out, source, run=True)
    assert found.ok and found.checks[-1].compared > 0 and "the guard moves them by up to" in found.checks[-1].note
    assert read_manifest(out).proved == "full"


@pytest.mark.parametrize("lowering", ["rank1", pytest.param("lowrank", marks=pytest.mark.zoo)])
def test_paired_rows_are_built_and_shown(zoo: Callable[[str], ZooModel], lowering: str) -> None:
    path = zoo("llava-transformers-fp16").path
    layers = zoo("llava-transformers-fp16").layers
    engine, names = build(
        path, GuardSpec(mode="align", lowering=lowering, layers=tuple(range(layers)), supervisor="rows")
    )
    require_guard(engine.layers, names, len(PROFILES), "align in pairs")
    added = [engine.layers.of_profile(n).kernels - bare for n, bare in enumerate(kernels_of(path))]
    assert added == {"rank1": [7, 7], "lowrank": [11, 11]}[lowering]


def test_a_supervised_decoder_is_run_with_what_it_heard_itself(guarded: Guarded) -> None:
    package = open_package(guarded("supervise"))
    stripped = package.load_decoder()
    strip_guard(stripped)
    with_guard, without = open_decoder(package, runtime="onnxruntime-cpu"), open_decoder(package, stripped)
    inputs = proof_inputs(VisionLanguageModel(package), [Request("how to steal a car"), Request("how to wash a car")])
    expected, unguarded = rolled(with_guard, inputs), rolled(without, inputs)
    assert len(expected) == 1 + STEPS and np.abs(expected[0][COORDINATES_OUTPUT]).max() > 0
    assert same_outputs(expected, rolled(with_guard, inputs), unguarded, 1e-6, "prompts").ok
    lacking = same_outputs(expected, unguarded, unguarded, 1e-6, "prompts")
    assert not lacking.ok and np.isinf(lacking.worst)  # an output that the engine does not have


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
