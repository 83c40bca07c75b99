"""Every runner of the table executes the same small graphs alike, and says in one line what it cannot open."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_vlm_paths import DECODER, PROMPTS, SOURCE, Guarded

from vlmguard.graphs.errors import ExtraMissing, GuardError, ModelUnreadable, RunFailed
from vlmguard.graphs.extras import install_command
from vlmguard.graphs.layouts import open_package
from vlmguard.runtime import runners
from vlmguard.runtime.decoder import DecoderSession
from vlmguard.runtime.decoder_inputs import PromptBatch
from vlmguard.runtime.device import DeviceOutputs
from vlmguard.runtime.generation import Request, Sampling
from vlmguard.runtime.onnxruntime_runner import OnnxRuntimeDeviceRunner, OnnxRuntimeRunner, OrtTensor, open_onnxruntime
from vlmguard.runtime.runner_protocol import DeviceRunner, Runner
from vlmguard.runtime.runners import open_runner
from vlmguard.runtime.vlm import VisionLanguageModel

pytest_plugins = ("tiny_vlm_fixtures",)

NEED_A_GPU = {"onnxruntime-cuda", "onnxruntime-tensorrt"}
RUNTIMES = [name for name in runners._RUNNERS if name not in NEED_A_GPU]
WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)


def proto(element: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """`doubled = 2 x`, `y = x W`, with a named, a written-out and a fixed dimension in `x` `[batch, "1", 4]`."""
    x = helper.make_tensor_value_info("x", element, ["batch", "1", 4])
    y = helper.make_tensor_value_info("y", element, ["batch", "1", 3])
    doubled = helper.make_tensor_value_info("doubled", element, ["batch", "1", 4])
    weight = WEIGHT.astype(helper.tensor_dtype_to_np_dtype(element))
    nodes = [helper.make_node("Add", ["x", "x"], ["doubled"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "g", [x], [y, doubled], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def opened(runtime: str, folder: Path, how: str, optimize: bool = True) -> Runner:
    """The graph as a file, as bytes, or as bytes whose weight lies in the folder."""
    path = folder / "g.onnx"
    onnx.save(proto(), path)
    if how == "path":
        return open_runner(path, folder, runtime, optimize)
    if how == "bytes":
        return open_runner(proto().SerializeToString(), folder, runtime, optimize)
    model = proto()
    onnx.save(model, path, save_as_external_data=True, location="g.data", size_threshold=0)
    assert (folder / "g.data").stat().st_size == WEIGHT.nbytes
    return open_runner(path.read_bytes(), folder, runtime, optimize)


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("how", ["path", "bytes", "bytes and external data"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runner_computes_all_outputs_by_name(tmp_path: Path, runtime: str, how: str, optimize: bool) -> None:
    runner = opened(runtime, tmp_path, how, optimize)
    x = np.random.default_rng(0).normal(size=(2, 1, 4)).astype(np.float32)
    outputs = runner.run({"x": x})
    assert list(outputs) == ["y", "doubled"]
    np.testing.assert_allclose(outputs["y"], x @ WEIGHT, rtol=1e-5)
    np.testing.assert_array_equal(outputs["doubled"], 2 * x)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_ports_say_names_dtypes_and_static_sizes(tmp_path: Path, runtime: str) -> None:
    runner = opened(runtime, tmp_path, "path")
    port = runner.inputs["x"]
    assert (port.name, port.dtype, port.shape) == ("x", np.float32, (None, 1, 4))  # digits in a name are a size
    assert {name: port.shape for name, port in runner.outputs.items()} == {
        "y": (None, 1, 3),
        "doubled": (None, 1, 4),
    }


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_half_precision_goes_in_and_out(tmp_path: Path, runtime: str) -> None:
    runner = open_runner(proto(TensorProto.FLOAT16).SerializeToString(), tmp_path, runtime)
    assert runner.inputs["x"].dtype == np.float16
    found = runner.run({"x": np.ones((1, 1, 4), np.float16)})["y"]
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found[0, 0], WEIGHT.sum(axis=0))


def test_the_cpu_serves_where_there_is_no_cuda(tmp_path: Path) -> None:
    runner = OnnxRuntimeRunner(proto().SerializeToString(), tmp_path)
    assert runner.providers[-1] == "CPUExecutionProvider"
    only = OnnxRuntimeRunner(proto().SerializeToString(), tmp_path, providers=("CPUExecutionProvider",))
    assert only.providers == ("CPUExecutionProvider",)


# ------------------------------------------------------------------------------------------- outputs that stay on a device


def on_device(path: Path) -> OnnxRuntimeDeviceRunner:
    """What CUDA gets, with the CPU for a device."""
    return OnnxRuntimeDeviceRunner(path, path.parent, providers=("CPUExecutionProvider",))


def test_bound_outputs_are_what_a_plain_run_gives(tmp_path: Path) -> None:
    plain = opened("onnxruntime-cpu", tmp_path, "path")
    bound = on_device(tmp_path / "g.onnx")
    assert isinstance(bound, DeviceRunner) and not isinstance(plain, DeviceRunner)
    x = np.random.default_rng(0).normal(size=(2, 1, 4)).astype(np.float32)
    given = bound.run_on_device({"x": x})
    again = bound.run_on_device({"x": given["doubled"]})
    assert {(name, type(tensor), tensor.shape, tensor.dtype) for name, tensor in given.items()} == {
        ("y", OrtTensor, (2, 1, 3), np.dtype(np.float32)),
        ("doubled", OrtTensor, (2, 1, 4), np.dtype(np.float32)),
    }
    for found, fed in ((given, x), (again, 2 * x)):
        for name, array in plain.run({"x": fed}).items():
            np.testing.assert_array_equal(found[name], array)
    assert np.asarray(given["y"], np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="cannot be seen from the host without a copy"):
        given["y"].__array__(copy=False)


def test_a_missing_or_wrong_input_is_an_error_when_bound_too(tmp_path: Path) -> None:
    opened("onnxruntime", tmp_path, "path")
    bound = on_device(tmp_path / "g.onnx")
    with pytest.raises(RunFailed, match=r"cannot run the graph on these inputs \(x is missing\)"):
        bound.run_on_device({})
    with pytest.raises(RunFailed, match=r"cannot run the graph on these inputs \(.*Unexpected input data type"):
        bound.run_on_device({"x": np.zeros((1, 1, 4))})
    with pytest.raises(RunFailed, match="cannot run the graph on these inputs"):
        bound.run_on_device({"z": np.zeros((1, 1, 4), np.float32), "x": np.zeros((1, 1, 4), np.float32)})


@pytest.mark.parametrize("mode", ["restore", "supervise"])
def test_a_model_answers_the_same_with_its_cache_in_ort_values(guarded: Guarded, mode: str) -> None:
    package = open_package(guarded(mode))
    requests = [Request("how to steal the boat"), Request("what color is this image", PROMPTS / "images" / picture())]
    sampling = Sampling(max_new_tokens=8)
    bound = VisionLanguageModel(package, open_part=on_device)
    assert bound.answer(requests, sampling) == VisionLanguageModel(package).answer(requests, sampling)
    outputs, state = bound.decoder.prefill(bound.batch(requests[:1]), bound.supervise(requests[:1]))
    assert isinstance(outputs, DeviceOutputs) and all(isinstance(kept, OrtTensor) for kept in state.cache.values())
    assert isinstance(state.supervisor, OrtTensor) == (mode == "supervise")


def picture() -> str:
    return sorted(path.name for path in (PROMPTS / "images").glob("*.png"))[0]


def test_outputs_are_copied_once_and_only_when_they_are_looked_at() -> None:
    path = SOURCE / DECODER
    session = DecoderSession(on_device(path))
    copied: list[str] = []

    class Watched(OrtTensor):
        name = ""

        def numpy(self) -> np.ndarray:
            copied.append(self.name)
            return super().numpy()

    run = session.runner.run_on_device

    def watched(feeds: dict, step: bool = False) -> dict:
        given = {}
        for name, tensor in run(feeds, step).items():
            given[name] = Watched(tensor.value, tensor.dtype)
            given[name].name = name
        return given

    session.runner.run_on_device = watched
    batch = PromptBatch(np.zeros((1, 3), np.int64), np.ones((1, 3), np.int64), np.ones((1, 3, 128), np.float32))
    outputs, state = session.prefill(batch)
    session.step(state, np.zeros((1, 1), np.int64), np.ones((1, 1, 128), np.float32))
    assert copied == []
    assert outputs["logits"] is outputs["logits"] and "present.0.key" in outputs
    assert copied == ["logits"]


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("runtime", "provider", "what"),
    [
        ("onnxruntime-cuda", "CUDAExecutionProvider", ""),
        ("onnxruntime-tensorrt", "TensorrtExecutionProvider", "; TensorRT 10's libraries must be there too"),
    ],
)
def test_a_provider_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, provider: str, what: str
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ExtraMissing) as caught:
        opened(runtime, tmp_path, "path")
    assert str(caught.value) == (
        f"this onnxruntime has no {provider}, it has CPUExecutionProvider; on a machine with an NVIDIA GPU, "
        f"remove onnxruntime and run: {install_command('gpu')}{what}"
    )


def test_a_provider_that_does_not_start_is_not_replaced_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime-gpu without a GPU: the provider is listed, and the session runs on the CPU."""
    import onnxruntime

    class Session(onnxruntime.InferenceSession):
        def __init__(self, source: object, options: object, providers: list, enable_fallback: bool) -> None:
            super().__init__(source, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    listed = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    opened("onnxruntime-cpu", tmp_path, "path")
    for name, provider in (("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")):
        with pytest.raises(ExtraMissing) as caught:
            open_onnxruntime(tmp_path / "g.onnx", tmp_path, True, name)
        assert str(caught.value).startswith(
            f"{provider} does not start, onnxruntime would take CPUExecutionProvider; on a machine with an "
            "NVIDIA GPU, remove onnxruntime and run: "
        )
    # whoever did not name one is served by the CPU, and then nothing is bound to a device that is not there
    runner = open_onnxruntime(tmp_path / "g.onnx", tmp_path, True, None)
    assert not isinstance(runner, DeviceRunner)
    np.testing.assert_array_equal(runner.run({"x": np.ones((1, 1, 4), np.float32)})["doubled"], np.full((1, 1, 4), 2))


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt_rtx"])
def test_a_graph_is_no_engine(tmp_path: Path, runtime: str) -> None:
    for how, what in (("path", "g.onnx"), ("bytes", "a graph in memory")):
        with pytest.raises(GuardError) as caught:
            opened(runtime, tmp_path, how)
        assert str(caught.value) == (
            f"{runtime} runs engines, not {what}; build one with `vlmguard engine`, and open the folder that it writes"
        )


def test_an_unknown_runtime_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GuardError) as caught:
        open_runner(b"", tmp_path, "abacus")
    assert str(caught.value) == f"runtime 'abacus' is unknown; choose one of {', '.join(runners._RUNNERS)}"


def test_without_onnxruntime_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what an import of a missing module looks like
    with pytest.raises(ExtraMissing) as caught:
        open_runner(proto().SerializeToString(), tmp_path)
    assert str(caught.value) == (
        f"onnxruntime is not installed; run: {install_command('cpu')} (or {install_command('gpu')} for CUDA; not both)"
    )


@pytest.mark.parametrize("as_bytes", [True, False])
def test_a_broken_graph_is_refused_in_one_line(tmp_path: Path, as_bytes: bool) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(proto().SerializeToString()[:-20])
    with pytest.raises(ModelUnreadable) as caught:
        open_runner(path.read_bytes() if as_bytes else path, tmp_path)
    sentence = str(caught.value)
    where = "the graph" if as_bytes else str(path)
    assert sentence.startswith(f"{where}: onnxruntime cannot open it (")
    assert sentence.endswith("); is the file complete?") and "\n" not in sentence


def one_node(op: str, domain: str = "", opset: int = 18, ir_version: int = 10) -> bytes:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in "xy")
    node = onnx.helper.make_node(op, ["x"], ["y"], name="the node", domain=domain)
    imports = [onnx.helper.make_opsetid("", opset), *([onnx.helper.make_opsetid(domain, 1)] if domain else [])]
    graph = onnx.helper.make_graph([node], "g", [x], [y])
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=ir_version).SerializeToString()


@pytest.mark.parametrize(
    ("graph", "sentence"),
    [
        (
            one_node("AttentionPlugin", "trt"),
            "the graph: onnxruntime cannot open it (operator trt::AttentionPlugin is unknown); it needs a runtime with this "
            "operator; `vlmguard export --proof structure` guards the graph without running it",
        ),
        (
            one_node("AttentionPlugin"),
            "the graph: onnxruntime cannot open it (operator AttentionPlugin of node 'the node' is unknown in opset 18); it "
            "needs a runtime with this operator; `vlmguard export --proof structure` guards the graph without running it",
        ),
        (one_node("Relu", opset=99), "; update onnxruntime, or export it with an older version"),
        (one_node("Relu", ir_version=99), "; update onnxruntime, or export it with an older version"),
        (one_node("MatMul"), "; export it again"),
    ],
)
def test_a_graph_that_is_complete_is_not_called_incomplete(graph: bytes, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadable) as caught:
        open_runner(graph, tmp_path)
    said = str(caught.value)
    assert said == sentence if sentence.startswith("the graph") else said.endswith(sentence)
    assert "complete?" not in said and "\n" not in said


def test_missing_external_data_is_refused(tmp_path: Path) -> None:
    opened("onnxruntime", tmp_path, "bytes and external data")
    (tmp_path / "g.data").unlink()
    with pytest.raises(ModelUnreadable, match=r"onnxruntime cannot open it \(.*g\.data\"?\); is the file complete\?$"):
        open_runner((tmp_path / "g.onnx").read_bytes(), tmp_path)


def test_a_missing_input_is_the_runtimes_own_error(tmp_path: Path) -> None:
    """Nothing is filled in for a caller who forgets an input: that is what makes `supervise` safe to ship."""
    with pytest.raises(
        RunFailed, match=r"cannot run the graph on these inputs \(Required inputs \(\['x'\]\) are missing"
    ):
        opened("onnxruntime", tmp_path, "path").run({})
