"""The decoder's engines: kernels of the guard, the same numbers as the guarded decoder, and a proof of the derived graphs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from random_directions import random_directions
from tiny_vlm_paths import SOURCE, Guarded
from zoo.model import ZooModel
from zoo_fixtures import zoo

import vlmguard
from vlmguard.exporter.engines import engine_graphs
from vlmguard.exporter.engines.build_engine import BuildOptions, Engine, build_engine
from vlmguard.exporter.engines.engine_folder import build_engines
from vlmguard.exporter.engines.engine_graphs import DecoderRole, EngineGraph, derive_engine_graph, prove_engine_graph
from vlmguard.exporter.engines.profile import EngineProfile, Span, decoder_shapes
from vlmguard.exporter.proof.verify import verify
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.engine_plans import decode_step_plan, prompt_plan
from vlmguard.graphs.errors import ManifestMismatch, ProofFailed, RunFailed
from vlmguard.graphs.graph_io import in_memory, load_graph
from vlmguard.graphs.manifest import read_manifest
from vlmguard.graphs.modes import Mode
from vlmguard.graphs.plan import COORDINATES_OUTPUT, SUPERVISOR_INPUT, GuardPlan
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.rewrite import GuardReport, rewrite
from vlmguard.graphs.spec import GuardSpec
from vlmguard.graphs.tensorrt import settle_sizes
from vlmguard.runtime.guarded import open_guarded_package
from vlmguard.runtime.runners import open_runner
from vlmguard.runtime.tensorrt.backend import find_backend
from vlmguard.runtime.tensorrt.number_inputs import NumberInputs

pytest.importorskip("tensorrt_rtx")
pytest_plugins = ("tiny_vlm_fixtures",)
__all__ = ["zoo"]

# The builder fuses by the typical sizes: a last token is found with the causal mask at 256 tokens, not at 16.
PROMPTS = EngineProfile("prefill", Span(1, 1, 4), Span(1, 256, 512), Span(0, 0, 0))
DECODE = EngineProfile("decode", Span(1, 2, 4), Span(1, 1, 1), Span(1, 16, 64))


@cache
def engine_for(path: Path, mode: Mode | None, profile: EngineProfile) -> Engine:
    """The engine of prompts or of decode steps alone, guarded in every layer if a mode is given."""
    model = load_graph(path)
    if mode is not None:
        anatomy = dissect(model)
        directions = random_directions(anatomy.width, range(anatomy.layer_count), 2)
        derive = decode_step_plan if profile is DECODE else prompt_plan
        plan = derive(plan_guard(model, anatomy, directions, GuardSpec(mode=mode, lowering="rank1")))
        assert plan is not None
        rewrite(model, plan)
    settle_sizes(model)
    shapes = decoder_shapes(model.graph, profile, {})
    one_gpu = BuildOptions(capabilities=("8.9",))
    return build_engine(find_backend("tensorrt_rtx"), model, path, [shapes], one_gpu, lambda *_: None)


@pytest.mark.parametrize(
    "mode", ["restore", "supervise", *(pytest.param(mode, marks=pytest.mark.zoo) for mode in ("project", "steer"))]
)
def test_a_decode_step_has_no_kernel_more_than_without_the_guard(zoo: Callable[[str], ZooModel], mode: Mode) -> None:
    """All layers guarded, positions `last`; the table in docs/tensorrt.md has these figures."""
    path = zoo("llava-transformers-fp16").path
    engine, bare = engine_for(path, mode, DECODE), engine_for(path, None, DECODE)
    assert engine.layers.kernels == bare.layers.kernels
    assert len(engine.layers.guard_nodes()) == zoo("llava-transformers-fp16").layers


@pytest.mark.parametrize(
    ("mode", "added"),
    [("restore", 0), ("supervise", 1), *(pytest.param(m, 0, marks=pytest.mark.zoo) for m in ("project", "steer"))],
)
def test_a_prompt_has_one_kernel_more_for_the_coordinates_alone(
    zoo: Callable[[str], ZooModel], mode: Mode, added: int
) -> None:
    """Per engine, not per layer: it outputs the text-only pass's coordinates. Each row's last token is found with the mask."""
    path = zoo("llava-transformers-fp16").path
    engine, bare = engine_for(path, mode, PROMPTS), engine_for(path, None, PROMPTS)
    assert engine.layers.kernels == bare.layers.kernels + added
    assert len(engine.layers.guard_nodes()) == zoo("llava-transformers-fp16").layers


@pytest.mark.zoo
def test_combined_needs_the_first_coordinate_alone(zoo: Callable[[str], ZooModel]) -> None:
    path = zoo("llava-transformers-fp16").path
    for profile, added in ((DECODE, 0), (PROMPTS, 1)):
        assert (
            engine_for(path, "combined", profile).layers.kernels
            == engine_for(path, None, profile).layers.kernels + added
        )


# ------------------------------------------------------------------------------------------------------- the derived graph


@pytest.fixture(scope="module")
def for_tensorrt(guarded: Guarded, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mode], Path]:
    """The tiny VLM guarded in a mode as `--target tensorrt` does it."""
    folder = tmp_path_factory.mktemp("for-tensorrt")

    @cache
    def make(mode: Mode) -> Path:
        spec, directions = GuardSpec(mode=mode, target="tensorrt"), guarded(mode) / "directions.safetensors"
        vlmguard.export(SOURCE, folder / mode, spec=spec, directions=directions, proof="local")
        return folder / mode

    return make


def derived(folder: Path, role: DecoderRole = "decode_step") -> EngineGraph:
    manifest = read_manifest(folder)
    graph = derive_engine_graph(folder, manifest, open_guarded_package(folder, manifest), role)
    assert graph is not None
    return graph


@pytest.mark.parametrize("mode", ["restore", "supervise", pytest.param("combined", marks=pytest.mark.long)])
@pytest.mark.parametrize("role", ["decoder", "decode_step"])
def test_the_derived_graph_computes_what_the_guarded_decoder_does(
    for_tensorrt: Callable[[Mode], Path], mode: Mode, role: DecoderRole
) -> None:
    """A call of rows of which some are edited and some are not, on the bytes that the builder is given."""
    folder = for_tensorrt(mode)
    package = open_guarded_package(folder, read_manifest(folder))
    graph = derived(folder, role)
    content, home = in_memory(graph.model, package.decoder.parent, maps=False)
    guarded, decode = open_runner(package.decoder, home), open_runner(content, home)
    unguarded = open_runner(in_memory(graph.unguarded, package.decoder.parent)[0], home)
    random = np.random.default_rng(0)
    rows, tokens, past = 4, 6 if role == "decoder" else 1, 5
    feeds: dict[str, np.ndarray] = {
        name: random.normal(size=[rows if axis == 0 else size or past for axis, size in enumerate(port.shape)])
        for name, port in unguarded.inputs.items()
    }
    text = next(name for name in feeds if "embeds" in name)
    feeds[text] = 3 * random.normal(size=(rows, tokens, feeds[text].shape[-1]))
    feeds["attention_mask"] = np.ones((rows, past + tokens))
    if role == "decoder":
        feeds["attention_mask"][1, -2:] = 0  # padded on the right
        feeds["attention_mask"][2, :past] = 0  # on the left
    if "position_ids" in feeds:
        feeds["position_ids"] = np.tile(past + np.arange(tokens), (rows, 1))
    fed = {name: value.astype(unguarded.inputs[name].dtype) for name, value in feeds.items()}
    stacked, numbers = {}, {}
    if graph.plan.takes_supervisor:
        rank = graph.plan.guards[0].rank
        coordinates = random.normal(scale=5, size=(rows, len(graph.plan.layers), rank)).astype(np.float32)
        for layer, guard in enumerate(graph.plan.guards):  # the gates of supervise read the first coordinate
            coordinates[:, layer, 0] = guard.threshold + 1 + np.abs(coordinates[:, layer, 0])
        coordinates[0] = -1e30  # no supervisor: no gate opens
        stacked = numbers = {SUPERVISOR_INPUT: coordinates}
        if role == "decode_step":
            inputs = NumberInputs(decode.inputs, "the graph")
            flat = coordinates[:, :, : inputs.rows].reshape(rows, -1)
            numbers = {name: flat[:, at, None, None] for at, name in enumerate(inputs.names)}
    expected, found, bare = (
        runner.run(fed | more) for runner, more in ((guarded, stacked), (decode, numbers), (unguarded, {}))
    )
    lacking = {COORDINATES_OUTPUT} if role == "decode_step" else set()
    assert found.keys() == expected.keys() - lacking
    apart = max(float(np.abs(found[name] - expected[name]).max()) for name in found)
    moved = max(float(np.abs(bare[name] - expected[name]).max()) for name in bare)
    assert apart < 1e-4 < 1e-2 < moved
    kind = "prompt" if role == "decoder" else "decode"
    checks = {check.name: check for check in prove_engine_graph(graph)}
    assert all(check.ok for check in checks.values())
    assert checks.keys() >= {
        f"{kind} graph: without its guard it is the guarded decoder without its guard",
        f"{kind} graph: every planned site guarded exactly once",
        f"{kind} graph: no path avoids a guard (dominators)",
    }
    if role == "decoder":  # a static mask would show another token as the last one
        assert checks["prompt graph: a mask with more columns than tokens is an error"].compared > 0
        longer = np.hstack([fed["attention_mask"], np.zeros((rows, 2), fed["attention_mask"].dtype)])
        with pytest.raises(RunFailed):
            decode.run(fed | numbers | {"attention_mask": longer})


def test_where_nothing_is_saved_there_is_no_second_graph(
    for_tensorrt: Callable[[Mode], Path], guarded: Guarded
) -> None:
    plan = derived(for_tensorrt("restore")).plan
    assert decode_step_plan(plan) is None  # positions all, no supervisor
    manifest = read_manifest(guarded("rows"))  # edits the prompt's end: its decode steps are the unguarded decoder's
    for role in ("decoder", "decode_step"):
        package = open_guarded_package(guarded("rows"), manifest)
        assert derive_engine_graph(guarded("rows"), manifest, package, role) is None


# ------------------------------------------------------------------------------------------------------- what is tampered with


@pytest.fixture(scope="module")
def engines(for_tensorrt: Callable[[Mode], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines") / "restore-engine"
    build_engines(for_tensorrt("restore"), out, backend="tensorrt_rtx")
    return out


def test_the_folder_has_an_engine_for_each_phase_and_the_proof_of_both_graphs(
    engines: Path, for_tensorrt: Callable[[Mode], Path]
) -> None:
    manifest = read_manifest(engines)
    prefill, step = manifest.engines[:2]
    assert [[profile["name"] for profile in engine.profiles] for engine in (prefill, step)] == [["prefill"], ["decode"]]
    assert (step.role, step.source["sha256"]) == ("decode_step", prefill.source["sha256"])
    for engine, kind in ((prefill, "prompt"), (step, "decode")):
        assert engine.proof and all(check["ok"] and check["name"].startswith(kind) for check in engine.proof)
    found = verify(engines, for_tensorrt("restore"))
    assert all(check.ok for check in found.checks)
    names = [check.name for check in found.checks]
    for kind in ("prompt", "decode"):
        assert f"the {kind} engine was built from the graph that the guarded folder gives" in names
    assert names.count("the builder showed the guard's nodes in every guarded layer") == 2


def edited(folder: Path, edit: Callable[[dict], None]) -> Path:
    """The folder with another manifest."""
    content = json.loads((folder / "guard.json").read_text())
    edit(content)
    (folder / "guard.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("edit", "failed"),
    [
        (
            lambda content: content["engines"][1]["source"].update(derived_sha256="0" * 64),
            "the decode engine was built from the graph that the guarded folder gives",
        ),
        (
            lambda content: content["engines"][0]["source"].pop("derived_sha256"),
            "the prompt engine was built from the graph that the guarded folder gives",
        ),
        (
            lambda content: content["engines"][1]["source"].update(sha256="0" * 64),
            "every engine was built from the guarded folder's graph",
        ),
        (
            lambda content: content["engines"][1]["layers"]["profiles"][0]["guard_nodes"].popitem(),
            "the builder showed the guard's nodes in every guarded layer",
        ),
        (lambda content: content["engines"][1].update(role="decoder"), "the folder holds the engines of its manifest"),
        (lambda content: content["engines"].pop(1), "the folder holds the engines of its manifest"),
    ],
    ids=[
        "derived graph",
        "derived prompt graph",
        "guarded graph",
        "a layer's guard",
        "two prefill engines",
        "no record",
    ],
)
def test_a_changed_record_of_the_decode_engine_is_detected(
    engines: Path, for_tensorrt: Callable[[Mode], Path], tmp_path: Path, edit: Callable[[dict], None], failed: str
) -> None:
    copy = tmp_path / "engines"
    shutil.copytree(engines, copy)
    found = verify(edited(copy, edit), for_tensorrt("restore"))
    assert any(not check.ok and check.name.startswith(failed) for check in found.checks)


def test_a_changed_engine_or_guarded_graph_is_detected(
    engines: Path, for_tensorrt: Callable[[Mode], Path], tmp_path: Path
) -> None:
    copy, source = tmp_path / "engines", tmp_path / "restore"
    shutil.copytree(engines, copy)
    prefill, step = read_manifest(copy).engines[:2]
    shutil.copy(copy / prefill.path, copy / step.path)
    with pytest.raises(ManifestMismatch, match="SHA-256 differs"):
        verify(copy, for_tensorrt("restore"))
    shutil.copytree(for_tensorrt("restore"), source)
    decoder = open_guarded_package(source, read_manifest(source)).decoder
    model = load_graph(decoder)
    model.graph.node(0).name = "another"
    ir.save(model, decoder)
    with pytest.raises(ManifestMismatch, match="SHA-256 differs"):
        verify(engines, source)


def weaker(model: ir.Model) -> None:
    """Every threshold of the guard out of reach."""
    for name, value in model.graph.initializers.items():
        if name.startswith("vlmguard/") and "tau" in name.rpartition("/")[2]:
            assert value.const_value is not None
            value.const_value = ir.tensor(np.full_like(value.const_value.numpy(), 1e28), name=name)


def without_its_last_guard(model: ir.Model) -> None:
    last = [node for node in model.graph if (node.name or "").endswith("/guarded")][-1]
    assert last.inputs[0] is not None
    last.outputs[0].replace_all_uses_with(last.inputs[0])


def rewritten_and(tamper: Callable[[ir.Model], None]) -> Callable[[ir.Model, GuardPlan], GuardReport]:
    """`rewrite`, and a change behind its back."""

    def tampered(model: ir.Model, plan: GuardPlan) -> GuardReport:
        report = rewrite(model, plan)
        tamper(model)
        return report

    return tampered


@pytest.mark.parametrize("role", ["decoder", "decode_step"])
@pytest.mark.parametrize("tamper", [weaker, without_its_last_guard])
def test_a_changed_derived_graph_fails_its_proof(
    for_tensorrt: Callable[[Mode], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tamper: Callable,
    role: DecoderRole,
) -> None:
    folder = for_tensorrt("restore")
    monkeypatch.setattr(engine_graphs, "rewrite", rewritten_and(tamper))
    failed = [check for check in prove_engine_graph(derived(folder, role)) if not check.ok]
    assert failed, tamper
    with pytest.raises(ProofFailed, match="prompt graph: "):
        build_engines(folder, tmp_path / "out", backend="tensorrt_rtx")
    assert not list(tmp_path.iterdir())


def number(model: ir.Model, name: str, value: int) -> None:
    constant = model.graph.initializers[f"vlmguard/positions/{name}"]
    constant.const_value = ir.tensor(np.array(value, np.int32), name=constant.name)


def no_last_token(model: ir.Model) -> None:
    number(model, "own_column", -1)


def none_behind_a_past(model: ir.Model) -> None:
    number(model, "past_counts", (1 << 30) + 64)


def reads_every_token(model: ir.Model) -> None:
    """The coordinates are a sum over all tokens."""
    (at_last,) = (node for node in model.graph if node.name == "vlmguard/coordinates/at_last")
    assert at_last.inputs[1] is not None
    at_last.outputs[0].replace_all_uses_with(at_last.inputs[1])


@pytest.mark.parametrize(
    ("mode", "tamper", "failed"),
    [
        ("restore", no_last_token, "each guard, cut out, equals the numpy reference"),
        ("restore", none_behind_a_past, "each guard, cut out, equals the numpy reference"),
        ("supervise", reads_every_token, "what each guard, cut out, outputs of itself equals the numpy reference"),
    ],
)
def test_a_prompt_graph_that_misses_the_last_token_fails_its_proof(
    for_tensorrt: Callable[[Mode], Path],
    monkeypatch: pytest.MonkeyPatch,
    mode: Mode,
    tamper: Callable[[ir.Model], None],
    failed: str,
) -> None:
    monkeypatch.setattr(engine_graphs, "rewrite", rewritten_and(tamper))
    checks = {check.name: check.ok for check in prove_engine_graph(derived(for_tensorrt(mode), "decoder"))}
    assert not checks[f"prompt graph: {failed}"]
