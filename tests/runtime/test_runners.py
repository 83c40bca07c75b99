"""Every runner of the table executes the same small graphs alike, and says in one line what it cannot open."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vlmguard.graphs.errors import ExtraMissing, GuardError, ModelUnreadable, RunFailed
from vlmguard.runtime import runners
from vlmguard.runtime.onnxruntime_runner import OnnxRuntimeRunner
from vlmguard.runtime.runners import Runner, open_runner

RUNTIMES = [name for name in runners._RUNNERS if name == "onnxruntime"]  # the others need a GPU
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


# ------------------------------------------------------------------------------------------------------------- refusals


def test_an_unknown_runtime_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GuardError) as caught:
        open_runner(b"", tmp_path, "abacus")
    assert str(caught.value) == f"runtime 'abacus' is unknown; choose one of {', '.join(runners._RUNNERS)}"


def test_without_onnxruntime_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what an import of a missing module looks like
    with pytest.raises(ExtraMissing) as caught:
        open_runner(proto().SerializeToString(), tmp_path)
    assert str(caught.value) == (
        "onnxruntime is not installed; install vlmguard[cpu], or vlmguard[gpu] for CUDA (not both)"
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


def test_missing_external_data_is_refused(tmp_path: Path) -> None:
    opened("onnxruntime", tmp_path, "bytes and external data")
    (tmp_path / "g.data").unlink()
    with pytest.raises(ModelUnreadable, match="onnxruntime cannot open it"):
        open_runner((tmp_path / "g.onnx").read_bytes(), tmp_path)


def test_a_missing_input_is_the_runtimes_own_error(tmp_path: Path) -> None:
    """Nothing is filled in for a caller who forgets an input: that is what makes `supervise` safe to ship."""
    with pytest.raises(
        RunFailed, match=r"cannot run the graph on these inputs \(Required inputs \(\['x'\]\) are missing"
    ):
        opened("onnxruntime", tmp_path, "path").run({})
