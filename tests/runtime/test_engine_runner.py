"""The TensorRT runner on a fake device and a fake TensorRT that execute the same graphs as ONNX Runtime does.

What can be seen without a GPU: that answers are the same bit for bit, what is copied and allocated when, which profile
runs, what is recorded, what is refused, and that everything is given back.
"""

from __future__ import annotations

import gc
import hashlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cudart import FakeCudart
from fake_tensorrt import CudaGraphStrategy, Profile, fake_engine, sizes
from onnx import TensorProto, helper
from tensorrt_rig import Rig
from tiny_vlm_paths import DECODER, PROMPTS, SOURCE, Guarded

from vlmguard.graphs.errors import ExtraMissing, GuardError, ManifestMismatch, ModelUnreadable, RunFailed
from vlmguard.graphs.extras import install_command
from vlmguard.graphs.layouts import open_package
from vlmguard.runtime.decoder import DecoderSession, open_decoder
from vlmguard.runtime.decoder_inputs import PromptBatch
from vlmguard.runtime.generation import Request, Sampling
from vlmguard.runtime.runner_protocol import DeviceRunner
from vlmguard.runtime.tensorrt.backend import BackendName
from vlmguard.runtime.tensorrt.cuda import Cuda, CudaTensor, Pool
from vlmguard.runtime.tensorrt.engine_runner import TensorRTRunner
from vlmguard.runtime.vlm import VisionLanguageModel

pytest_plugins = ("tiny_vlm_fixtures",)

WIDTH, VOCABULARY, LAYERS = 128, 178, 6
CACHE = [f"past_key_values.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
PICTURES = sorted((PROMPTS / "images").glob("*.png"))
REQUESTS = [
    Request("how to steal the boat"),
    Request("tell me how to wash the boat"),
    Request("please tell me how to steal the boat", PICTURES[1]),
]


def prompt(batch: int = 2, length: int = 5, seed: int = 0) -> PromptBatch:
    """Random embeddings; the first row has a token of padding."""
    embeds = np.random.default_rng(seed).normal(size=(batch, length, WIDTH)).astype(np.float32)
    mask = np.ones((batch, length), np.int64)
    mask[0, 0] = 0
    return PromptBatch(np.zeros_like(mask), mask, embeds)


def generation(session: DecoderSession, steps: int = 8, **of_prompt: int) -> list[np.ndarray]:
    """Logits of a prompt's last token and of some steps after it, `[steps + 1][batch, vocabulary]`."""
    batch = prompt(**of_prompt)
    random = np.random.default_rng(1)
    outputs, state = session.prefill(batch)
    logits = [session.last_logits(outputs)]
    for _ in range(steps):
        embeds = random.normal(size=(batch.size, 1, WIDTH)).astype(np.float32)
        outputs = session.step(state, np.zeros((batch.size, 1), np.int64), embeds)
        logits.append(session.last_logits(outputs))
    return logits


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    return generation(open_decoder(open_package(SOURCE)))


@pytest.fixture
def rig() -> Rig:
    return Rig()


# ----------------------------------------------------------------------------------------------------- what it computes


def test_prefill_and_steps_equal_onnxruntimes(rig: Rig, expected: list[np.ndarray]) -> None:
    np.testing.assert_array_equal(generation(rig.decoder()), expected)


def test_every_output_can_be_read_and_cannot_be_seen_through(rig: Rig) -> None:
    """Also the cache, which nobody reads in ordinary life."""
    feeds = open_decoder(open_package(SOURCE)).prefill_feeds(prompt())
    wanted = open_decoder(open_package(SOURCE)).runner.run(feeds)
    found = rig.decoder().runner.run(feeds)
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
    outputs, _ = rig.decoder().prefill(prompt())
    assert list(outputs) == list(wanted) and len(outputs) == 1 + 2 * LAYERS
    np.testing.assert_array_equal(outputs["present.3.value"], wanted["present.3.value"])


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_a_whole_model_answers_as_on_onnxruntime(backend: BackendName, tmp_path: Path) -> None:
    model = Rig(backend, tmp_path / "cache").model(SOURCE)
    sampling = Sampling(max_new_tokens=12)
    assert model.answer(REQUESTS, sampling) == VisionLanguageModel(open_package(SOURCE)).answer(REQUESTS, sampling)


def test_a_supervised_model_answers_the_same_and_keeps_the_coordinates_on_the_device(
    guarded: Guarded, rig: Rig
) -> None:
    model = rig.model(guarded("supervise"))
    plain = VisionLanguageModel(open_package(guarded("supervise")))
    assert model.answer(REQUESTS, Sampling(8)) == plain.answer(REQUESTS, Sampling(8))
    text = model.batch([REQUESTS[0]])  # the embedding runner copies what it gives: that is not what is looked at
    model.batch = lambda requests: text
    rig.cudart.to_host.clear()
    heard = model.supervise([REQUESTS[0]])
    assert isinstance(heard, CudaTensor) and rig.cudart.to_host == []
    fed = len(rig.cudart.to_device)
    _, state = model.decoder.prefill(text, heard)
    assert rig.cudart.to_host == [] and state.supervisor is heard
    assert heard.buffer.size not in rig.cudart.to_device[fed:]
    wanted = plain.supervise([REQUESTS[0]])
    assert isinstance(wanted, np.ndarray) and heard.shape == wanted.shape == (1, *model.decoder.supervisor_shape)
    np.testing.assert_array_equal(np.asarray(heard), wanted)


def test_the_padding_rule_can_be_given_and_is_read_from_the_graph_otherwise(rig: Rig) -> None:
    package = open_package(SOURCE)
    opened = lambda path: rig.open(fake_engine(path))  # noqa: E731
    assert VisionLanguageModel(package, open_part=opened).pads is True
    assert VisionLanguageModel(package, open_part=opened, pads=False).pads is False


# -------------------------------------------------------------------------------------------- what is copied, what is kept


def test_only_the_last_tokens_logits_leave_the_device(rig: Rig) -> None:
    generation(rig.decoder())
    assert rig.cudart.to_host == [VOCABULARY * 4] * 2 * 9  # a row each of two prompts, in nine calls


def test_the_cache_is_never_fed_again(rig: Rig) -> None:
    session = rig.decoder()
    _, state = session.prefill(prompt())
    rig.cudart.to_device.clear()
    session.step(state, np.zeros((2, 1), np.int64), prompt(length=1).embeds)
    rig.cuda.synchronize()
    assert sorted(rig.cudart.to_device) == [2 * 8, 2 * 6 * 8, 2 * WIDTH * 4]  # position_ids, attention_mask, embeds
    assert all(isinstance(state.cache[name], CudaTensor) and state.cache[name].shape[2] == 6 for name in CACHE)


def test_a_warm_step_allocates_nothing(rig: Rig, expected: list[np.ndarray]) -> None:
    session = rig.decoder(cuda_graph=False)
    generation(session)
    before = rig.cudart.calls["cudaMalloc"]
    assert before
    np.testing.assert_array_equal(generation(session), expected)
    assert rig.cudart.calls["cudaMalloc"] == before


def test_outputs_that_somebody_keeps_are_not_written_again(rig: Rig) -> None:
    session = rig.decoder()
    first, _ = session.prefill(prompt())
    generation(session, seed=3)
    wanted, _ = rig.decoder().prefill(prompt())
    np.testing.assert_array_equal(first["present.0.key"], wanted["present.0.key"])


def test_tensors_of_another_device_are_copied_over_the_host(rig: Rig) -> None:
    other = Rig()
    runner = other.decoder().runner
    assert isinstance(runner, DeviceRunner)
    given = runner.run_on_device(rig.decoder().prefill_feeds(prompt()))
    feeds = rig.decoder().prefill_feeds(prompt(length=1))
    feeds["attention_mask"] = np.ones((2, 6), np.int64)
    past = {name: given[name.replace("past_key_values", "present")] for name in CACHE}
    found = rig.decoder().runner.run(feeds | past)["logits"]
    wanted = open_decoder(open_package(SOURCE)).runner.run(feeds | {n: np.asarray(t) for n, t in past.items()})
    np.testing.assert_array_equal(found, wanted["logits"])


# -------------------------------------------------------------------------------------------------------------- profiles


def decoder_profile(sequence: tuple[int, int, int], past: tuple[int, int, int]) -> Profile:
    batch, total = (1, 1, 4), (sequence[0] + past[0], sequence[1] + past[1], sequence[2] + past[2])
    cache = dict.fromkeys(CACHE, sizes(batch, (2, 2, 2), past, (32, 32, 32)))
    text = {"inputs_embeds": sizes(batch, sequence, (WIDTH,) * 3), "position_ids": sizes(batch, sequence)}
    return {**text, "attention_mask": sizes(batch, total), **cache}


PREFILL, DECODE = decoder_profile((1, 64, 128), (0, 0, 0)), decoder_profile((1, 1, 1), (0, 64, 128))


@pytest.mark.parametrize("profiles", [(PREFILL, DECODE), (DECODE, PREFILL)])
def test_each_call_takes_the_profile_that_fits(rig: Rig, profiles: Any, expected: list[np.ndarray]) -> None:
    np.testing.assert_array_equal(generation(rig.decoder(*profiles)), expected)
    assert rig.trt.ran == [profiles.index(PREFILL)] + 8 * [profiles.index(DECODE)]
    assert rig.trt.contexts == 2


def test_of_two_profiles_that_fit_the_nearer_is_taken(rig: Rig) -> None:
    wide, narrow = decoder_profile((1, 900, 1000), (0, 0, 1000)), decoder_profile((1, 6, 1000), (0, 0, 1000))
    rig.decoder(wide, narrow).prefill(prompt(length=5))
    rig.decoder(wide, narrow).prefill(prompt(length=700))
    assert rig.trt.ran == [1, 0]


def test_shapes_that_no_profile_takes_are_refused(rig: Rig) -> None:
    session = rig.decoder(PREFILL, DECODE)
    with pytest.raises(RunFailed) as caught:
        session.prefill(prompt(length=129))
    assert str(caught.value) == (
        "input 'inputs_embeds' has shape (2, 129, 128), the engine was built for (1, 1, 128)..(4, 128, 128) or "
        "(1, 1, 128)..(4, 1, 128); send less, or build it with a wider profile"
    )
    _, state = session.prefill(prompt())
    with pytest.raises(RunFailed, match="no one profile of the engine takes these together: inputs_embeds"):
        session.step(state, np.zeros((2, 2), np.int64), prompt(length=2).embeds)  # two tokens on a cache


# ----------------------------------------------------------------------------------------------------- recorded calls


def test_a_step_is_recorded_when_it_is_met_again(rig: Rig, expected: list[np.ndarray]) -> None:
    session = rig.decoder()
    launched = []
    for _ in range(6):
        np.testing.assert_array_equal(generation(session, steps=8), expected)
        launched.append(rig.cudart.calls["cudaGraphLaunch"])
    assert rig.cudart.calls["cudaStreamBeginCapture"] == 8  # each of the eight steps, once
    assert launched[0] == launched[1] == 0 and launched[-1] - launched[-2] == 8


def test_another_cache_length_between_does_not_spoil_a_recorded_step(rig: Rig, expected: list[np.ndarray]) -> None:
    session = rig.decoder()
    for _ in range(4):
        np.testing.assert_array_equal(generation(session), expected)
        generation(session, length=9, batch=1)
    assert rig.cudart.calls["cudaGraphLaunch"]


def test_a_recorded_step_is_not_replayed_on_other_memory(rig: Rig, expected: list[np.ndarray]) -> None:
    session = rig.decoder()
    for _ in range(4):
        np.testing.assert_array_equal(generation(session), expected)
    launched = rig.cudart.calls["cudaGraphLaunch"]
    assert launched
    assert isinstance(session.runner, TensorRTRunner)
    pool = session.runner._pool
    held = [pool.take(size) for size, addresses in list(pool._free.items()) for _ in list(addresses)]
    np.testing.assert_array_equal(generation(session), expected)
    assert held and rig.cudart.calls["cudaGraphLaunch"] == launched


def test_no_more_steps_are_recorded_than_there_is_room_for(rig: Rig) -> None:
    session = rig.decoder()
    wanted = generation(session, steps=20)
    for _ in range(4):
        np.testing.assert_array_equal(generation(session, steps=20), wanted)
    assert rig.cudart.calls["cudaStreamBeginCapture"] == 8 and rig.trt.contexts == 1 + 8


def test_where_recording_fails_it_runs_without(rig: Rig, expected: list[np.ndarray]) -> None:
    session = rig.decoder()
    rig.cudart.forbids_capture = True
    for _ in range(4):
        np.testing.assert_array_equal(generation(session), expected)
    assert rig.cudart.calls["cudaStreamBeginCapture"] == 1 and not rig.cudart.calls["cudaGraphLaunch"]


def test_recording_can_be_turned_off(rig: Rig) -> None:
    session = rig.decoder(cuda_graph=False)
    for _ in range(3):
        generation(session)
    assert not rig.cudart.calls["cudaStreamBeginCapture"]


# ---------------------------------------------------------------------------------------------------------- TensorRT-RTX


@pytest.mark.parametrize("wanted", [True, False])
def test_rtx_records_by_itself(tmp_path: Path, wanted: bool, expected: list[np.ndarray]) -> None:
    rig = Rig("tensorrt_rtx", tmp_path / "cache")
    session = rig.decoder(cuda_graph=wanted)
    for _ in range(3):
        np.testing.assert_array_equal(generation(session), expected)
    (config,) = {context.config for context in rig.trt.alive if hasattr(context, "config")}
    assert config.cuda_graph_strategy is (
        CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if wanted else CudaGraphStrategy.DISABLED
    )
    assert not rig.cudart.calls["cudaStreamBeginCapture"]


def test_rtx_keeps_what_it_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMGUARD_CACHE", str(tmp_path / "vlmguard"))
    content = fake_engine(SOURCE / DECODER, (PREFILL, DECODE))
    path = tmp_path / "vlmguard" / "engines" / f"{hashlib.sha256(content).hexdigest()}.rtxcache"
    session = DecoderSession(Rig("tensorrt_rtx").open(content))
    _, state = session.prefill(prompt())
    assert path.read_text() == "CACHE 10.9.0 [0]"  # after the first run already
    session.step(state, np.zeros((2, 1), np.int64), prompt(length=1).embeds)
    assert path.read_text() == "CACHE 10.9.0 [0][1]"
    assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0
    assert [child.name for child in path.parent.iterdir()] == [path.name]
    before = path.stat().st_mtime_ns
    assert compiled_at_start(content) == "[0][1]"
    assert path.stat().st_mtime_ns == before  # nothing new, nothing written
    monkeypatch.setenv("VLMGUARD_CACHE", "")
    assert compiled_at_start(content) == ""


def compiled_at_start(content: bytes, cache: Path | None = None) -> str:
    """What a new runner of TensorRT-RTX finds in its cache."""
    rig = Rig("tensorrt_rtx")
    runner = rig.open(content, runtime_cache=cache)
    (engine,) = (one for one in rig.trt.alive if hasattr(one, "configs"))
    compiled = engine.configs[0].cache.compiled
    runner.close()
    return compiled


def test_a_cache_that_is_not_the_users_own_is_not_read(tmp_path: Path) -> None:
    content, path = fake_engine(SOURCE / DECODER), tmp_path / "cache"
    path.write_text("CACHE 10.9.0 [7]")
    path.chmod(0o600)
    assert compiled_at_start(content, path) == "[7]"
    path.chmod(0o622)
    assert compiled_at_start(content, path) == ""
    real = tmp_path / "real"
    real.write_text("CACHE 10.9.0 [7]")
    real.chmod(0o600)
    path.unlink()
    path.symlink_to(real)
    assert compiled_at_start(content, path) == ""


@pytest.mark.parametrize("found", ["CACHE 9.9.9 [0]", "", "no cache at all"])
def test_a_cache_of_another_version_is_replaced(tmp_path: Path, found: str, expected: list[np.ndarray]) -> None:
    path = tmp_path / "cache"
    path.write_text(found)
    path.chmod(0o600)
    np.testing.assert_array_equal(generation(Rig("tensorrt_rtx", path).decoder()), expected)
    assert path.read_text() == "CACHE 10.9.0 [0]"


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, expected: list[np.ndarray]) -> None:
    (tmp_path / "file").write_text("")
    np.testing.assert_array_equal(generation(Rig("tensorrt_rtx", tmp_path / "file" / "cache").decoder()), expected)


# ------------------------------------------------------------------------------------------------- other kinds of engines


def graph(inputs: Mapping[str, tuple[int, list]], outputs: Mapping[str, tuple[int, list]], *nodes: Any) -> Any:
    ports = [[helper.make_tensor_value_info(name, *what) for name, what in some.items()] for some in (inputs, outputs)]
    made = helper.make_graph(list(nodes), "g", *ports)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
RESHAPE = graph(
    {"x": (FLOAT, ["n"]), "shape": (INT64, [2])},
    {"y": (FLOAT, ["a", "b"]), "again": (INT64, [2])},
    helper.make_node("Reshape", ["x", "shape"], ["y"]),
    helper.make_node("Add", ["shape", "shape"], ["again"]),
)


def test_shape_tensors_stay_on_the_host(rig: Rig) -> None:
    held = {"values of shape": ([1, 1], [2, 3], [6, 6])}
    runner = rig.open(fake_engine(RESHAPE, [held], on_host=["shape", "again"]))
    x = np.arange(6, dtype=np.float32)
    for shape in ((2, 3), (3, 2), (2, 3), (6, 1)):
        given = runner.run_on_device({"x": x, "shape": np.array(shape)}, step=True)
        np.testing.assert_array_equal(given["again"], 2 * np.array(shape))  # first: nothing else has waited for it
        np.testing.assert_array_equal(given["y"], x.reshape(shape))
    assert not rig.cudart.calls["cudaStreamBeginCapture"]  # their values are in no key
    with pytest.raises(RunFailed, match=r"no one profile of the engine takes these together: x \(7,\), shape \(2,\)"):
        runner.run({"x": np.zeros(7, np.float32), "shape": np.array([7, 1])})


def test_what_the_device_reads_on_the_host_lives_until_it_has(rig: Rig) -> None:
    rows = graph(
        {"x": (FLOAT, ["n"]), "shape": (INT64, [2])},
        {"y": (FLOAT, ["a", "b"])},
        helper.make_node("Reshape", ["x", "shape"], ["square"]),
        helper.make_node("ReduceSum", ["shape"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["side"], to=FLOAT),
        helper.make_node("Mul", ["square", "side"], ["y"]),
    )
    runner = rig.open(fake_engine(rows, on_host=["shape"]))
    x = np.arange(6, dtype=np.float32)
    given = [runner.run_on_device({"x": x, "shape": np.array(shape)}) for shape in ((2, 3), (6, 1))]  # nobody waits
    for found, shape in zip(given, ((2, 3), (6, 1)), strict=True):
        np.testing.assert_array_equal(found["y"], x.reshape(shape) * sum(shape))


def test_a_shape_that_values_decide_is_refused(rig: Rig) -> None:
    where = graph({"x": (FLOAT, ["n"])}, {"y": (INT64, [1, "k"])}, helper.make_node("NonZero", ["x"], ["y"]))
    runner = rig.open(fake_engine(where, values_decide=["y"]))
    with pytest.raises(RunFailed) as caught:
        runner.run({"x": np.ones(3, np.float32)})
    assert str(caught.value) == "the shape of the engine's output 'y' depends on values; export without such an output"


def test_ports_tell_types_and_static_sizes(rig: Rig) -> None:
    runner = rig.open(fake_engine(RESHAPE, types={"x": "BF16", "y": "HALF"}))
    assert {name: (str(port.dtype), port.shape) for name, port in (runner.inputs | runner.outputs).items()} == {
        "x": ("bfloat16", (None,)),
        "shape": ("int64", (2,)),
        "y": ("float16", (None, None)),
        "again": ("int64", (2,)),
    }
    with pytest.raises(GuardError, match="the engine's 'x' is of type FP4, which cannot be fed or read"):
        rig.open(fake_engine(RESHAPE, types={"x": "FP4"}))


# -------------------------------------------------------------------------------------------------------------- refusals


def test_an_engine_that_nobody_vouched_for_is_never_deserialised(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "decoder.engine"
    content = fake_engine(SOURCE / DECODER)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    digest, found = (hashlib.sha256(some).hexdigest()[:12] for some in (content, path.read_bytes()))
    with pytest.raises(ManifestMismatch) as caught:
        TensorRTRunner(path, hashlib.sha256(content).hexdigest(), rig.backend, rig.cuda)
    assert str(caught.value) == (
        f"{path}: its sha256 is {found}, not {digest}; an engine is executable code and is not opened unless it is the one "
        "that was built; build it again"
    )
    assert rig.trt.deserialised == 0
    path.write_bytes(content)
    TensorRTRunner(path, hashlib.sha256(content).hexdigest().upper(), rig.backend, rig.cuda)
    assert rig.trt.deserialised == 1


def test_an_engine_of_another_version_is_refused(rig: Rig) -> None:
    with pytest.raises(ModelUnreadable) as caught:
        rig.open(fake_engine(SOURCE / DECODER, version="10.3.0"))
    assert str(caught.value) == (
        "the engine: tensorrt 10.9.0 cannot load it (engine plan file was generated by version 10.3.0); an engine runs on "
        "the version and the kind of GPU that it was built for; build it again here"
    )
    with pytest.raises(ModelUnreadable, match=r"cannot load it \(magicTag does not match\)"):
        rig.open(b"no engine")


def test_a_file_that_is_not_there_is_refused(rig: Rig, tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadable, match=r"nowhere.engine: cannot be read \("):
        TensorRTRunner(tmp_path / "nowhere.engine", "0" * 64, rig.backend, rig.cuda)


def test_inputs_that_the_engine_would_misread_are_refused(rig: Rig) -> None:
    runner = rig.decoder().runner
    feeds = rig.decoder().prefill_feeds(prompt())
    with pytest.raises(RunFailed, match="the engine takes 'attention_mask' as int64, not as int32"):
        runner.run(feeds | {"attention_mask": feeds["attention_mask"].astype(np.int32)})
    with pytest.raises(RunFailed, match="the engine has no input 'pixels'; it takes inputs_embeds, attention_mask"):
        runner.run(feeds | {"pixels": feeds["attention_mask"]})
    del feeds["attention_mask"]
    with pytest.raises(RunFailed, match="the engine misses its input 'attention_mask'; it takes inputs_embeds"):
        runner.run(feeds)


def test_without_a_device_one_line_says_so() -> None:
    with pytest.raises(GuardError) as caught:
        Cuda(FakeCudart(devices=0))
    assert str(caught.value) == (
        "no CUDA device (cudaErrorNoDevice: as it says); run it on a machine with an NVIDIA GPU and its driver"
    )


def test_without_the_bindings_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(ExtraMissing) as caught:
        Cuda()
    assert str(caught.value) == (
        f"cuda-bindings is not installed; run: {install_command('tensorrt')} (or {install_command('rtx')} for RTX GPUs)"
    )


# ---------------------------------------------------------------------------------------------------- memory, and its end


@pytest.mark.parametrize("how", ["close", "collected"])
def test_everything_is_given_back(rig: Rig, how: str) -> None:
    session = rig.decoder()
    for _ in range(3):
        generation(session)
    outputs, state = session.prefill(prompt())
    wanted = session.runner.run(session.prefill_feeds(prompt()))["present.0.key"]
    assert rig.cudart.graphs and rig.cudart.blocks and len(rig.trt.alive) > 2
    if how == "close":
        session.runner.close()
        session.runner.close()
        with pytest.raises(RunFailed, match="the runner was closed; open the model again"):
            session.prefill(prompt())
    del session
    gc.collect()
    assert not rig.cudart.graphs and not rig.trt.alive
    assert len(rig.cudart.blocks) == len(outputs)  # what somebody holds stays as long, and can be read
    np.testing.assert_array_equal(outputs["present.0.key"], wanted)
    del outputs
    assert len(rig.cudart.blocks) == len(state.cache)
    del state
    rig.cuda.close()
    assert rig.cudart.nothing_left


def test_a_device_of_ones_own_goes_with_the_last_that_is_on_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmguard.runtime.tensorrt.cuda.import_cudart", lambda: rig.cudart)
    rig.cuda.close()
    session = rig.decoder(cuda=None)
    outputs, state = session.prefill(prompt())
    session.runner.close()
    assert rig.cudart.streams
    assert outputs["logits"].shape == (2, 5, VOCABULARY)
    del outputs, state
    assert rig.cudart.nothing_left
    with pytest.raises(ModelUnreadable):
        rig.open(b"no engine", cuda=None)
    assert rig.cudart.nothing_left


def test_a_device_that_is_full_is_told_in_one_line() -> None:
    rig = Rig(total=2**20)
    with pytest.raises(RunFailed) as caught:
        rig.decoder().prefill(prompt(batch=4, length=1000))
    assert str(caught.value) == (
        "no 2 MiB on Fake GPU, 1 of 1 MiB are free (cudaMalloc failed: cudaErrorMemoryAllocation: as it says); take a "
        "smaller batch or shorter prompts"
    )


def test_what_nobody_holds_makes_room() -> None:
    pool = Pool(Cuda(FakeCudart(total=1024)))
    held = pool.take(200)
    assert pool.take(600).size == 768  # and given back at once, but not to the device
    assert len(pool.cuda._api.blocks) == 2
    again = pool.take(500)  # only once the 768 are freed
    assert again.size == 512 and sorted(pool.cuda._api.blocks) == sorted([held.address, again.address])
    pool.close()
    del held, again
    assert not pool.cuda._api.blocks


@pytest.mark.parametrize("size", [0, 1, 256, 257, 1000, 4096, 5000, 10**6 + 1, 2**31 + 1])
def test_a_buffer_is_large_enough_and_wastes_a_quarter_at_most(size: int) -> None:
    from vlmguard.runtime.tensorrt.cuda import _rounded

    assert max(size, 256) <= _rounded(size) <= max(1.25 * size, size + 256)
    assert _rounded(_rounded(size)) == _rounded(size)


# ------------------------------------------------------------------------------------------------------- the real modules


def test_the_real_bindings_have_what_is_called() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    for name in (name for name in dir(FakeCudart) if name.startswith("cuda")):
        assert hasattr(runtime, name), name
    for kind in ("cudaMemcpyKind", "cudaStreamCaptureMode"):
        assert all(hasattr(getattr(runtime, kind), name) for name in getattr(FakeCudart, kind).__members__)


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_the_real_tensorrt_has_what_is_called(name: str) -> None:
    import fake_tensorrt

    module = pytest.importorskip(name)
    pairs: list[tuple[type, Callable[..., Any]]] = [
        (fake_tensorrt.Engine, module.ICudaEngine),
        (fake_tensorrt.Context, module.IExecutionContext),
    ]
    extra = {"output_shapes", "dtype", "create_runtime_config"}
    if name == "tensorrt_rtx":
        pairs += [
            (fake_tensorrt.RuntimeConfig, module.IRuntimeConfig),
            (fake_tensorrt.RuntimeCache, module.IRuntimeCache),
        ]
        extra.discard("create_runtime_config")
    for fake, real in pairs:
        for method in (n for n in vars(fake) if not n.startswith("_") and n not in extra):
            assert hasattr(real, method), f"{real} has no {method}"
    for enum in ("DataType", "TensorIOMode", "TensorLocation"):
        assert all(hasattr(getattr(module, enum), member) for member in getattr(fake_tensorrt, enum).__members__)
