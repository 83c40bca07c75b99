"""The table of element types: what ONNX Runtime and ONNX themselves say."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from vlmguard.graphs.dtypes import IR_DTYPES, NUMPY_DTYPES, ORT_DTYPES, PORT_DTYPES, STREAM_DTYPES


@pytest.mark.parametrize("kind", PORT_DTYPES, ids=lambda kind: kind.name)
def test_onnxruntime_gives_an_input_this_type(kind: ir.DataType) -> None:
    port = onnx.helper.make_tensor_value_info("x", int(kind), [1])
    out = onnx.helper.make_tensor_value_info("y", int(kind), [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [port], [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert ORT_DTYPES[given.type] == PORT_DTYPES[kind] == onnx.helper.tensor_dtype_to_np_dtype(int(kind))


def test_streams_have_the_names_of_numpy() -> None:
    assert {"float32", "float16", "bfloat16"} == IR_DTYPES.keys() == NUMPY_DTYPES.keys()
    for name, dtype in NUMPY_DTYPES.items():
        assert dtype == np.dtype(getattr(ml_dtypes if name == "bfloat16" else np, name))
        assert STREAM_DTYPES[IR_DTYPES[name]] == name and PORT_DTYPES[IR_DTYPES[name]] == dtype
