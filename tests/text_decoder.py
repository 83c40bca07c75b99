"""A text decoder in a few lines of ONNX's own syntax, whose parts can be written otherwise: what the tests of `fold` share.

Two layers, each `softmax attention -> o -> sum -> up -> tanh -> d -> sum`; a table in front, a head behind, no norms.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from hand_graphs import text_model

IDS = np.array([[0, 3, 1, 6], [5, 2, 2, 4]])
EMBED = "e = Gather(table, input_ids)"
ATTENTION = "a{n} = MatMul(m{n}, o{n})"
MLP = "b{n} = MatMul(f{n}, d{n})"
LAYER = """
    k{n} = Transpose <perm = [0, 2, 1]> ({x})
    s{n} = MatMul({x}, k{n})
    p{n} = Softmax <axis = -1> (s{n})
    m{n} = MatMul(p{n}, {x})
    {attention}
    x{n} = Add({x}, a{n})
    u{n} = MatMul(x{n}, up{n})
    f{n} = Tanh(u{n})
    {mlp}
    y{n} = Add(x{n}, b{n})
"""
WEIGHTS = (
    "{t}[8, 16] table, {t}[16, 5] head, {t}[16, 16] o0, {t}[16, 16] o1, {t}[16, 24] up0, {t}[16, 24] up1, "
    "{t}[24, 16] d0, {t}[24, 16] d1"
)


def decoder(
    embed: str = EMBED,
    attention: str = ATTENTION,
    mlp: str = MLP,
    head: str = "logits = MatMul(y1, head)",
    weights: str = "",
    dtype: str = "float32",
    merged: bool = False,
) -> ir.Model:
    """Parts may be written otherwise, and `weights` declares what those need; `merged` puts it into both branches of an If."""
    layers = "".join(
        LAYER.format(n=n, x=x, attention=attention.format(n=n), mlp=mlp.format(n=n)) for n, x in enumerate(("e", "y0"))
    )
    word = {"float32": "float", "float16": "float16"}[dtype]
    declared = ", ".join(filter(None, (WEIGHTS.format(t=word), weights)))
    body = f"{embed}\n{layers}\n{head}"
    if merged:
        branch = f"b () => ({word}[B, S, C] logits) {{ {body} }}"
        body = f"logits = If(use_cache) <then_branch = {branch}, else_branch = {branch}>"
    flag = ", bool use_cache" if merged else ""
    model = text_model(f"g (int64[B, S] input_ids{flag}) => ({word}[B, S, C] logits) <{declared}> {{ {body} }}")
    random = np.random.default_rng(0)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if tensor.dtype in {ir.DataType.FLOAT, ir.DataType.FLOAT16} and tensor.size > 1:
            array = random.normal(size=tensor.shape.numpy()) * tensor.shape.numpy()[0] ** -0.5
            value.const_value = ir.Tensor(array.astype(tensor.dtype.numpy()), name=name)
    return model
