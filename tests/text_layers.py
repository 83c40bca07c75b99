"""Parts of decoder layers in ONNX's textual syntax, and decoders made of them: what tests of odd anatomies share."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from hand_graphs import text_model

WIDTH = 16
WEIGHTS = "<float[16, 16] w, float[16, 5] head, float[16] gain, float scale = {0.5}, int64[3] three = {2, -1, 16}>"
STREAM = "float[B, S, 16] x"
ENCODER = "float[B, E, 16] encoder_hidden_states"


def attention(to: str, queries: str, values: str) -> str:
    return (
        f"{to}_turned = Transpose <perm = [0, 2, 1]> ({values}) {to}_scores = MatMul({queries}, {to}_turned) "
        f"{to}_shares = Softmax({to}_scores) {to} = MatMul({to}_shares, {values}) "
    )


def norm(to: str, of: str) -> str:
    return f"{to} = LayerNormalization <axis = -1> ({of}, gain) "


def spelled_norm(to: str, of: str) -> str:
    return (
        f"{to}_mean = ReduceMean <keepdims = 1> ({of}) {to}_off = Sub({of}, {to}_mean) {to}_sq = Mul({to}_off, {to}_off) "
        f"{to}_var = ReduceMean <keepdims = 1> ({to}_sq) {to}_root = Sqrt({to}_var) {to}_unit = Div({to}_off, {to}_root) "
        f"{to} = Mul({to}_unit, gain) "
    )


def mlp(to: str, of: str) -> str:
    return f"{to} = MatMul({of}, w) "


def graph(body: str, last: str, inputs: str = f"{STREAM}, {ENCODER}", weights: str = WEIGHTS) -> ir.Model:
    model = text_model(f"g ({inputs}) => (float[B, S, 5] logits) {weights} {{ {body} logits = MatMul({last}, head) }}")
    random = np.random.default_rng(0)
    for name in sorted({"w", "head", "gain"} & set(model.graph.initializers)):  # declared without numbers
        weight = model.graph.initializers[name]
        shape = weight.const_value.shape.numpy()  # type: ignore[union-attr]
        around = 1.0 if name == "gain" else 0.0
        weight.const_value = ir.Tensor(random.normal(around, 0.3, shape).astype(np.float32), name=name)
    return model
