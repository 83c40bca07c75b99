"""What is kept of a third-party error: the part that decides. Messages are provoked where the library is at hand."""

from __future__ import annotations

import io
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto
from onnx import helper as make
from onnx_ir.passes.common import InlinePass
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save as safetensors_bytes
from tokenizers import Tokenizer

from vlmguard.graphs.errors import first_line
from vlmguard.graphs.reasons import LONGEST, reason_of

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


def said(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """What is kept of the error that a call raises."""
    try:
        call(*arguments, **options)
    except Exception as error:
        assert first_line(error) == reason_of(error) and "\n" not in reason_of(error)
        return reason_of(error)
    raise AssertionError("nothing was raised")


def value(name: str, shape: list[Any] | None, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return make.make_tensor_value_info(name, dtype, shape)


def graph(nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], opset: int = 18, **more: Any) -> bytes:
    domains = [make.make_opsetid("", opset), *(make.make_opsetid(name, 1) for name in more.get("domains", ()))]
    made = make.make_graph(nodes, "g", inputs, [value("z", more.get("shape"))], more.get("weights", []))
    return make.make_model(made, opset_imports=domains, ir_version=more.get("ir", 10)).SerializeToString()


def node(op: str, *inputs: str, name: str = "/model/layers.0/n", domain: str = "") -> onnx.NodeProto:
    return make.make_node(op, list(inputs), ["z"], name=name, domain=domain)


def session(content: bytes, folder: Path | None = None) -> Any:
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    if folder is None:
        return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (folder / "a model.onnx").write_bytes(content)
    return runtime.InferenceSession(str(folder / "a model.onnx"), options, providers=["CPUExecutionProvider"])


X, Y = value("x", ["a", "b"]), value("y", ["c", "d"])

# ------------------------------------------------------------------------------------------------- onnxruntime, opening


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (
            graph([node("AttentionPlugin", "x", domain="trt")], [X], domains=["trt"]),
            "operator trt::AttentionPlugin is unknown",
        ),
        (
            graph([node("NoSuch", "x", domain="com.microsoft")], [X], domains=["com.microsoft"]),
            "operator com.microsoft::NoSuch is unknown",
        ),
        (
            graph([node("AttentionPlugin", "x")], [X]),
            "operator AttentionPlugin of node '/model/layers.0/n' is unknown in opset 18",
        ),
        (
            graph([node("AttentionPlugin", "x", domain="trt")], [X]),
            "operator trt::AttentionPlugin of node '/model/layers.0/n': No opset import for domain 'trt'",
        ),
        (
            graph([node("MatMul", "x", "y")], [value("x", [2, 3]), value("y", [4, 5])]),
            "MatMul node '/model/layers.0/n': Incompatible dimensions for matrix multiplication",
        ),
        (
            graph([node("Add", "x", "y", name="n1")], [X, value("y", ["a", "b"], INT)]),
            "Type Error: Type parameter (T) of Optype (Add) bound to different types (tensor(float) and tensor(int64) in node "
            "(n1)",
        ),
        (
            graph([node("Add", "x", "nowhere")], [X]),
            "Invalid model. Node input 'nowhere' is not a graph input, initializer, or output of a previous node",
        ),
        (graph([node("Relu", "x")], [X], ir=99), "Unsupported model IR version: 99, max supported IR version: "),
        (graph([node("Relu", "x")], [X], opset=99), "opset 99 of ai.onnx is newer than the newest that it reads, "),
        (b"hello world" * 9, "rotobuf parsing failed"),
        (graph([node("Relu", "x")], [X])[:-7], "rotobuf parsing failed"),
    ],
)
@pytest.mark.parametrize("from_file", [True, False])
def test_a_graph_that_onnxruntime_cannot_open(content: bytes, kept: str, from_file: bool, tmp_path: Path) -> None:
    found = said(session, content, tmp_path if from_file else None)
    assert kept in found and str(tmp_path) not in found and "onnxruntime_src" not in found
    if kept[0] != "r" and not kept.endswith((" ", ",")):
        assert found == kept


def stored_outside(length: int, at: str = "w.data", offset: int = 0) -> bytes:
    tensor = onnx.TensorProto(name="w", data_type=FLOAT, dims=[4, 3], data_location=onnx.TensorProto.EXTERNAL)
    for key, text in (("location", at), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=text)
    return graph([node("MatMul", "x", "w")], [X], weights=[tensor])


def test_external_data_that_onnxruntime_cannot_read(tmp_path: Path) -> None:
    assert said(session, stored_outside(48), tmp_path).endswith(
        f'External data path does not exist: "{tmp_path}/w.data"'
    )
    (tmp_path / "w.data").write_bytes(b"\0" * 20)
    assert said(session, stored_outside(48), tmp_path) == (
        "Deserialize tensor w failed. External initializer: w offset: 0 size to read: 48 given file_length: 20 are out of "
        "bounds or can not be read in full"
    )
    assert said(session, stored_outside(40), tmp_path) == (
        "Deserialize tensor w failed. TensorProto: w external data size mismatch. Computed size: 48, external_data.length: 40"
    )


# ------------------------------------------------------------------------------------------------- onnxruntime, running


def run(content: bytes, **feeds: Any) -> str:
    return said(session(content).run, None, {name: np.asarray(array) for name, array in feeds.items()})


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_a_call_that_onnxruntime_cannot_run() -> None:
    fixed = graph([node("MatMul", "x", "y")], [value("x", ["a", 3]), value("y", [3, 7])])
    assert run(fixed, x=zeros(2, 4), y=zeros(3, 7)) == "input x has the wrong size: axis 1 is 4, not 3"
    assert (
        run(fixed, x=zeros(2, 3), y=zeros(4, 5)) == "input y has the wrong size: axis 0 is 4, not 3, axis 1 is 5, not 7"
    )
    assert run(fixed, x=zeros(2, 3)) == "Required inputs (['y']) are missing from input feed (['x'])"
    assert run(fixed, x=zeros(2, 3), y=zeros(3, 7), q=zeros(1)) == "Invalid input name: q"
    wrong = run(fixed, x=zeros(2, 3).astype(np.int64), y=zeros(3, 7))
    assert wrong == "Unexpected input data type. Actual: (tensor(int64)) , expected: (tensor(float))"


def test_the_status_message_of_a_node_is_kept_with_its_name() -> None:
    product = graph([node("MatMul", "x", "y")], [X, Y])
    assert run(product, x=zeros(2, 3), y=zeros(4, 5)) == ("MatMul node '/model/layers.0/n': MatMul dimension mismatch")
    lookup = graph([node("Gather", "x", "y", name="/embed/Gather")], [X, value("y", ["n"], INT)])
    assert run(lookup, x=zeros(4, 3), y=np.array([9])) == (
        "Gather node '/embed/Gather': indices element out of data bounds, idx=9 must be within the inclusive range [-4,3]"
    )
    long = "/model/layers.0/attention/self/a_name_of_a_module_that_is_as_long_as_names_of_modules_are_in_real_exports/Reshape_1"
    reshape = graph([node("Reshape", "x", "y", name=long)], [X, value("y", ["n"], INT)])
    assert run(reshape, x=zeros(4, 3), y=np.array([5, 2])) == (
        f"Reshape node '{long}': input_shape_size == requested_shape_size was false. The input tensor cannot be reshaped to "
        "the requested shape. Input shape:{4,3}, requested shape:{5,2}"
    )
    huge = graph([node("ConstantOfShape", "y", name="big")], [value("y", ["n"], INT)])
    assert run(huge, y=np.array([1 << 45])) == (
        "ConstantOfShape node 'big': Failed to allocate memory for requested buffer of size 140737488355328"
    )


# Messages of other versions and of operators that need a whole model: as users reported them.
REPORTED = {
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running GroupQueryAttention node. "
    "Name:'/model/layers.0/attn/GroupQueryAttention' Status Message: /onnxruntime_src/onnxruntime/contrib_ops/cpu/bert/"
    "group_query_attention.cc:154 onnxruntime::common::Status onnxruntime::contrib::GroupQueryAttention<T>::Compute("
    "onnxruntime::OpKernelContext*) const [with T = float] KV cache capacity (5) must be at least the window (8)\n": (
        "GroupQueryAttention node '/model/layers.0/attn/GroupQueryAttention': KV cache capacity (5) must be at least the "
        "window (8)"
    ),
    "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for Erf(13) node with name 'e'": (
        "Could not find an implementation for Erf(13) node with name 'e'"
    ),
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc": "std::bad_alloc",
    "Error in \x1b[31mred\x1b[0m\nand a second line\n\nand a page of advice": "Error in red and a second line",
    "Failed to export the model with torch.export. \x1b[96mThis is step 1/3\x1b[0m of exporting the model to ONNX. Next "
    "steps:\n- Modify the model code for `torch.export.export` to succeed.\n- Debug `torch.export.export`.\n\n"
    "## Exception summary\n\n<class 'torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode'>: Could not guard on "
    "data-dependent expression Eq(u0, 1) (unhinted: Eq(u0, 1)).  (Size-like symbols: none)\n\nconsider using data-dependent "
    "friendly APIs such as guard_or_false.\nCaused by: (_export/non_strict_utils.py:1205 in __torch_function__)\n": (
        "GuardOnDataDependentSymNode: Could not guard on data-dependent expression Eq(u0, 1) (unhinted: Eq(u0, 1)). "
        "(Size-like symbols: none)"
    ),
    "The checkpoint you are trying to load has model type `nope` but Transformers does not recognize this architecture. This "
    "could be because of an issue with the checkpoint, or because your version of Transformers is out of date.\n\n"
    "You can update Transformers with the command `pip install --upgrade transformers`.": (
        "The checkpoint you are trying to load has model type `nope` but Transformers does not recognize this architecture. "
        "This could be because of an issue with the checkpoint, or because your version of Transformers is out of date"
    ),
    "Couldn't instantiate the backend tokenizer from one of: \n(1) a `tokenizers` library serialization file, \n(2) a slow "
    "tokenizer instance to convert.": (
        "Couldn't instantiate the backend tokenizer from one of: (1) a `tokenizers` library serialization file, (2) a slow "
        "tokenizer instance to convert"
    ),
}


@pytest.mark.parametrize("message", list(REPORTED))
def test_reported_messages(message: str) -> None:
    assert reason_of(RuntimeError(message)) == REPORTED[message]


# ------------------------------------------------------------------------------------------------------ other libraries


def test_onnx() -> None:
    unknown = onnx.ModelProto.FromString(graph([node("Nope", "x", name="n0")], [X], shape=["a"]))
    assert said(onnx.checker.check_model, unknown) == "operator Nope of node 'n0' is unknown in opset 18"
    dangling = onnx.ModelProto.FromString(graph([node("Add", "x", "q", name="n0")], [X], shape=["a"]))
    assert said(onnx.checker.check_model, dangling).startswith(
        "Nodes in a graph must be topologically sorted, however input 'q' of node: name: n0 OpType: Add is not output"
    )
    apart = onnx.ModelProto.FromString(graph([node("MatMul", "x", "y")], [value("x", [2, 3]), value("y", [4, 5])]))
    assert said(onnx.shape_inference.infer_shapes, apart, strict_mode=True) == (
        "MatMul node '/model/layers.0/n': Incompatible dimensions for matrix multiplication"
    )
    assert said(onnx.ModelProto.FromString, b"hello" * 9).startswith("Error parsing message")


def test_onnx_ir_names_the_reason_behind_its_own_call() -> None:
    wrong = onnx.ModelProto.FromString(graph([node("Relu", "x")], [X]))
    wrong.graph.initializer.add(name="w", data_type=99, dims=[2])
    assert said(ir.from_proto, wrong) == "99 is not a valid DataType"
    calls = [make.make_node("F", ["x"], ["y"], domain="l")]
    function = make.make_function("l", "F", ["x"], ["y"], calls, [make.make_opsetid("", 18), make.make_opsetid("l", 1)])
    cyclic = onnx.ModelProto.FromString(graph([node("F", "x", domain="l")], [X], domains=["l"]))
    cyclic.functions.append(function)
    found = said(InlinePass(), ir.from_proto(cyclic))
    assert found == "Cyclic dependency detected between functions: l::F -> l::F"


def test_a_template_is_named_with_its_line() -> None:
    environment = jinja2.Environment()
    assert said(environment.from_string, "{% for a in b %}\n{{ a }") == "unexpected '}', line 2"
    assert said(environment.from_string, "{{ x | nosuch }}") == "No filter named 'nosuch', line 1"
    assert said(environment.from_string("{{ x.y.z }}").render) == "'x' is undefined"


def test_files_of_other_formats(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def tokenizer(text: str) -> str:
        path.write_text(text)
        return said(Tokenizer.from_file, str(path))

    def tensors(content: bytes) -> str:
        path.write_bytes(content)
        return said(lambda: safe_open(str(path), framework="numpy").__enter__())

    assert tokenizer("hello") == "expected value at line 1 column 1"
    assert tokenizer('{"version":"1.0","model":{"type":"Foo"}}').startswith(
        "data did not match any variant of untagged"
    )
    assert tensors(safetensors_bytes({"a": zeros(4, 4)})[:-8]).endswith("incomplete metadata, file not fully covered")
    assert said(tomllib.loads, "a = [1,\nb = 2") == "Invalid value (at line 2, column 1)"
    assert said(Image.open, io.BytesIO(b"hello")) == "it is in no known image format"
    assert said(np.load, io.BytesIO(b"hello"), allow_pickle=False).startswith(
        "This file contains pickled (object) data"
    )


# ------------------------------------------------------------------------------------------------------------- any error


def test_an_error_without_words_is_named() -> None:
    assert reason_of(ValueError()) == "ValueError" and reason_of(ValueError(" \n ")) == "ValueError"
    assert reason_of(KeyError("vocab")) == "'vocab' is missing" and reason_of(KeyError()) == "a key is missing"


def test_both_ends_of_an_endless_message_are_kept() -> None:
    found = reason_of(RuntimeError("first " + "x" * 100_000 + " last"))
    assert found.startswith("first ") and found.endswith(" last") and len(found) <= LONGEST + 5
    node_name = "n" * 100_000
    found = reason_of(
        RuntimeError(
            f"[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Add node. Name:'{node_name}' "
            "Status Message: a.cc:1 Compute the reason"
        )
    )
    assert found.endswith("the reason") and len(found) <= LONGEST + 5
