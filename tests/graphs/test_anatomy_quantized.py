"""The residual stream in what quantizers and converters write: rounded softmaxes, int8 sums, nodes out of order, states."""

from __future__ import annotations

import re

import onnx_ir as ir
import pytest
from hand_graphs import text_model

from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.dataflow import is_sorted
from vlmguard.graphs.errors import AnatomyNotFound

SCALES = "float s = {0.1}, uint8 z = {128}"


def layers(layer: str, first: str = "x", scales: str = SCALES, inputs: str = "float[B, S, 8] x") -> ir.Model:
    """Two layers; in `layer`, `H` is the stream so far and `#` the layer's number. A layer's output is `h#`."""
    body = "".join(layer.replace("H", f"h{n - 1}" if n else first).replace("#", str(n)) for n in range(2))
    return text_model(f"g ({inputs}) => (float[B, S, 8] y) <float[8, 8] w, {scales}> {{ {body} y = Identity(h1) }}")


PLAIN = """
    t# = Transpose <perm = [0, 2, 1]> (H) c# = MatMul(H, t#) p# = Softmax <axis = -1> (c#) a# = MatMul(p#, H)
    m# = Add(H, a#) d# = MatMul(m#, w) h# = Add(m#, d#)
"""
ROUNDED = """
    t# = Transpose <perm = [0, 2, 1]> (H) c# = MatMul(H, t#) p# = Softmax <axis = -1> (c#)
    pq# = QuantizeLinear(p#, s, z) pd# = DequantizeLinear(pq#, s, z) a# = MatMul(pd#, H)
    m# = Add(H, a#) mq# = QuantizeLinear(m#, s, z) md# = DequantizeLinear(mq#, s, z)
    d# = MatMul(md#, w) h# = Add(md#, d#)
"""
INT8 = """
    t# = Transpose <perm = [0, 2, 1]> (H) c# = QLinearMatMul(H, s, z, t#, s, z, s, z)
    p# = com.microsoft.QLinearSoftmax <axis = -1, opset = 13> (c#, s, z, s, z)
    a# = QLinearMatMul(p#, s, z, H, s, z, s, z)
    m# = com.microsoft.QLinearAdd(H, s, z, a#, s, z, s, z)
    d# = QLinearMatMul(m#, s, z, wq, s, z, s, z)
    h# = com.microsoft.QLinearAdd(m#, s, z, d#, s, z, s, z)
"""


def test_a_stream_that_is_rounded_between_layers_has_float_sums() -> None:
    anatomy = dissect(layers(ROUNDED), 2)
    assert [(site.value, site.residual, site.dtype) for site in anatomy.sites] == [
        ("h0", "md0", "float32"),
        ("h1", "md1", "float32"),
    ]


def test_a_rounded_softmax_that_meets_constants_alone_is_no_attention() -> None:
    """A router's, say: only a product of two dynamic operands mixes positions."""
    router = "p# = Softmax <axis = -1> (H) q# = QuantizeLinear(p#, s, z) d# = DequantizeLinear(q#, s, z) "
    with pytest.raises(AnatomyNotFound, match="no attention found"):
        dissect(layers(router + "a# = MatMul(d#, w) h# = Add(H, a#)"))


def test_a_stream_without_float_sums_is_refused() -> None:
    body = "".join(INT8.replace("H", f"h{n - 1}" if n else "xq").replace("#", str(n)) for n in range(2))
    model = text_model(
        f"""g (float[B, S, 8] x) => (float[B, S, 8] y) <uint8[8, 8] wq, {SCALES}>
        {{ xq = QuantizeLinear(x, s, z) {body} y = DequantizeLinear(h1, s, z) }}"""
    )
    refusal = (
        "layer 0: the residual sum 'h0' is computed and kept in int8 (QLinearAdd), so there is no float sum to guard; "
        "quantize with QuantFormat.QDQ, or leave Add out of the operators to quantize"
    )
    with pytest.raises(AnatomyNotFound, match=f"^{re.escape(refusal)}$"):
        dissect(model, 2)


def test_nodes_out_of_order_are_sorted() -> None:
    """onnxruntime's float16 converter appends casts behind their readers; its runtime loads such a file."""
    model, expected = layers(PLAIN), dissect(layers(PLAIN), 2)
    nodes = list(model.graph)
    model.graph.remove(nodes[0])
    model.graph.append(nodes[0])
    assert not is_sorted(model.graph)
    assert dissect(model, 2) == expected
    assert is_sorted(model.graph)


def test_nodes_in_order_stay_where_they_are() -> None:
    model = layers(PLAIN)
    before = [node.outputs[0].name for node in model.graph]
    dissect(model)
    assert [node.outputs[0].name for node in model.graph] == before


def test_the_state_of_a_convolution_is_not_where_the_stream_enters() -> None:
    """It is a rank-3 input, stands first, and reaches every layer: by the branch of layer 0, not by its residual."""
    with_state = """
        k# = Concat <axis = 1> (past, H) c# = MatMul(k#, w) e# = Conv(c#, kernel) i# = Slice(e#, from, to, axis)
        m# = Add(H, i#) d# = MatMul(m#, w) h# = Add(m#, d#)
    """
    inputs = "float[B, 3, 8] past, int64[B, S] ids"
    weights = "float[9, 8] table, float[8, 8, 1] kernel, int64[1] from = {0}, int64[1] to = {5}, int64[1] axis = {1}"
    first = with_state.replace("H", "x").replace("#", "0")
    second = PLAIN.replace("H", "h0").replace("#", "1")
    model = text_model(
        f"""g ({inputs}) => (float[B, S, 8] y) <float[8, 8] w, {weights}>
        {{ x = Gather(table, ids) {first} {second} y = Identity(h1) }}"""
    )
    anatomy = dissect(model, 2)
    assert (anatomy.source, anatomy.width) == ("x", 8)
    assert [(site.value, site.residual) for site in anatomy.sites] == [("h0", "m0"), ("h1", "m1")]
