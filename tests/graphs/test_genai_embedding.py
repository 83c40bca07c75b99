"""The embedding graph of genai's picture pipelines: rows of features at image tokens, and the graph before them again."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hand_graphs import text_model
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.genai_embedding import FEATURES, insert_image_features, take_out_image_features
from vlmguard.graphs.graph_io import graph_bytes
from vlmguard.graphs.proof.structure import same_graph

WIDTH, VOCABULARY, IMAGE = 3, 7, 5
TABLE = f"""g (int64[batch, sequence] input_ids) => (float[batch, sequence, {WIDTH}] inputs_embeds)
<float[{VOCABULARY}, {WIDTH}] table> {{ inputs_embeds = Gather (table, input_ids) }}"""


def rows_of(dtype: ir.DataType, *shape: str | int) -> ir.Value:
    return ir.Value(name="features", type=ir.TensorType(dtype), shape=ir.Shape(shape))


def run(model: ir.Model, ids: list[list[int]], features: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph_bytes(model), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"input_ids": np.array(ids, np.int64), FEATURES: features})[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [("rows", WIDTH), ("images", 2, WIDTH)])
def test_rows_replace_image_tokens_in_reading_order(dtype: type, shape: tuple[str | int, ...]) -> None:
    model = text_model(TABLE)
    plain = run_plain(ids := [[1, IMAGE, IMAGE, 2], [IMAGE, 3, IMAGE, 0]])
    insert_image_features(model, IMAGE, rows_of(ir.DataType.from_numpy(np.dtype(dtype)), *shape))
    features = np.arange(4 * WIDTH).reshape(4, WIDTH).astype(dtype)
    expected = plain.copy()
    expected[np.array(ids) == IMAGE] = features
    given = features if len(shape) == 2 else features.reshape(2, 2, WIDTH)
    np.testing.assert_array_equal(run(model, ids, given), expected)
    nothing = features[:0]  # of rank 2, whatever the vision encoder's
    np.testing.assert_array_equal(run(model, ids, nothing), plain)  # an image token in an answer
    np.testing.assert_array_equal(run(model, [[IMAGE]], nothing), run_plain([[IMAGE]]))


def run_plain(ids: list[list[int]]) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph_bytes(text_model(TABLE)), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"input_ids": np.array(ids, np.int64)})[0])


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_rows_stops_the_runtime(count: int) -> None:
    model = text_model(TABLE)
    insert_image_features(model, IMAGE, rows_of(ir.DataType.FLOAT, "rows", WIDTH))
    with pytest.raises((Fail, InvalidArgument, RuntimeException)):
        run(model, [[IMAGE, 1, IMAGE]], np.ones((count, WIDTH), np.float32))


def test_without_them_it_is_the_graph_before() -> None:
    before, model = text_model(TABLE), text_model(TABLE)
    insert_image_features(model, IMAGE, rows_of(ir.DataType.FLOAT, "rows", WIDTH))
    assert not same_graph("", before, model).ok
    written = graph_bytes(model)
    take_out_image_features(model)
    check = same_graph("", before, model)
    assert check.ok, check
    insert_image_features(model, IMAGE, rows_of(ir.DataType.FLOAT, "rows", WIDTH))
    assert graph_bytes(model) == written


def test_a_graph_of_another_kind_is_refused() -> None:
    model = text_model(TABLE.replace("input_ids", "ids"))
    with pytest.raises(GuardError, match="takes ids and gives 1 outputs; image features can be inserted only where"):
        insert_image_features(model, IMAGE, rows_of(ir.DataType.FLOAT, "rows", WIDTH))
