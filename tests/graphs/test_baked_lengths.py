"""A recurrence that was unrolled for the length of its trace is refused; fixed places of fixed axes are not."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from text_layers import STREAM, attention, graph, norm

from vlmguard.graphs.anatomy import dissect, prepare
from vlmguard.graphs.errors import AnatomyNotFound

WEIGHTS = (
    "<float[16, 16] w, float[16, 5] head, float[16] gain, int64 zero = {0}, int64 second = {1}, int64 last = {-1}, "
    "int64[4] pieces = {0, -1, 4, 16}, int64[4] heads = {0, 0, 4, 4}, int64[1] middle = {1}, int64[3] whole = {0, 0, 16}>"
)


def decoder(chunks: str, shape: list[int | str], last: str = "picked") -> ir.Model:
    """Two layers; layer 0 cuts the sequence, or a row, into pieces called `cut`."""
    body = norm("n0", "x") + attention("a0", "n0", "n0") + "s0 = Add(x, a0) " + chunks
    body += f"h0 = Add(s0, {last}) " + norm("n1", "h0") + attention("a1", "n1", "n1") + "h1 = Add(h0, a1) "
    model = graph(body, "h1", STREAM, WEIGHTS)
    prepare(model)  # infers shapes, and a declared one may name the axis otherwise
    for node in model.graph:
        if node.outputs[0].name == "cut":
            node.outputs[0].shape = ir.Shape(shape)
    return model


CHUNKS = "cut = Reshape(s0, pieces) one = Gather <axis = 1> (cut, zero) "
TWO = (
    CHUNKS
    + "two = Gather <axis = 1> (cut, second) both = Add(one, two) mean = ReduceMean <keepdims = 1> (both, middle) "
)
ONE = CHUNKS + "mean = ReduceMean <keepdims = 1> (one, middle) "


@pytest.mark.parametrize(
    ("chunks", "pieces"), [(TWO, "S//4"), (ONE, "S//4"), (ONE, "floor(S/4)")], ids=["two", "one", "floor"]
)
def test_a_fixed_number_of_pieces_is_refused(chunks: str, pieces: str) -> None:
    model = decoder(chunks + "picked = MatMul(mean, w) ", ["B", pieces, 4, 16])
    with pytest.raises(AnatomyNotFound) as raised:
        dissect(model, 2)
    assert str(raised.value) == (
        "the graph picks fixed pieces of 'cut' on axis 1, which is as long as the sequence has pieces: a recurrence was "
        "unrolled for the length of the trace, and other lengths are computed wrongly; export the decoder with the recurrence "
        "as a loop (Scan) or as a LinearAttention operator"
    )


@pytest.mark.parametrize(
    ("chunks", "shape"),
    [
        # heads: an axis of fixed size
        (
            "cut = Reshape(s0, heads) one = Gather <axis = 2> (cut, zero) two = Gather <axis = 2> (cut, second) "
            "both = Concat <axis = -1> (one, two, one, two) picked = MatMul(both, w) ",
            ["B", "S", 4, 4],
        ),
        # layers: an axis of fixed size that shape inference does not know
        (TWO + "picked = MatMul(mean, w) ", ["B", "unk__3", 4, 16]),
        # the first token, and the last
        (
            "cut = Identity(s0) one = Gather <axis = 1> (cut, zero) two = Gather <axis = 1> (cut, last) "
            "both = Add(one, two) picked = Unsqueeze(both, middle) ",
            ["B", "S", 16],
        ),
    ],
    ids=["heads", "a size that is not known", "first and last token"],
)
def test_fixed_places_that_every_length_has_are_not(chunks: str, shape: list[int | str]) -> None:
    assert dissect(decoder(chunks, shape), 2).layer_count == 2
