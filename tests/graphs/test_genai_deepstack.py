"""Features of several layers side by side: what the nodes give, what is left when they are taken out, and refusals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hand_graphs import node_called, text_model

from vlmguard.graphs.errors import GuardError, GuardIncomplete
from vlmguard.graphs.genai_deepstack import join_features, split_embeds, take_apart_features, take_out_split
from vlmguard.graphs.genai_embedding import FEATURES, insert_image_features, take_out_image_features
from vlmguard.graphs.graph_io import graph_bytes
from vlmguard.graphs.proof.strip import strip_guard
from vlmguard.runtime.images.deepstack import side_by_side

ROWS = ("deepstack_embeds_0", "deepstack_embeds_1")
DECODER = (
    "agraph (float[b, s, 2] inputs_embeds, float[b, s, 2] deepstack_embeds_0, int64[b, s] mask, "
    "float[b, s, 2] deepstack_embeds_1) => (float[b, s, 2] first, float[b, s, 2] second, float[b, s, 2] third) "
    "{ first = Neg(inputs_embeds)\n second = Neg(deepstack_embeds_0)\n third = Neg(deepstack_embeds_1) }"
)
VISION = (
    "agraph (float[n, 2] pixels) => (float[t, 2] image_features, float[t, 2] deepstack_features_0, "
    "float[t, 2] deepstack_features_1) { image_features = Neg(pixels)\n deepstack_features_0 = Identity(pixels)\n "
    "deepstack_features_1 = Abs(pixels) }"
)
EMBEDDING = "agraph (int64[b, s] input_ids) => (float[b, s, 2] inputs_embeds) <float[3, 2] table = {1, 2, 3, 4, 5, 6}> "
EMBEDDING += "{ inputs_embeds = Gather(table, input_ids) }"


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(graph_bytes(model)).run(None, feeds)


def fitted() -> ir.Model:
    model = text_model(DECODER)
    split_embeds(model, ROWS)
    return model


def test_a_wide_row_is_the_embedding_and_the_features_of_each_layer() -> None:
    model = fitted()
    assert [value.name for value in model.graph.inputs] == ["inputs_embeds", "mask"]
    wide = np.arange(6, dtype=np.float32).reshape(1, 1, 6)
    parts = run(model, inputs_embeds=wide, mask=np.ones((1, 1), np.int64))
    assert [part.ravel().tolist() for part in parts] == [[-0.0, -1.0], [-2.0, -3.0], [-4.0, -5.0]]


def test_the_vision_encoder_gives_wide_rows() -> None:
    model = text_model(VISION)
    join_features(model)
    (output,) = model.graph.outputs
    assert output.name == FEATURES and output.shape is not None and output.shape[-1] == 6
    (rows,) = run(model, pixels=np.array([[-1, 2]], np.float32))
    assert rows.tolist() == [[1, -2, -1, 2, 1, 2]]


def test_zeros_follow_the_embedding_of_a_word_and_a_picture_has_its_wide_row() -> None:
    features = ir.Value(name=FEATURES, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["t", 6]))
    model, before = text_model(EMBEDDING), graph_bytes(text_model(EMBEDDING))
    insert_image_features(model, 1, features, layers=3)
    row = np.array([[1, -2, -1, 2, 1, 2]], np.float32)
    (embeds,) = run(model, input_ids=np.array([[0, 1, 2]]), image_features=row)
    assert embeds.tolist() == [[[1, 2, 0, 0, 0, 0], row[0].tolist(), [5, 6, 0, 0, 0, 0]]]
    (embeds,) = run(model, input_ids=np.array([[1]]), image_features=row[:0])
    assert embeds.tolist() == [[[3, 4, 0, 0, 0, 0]]]
    take_out_image_features(model)
    assert graph_bytes(model) == before


@pytest.mark.parametrize(
    ("text", "insert", "take_out"),
    [
        (DECODER, lambda model: split_embeds(model, ROWS), take_out_split),
        (VISION, join_features, take_apart_features),
    ],
    ids=["decoder", "vision encoder"],
)
def test_taken_out_again_it_is_the_graph_as_it_was(
    text: str, insert: Callable[[ir.Model], None], take_out: Callable[[ir.Model], None]
) -> None:
    model, before = text_model(text), graph_bytes(text_model(text))
    take_out(model)
    assert graph_bytes(model) == before  # there is nothing to take out
    insert(model)
    inserted = graph_bytes(model)
    assert inserted != before
    take_out(model)
    assert graph_bytes(model) == before
    insert(model)
    assert graph_bytes(model) == inserted


def test_stripping_a_guard_takes_the_split_out_first() -> None:
    model = fitted()
    with pytest.raises(GuardIncomplete, match="carries no guard"):
        strip_guard(model)
    assert graph_bytes(model) == graph_bytes(text_model(DECODER))


def _renamed_part(model: ir.Model) -> None:
    node_called(model, "vlmguard/deepstack/split").outputs[1].name = "other"


def _another_source(model: ir.Model) -> None:
    node_called(model, "vlmguard/deepstack/split").replace_input_with(0, model.graph.inputs[1])


def _no_places(model: ir.Model) -> None:
    model.metadata_props.pop("vlmguard.deepstack")


@pytest.mark.parametrize("change", [_renamed_part, _another_source, _no_places])
def test_a_split_that_was_changed_is_refused(change: Callable[[ir.Model], None]) -> None:
    model = fitted()
    change(model)
    with pytest.raises(GuardIncomplete) as refused:
        take_out_split(model)
    assert str(refused.value) == "the node that splits inputs_embeds was changed; package the guarded folder again"


def test_another_node_of_that_name_is_refused() -> None:
    model = fitted()
    node_called(model, "vlmguard/deepstack/split").op_type = "Neg"
    with pytest.raises(GuardIncomplete) as refused:
        take_out_split(model)
    assert str(refused.value) == (
        "the node that has features side by side was changed; package the guarded folder again"
    )


def test_features_that_are_joined_and_not_given_are_refused() -> None:
    model = text_model(VISION)
    join_features(model)
    model.graph.outputs.append(node_called(model, "vlmguard/deepstack/joined").inputs[1])
    with pytest.raises(GuardIncomplete) as refused:
        take_apart_features(model)
    assert str(refused.value) == "the node that joins the features was changed; package the guarded folder again"


@pytest.mark.parametrize("other", ["float[b, s, 4]", "float[b, s, w]", "float16[b, s, 2]", "float[b, 2]"])
def test_rows_of_another_width_or_type_are_refused(other: str) -> None:
    model = text_model(DECODER.replace("float[b, s, 2] deepstack_embeds_1", f"{other} deepstack_embeds_1"))
    before = graph_bytes(model)
    with pytest.raises(GuardError) as refused:
        split_embeds(model, ROWS)
    assert str(refused.value) == (
        "the decoder's inputs inputs_embeds, deepstack_embeds_0, deepstack_embeds_1 are no rows of one width and type, which "
        "lie side by side for onnxruntime-genai; keep the layout that it has"
    )
    assert graph_bytes(model) == before


def test_rows_lie_side_by_side_as_the_split_takes_them_apart() -> None:
    """In a call of the runtime here: a picture's rows, and zeros for a text or a layer that has none."""
    embeds, row = np.ones((1, 2, 2), np.float32), np.full((1, 2, 2), 3, np.float32)
    assert side_by_side(embeds, [row, None], 6)[0, 0].tolist() == [1, 1, 3, 3, 0, 0]
    assert side_by_side(embeds, [], 6)[0, 1].tolist() == [1, 1, 0, 0, 0, 0]
    assert side_by_side(embeds, [row, row], 2) is embeds
