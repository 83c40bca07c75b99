"""Token types made of token ids in a decoder: what the nodes give, what is left when they are taken out, and refusals."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hand_graphs import node_called, text_model

from vlmguard.graphs.errors import GuardError, GuardIncomplete
from vlmguard.graphs.genai_token_types import insert_token_types, take_out_token_types
from vlmguard.graphs.graph_io import graph_bytes
from vlmguard.graphs.proof.strip import strip_guard

IMAGE = 4
TYPES = "agraph (float[b, s, 2] inputs_embeds, int64[b, s] token_type_ids) => (int64[b, s] first, int64[b, s] twice)"
BODY = "{ first = Identity(token_type_ids)\n twice = Add(token_type_ids, token_type_ids) }"


def marked() -> ir.Model:
    return text_model(f"{TYPES} {BODY}")


def test_an_image_token_has_type_one() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = marked()
    insert_token_types(model, IMAGE)
    assert [value.name for value in model.graph.inputs] == ["inputs_embeds", "input_ids"]
    ids = np.array([[IMAGE, 0, 9, IMAGE]])
    session = onnxruntime.InferenceSession(graph_bytes(model))
    first, twice = session.run(None, {"inputs_embeds": np.zeros((1, 4, 2), np.float32), "input_ids": ids})
    assert first.tolist() == [[1, 0, 0, 1]] and twice.tolist() == [[2, 0, 0, 2]]


def test_taken_out_again_it_is_the_graph_as_it_was() -> None:
    model, before = marked(), graph_bytes(marked())
    take_out_token_types(model)
    assert graph_bytes(model) == before  # there is nothing to take out
    insert_token_types(model, IMAGE)
    inserted = graph_bytes(model)
    assert inserted != before
    take_out_token_types(model)
    assert graph_bytes(model) == before
    insert_token_types(model, IMAGE)
    assert graph_bytes(model) == inserted


def test_stripping_a_guard_takes_them_out_first() -> None:
    model = marked()
    insert_token_types(model, IMAGE)
    with pytest.raises(GuardIncomplete, match="carries no guard"):
        strip_guard(model)
    assert graph_bytes(model) == graph_bytes(marked())


def test_nodes_that_no_longer_make_the_types_are_refused() -> None:
    model = marked()
    insert_token_types(model, IMAGE)
    node_called(model, "vlmguard/token_types/types").outputs[0].name = "other"
    with pytest.raises(GuardIncomplete) as refused:
        take_out_token_types(model)
    assert str(refused.value) == "the nodes that make token_type_ids were changed; package the guarded folder again"


def test_a_decoder_that_takes_tokens_already_is_refused() -> None:
    model = text_model(f"{TYPES.replace('float[b, s, 2] inputs_embeds', 'int64[b, s] input_ids')} {BODY}")
    with pytest.raises(GuardError) as refused:
        insert_token_types(model, IMAGE)
    assert str(refused.value) == (
        "the decoder takes input_ids, token_type_ids; token types can be made of input_ids only where they are integers and "
        "input_ids is no input; keep the layout that it has"
    )
