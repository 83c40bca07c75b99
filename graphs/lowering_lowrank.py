"""`lowrank`: read MatMul, a few scalars of gate arithmetic, write MatMul. Every mode; the cheapest on ONNX Runtime.

The gate is Greater + Cast + Mul, never `If` (TensorRT rejects it without static shapes) and never `Where` (one engine
layer more). The matrices have the stream's dtype; the gate's comparison and the weights are float32 even in a float16
graph, because they compare sums of thousands of products with a threshold.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .reference import LayerGuard
from .scribe import Scribe


def guarded(
    scribe: Scribe, h: ir.Value, mode: str, layer: LayerGuard, dtype: str, supervisor: ir.Value | None
) -> tuple[ir.Value, ir.Value | None]:
    """`h' = h + w V`."""
    delta, coordinates = correction(scribe, h, mode, layer, dtype, supervisor)
    return scribe.op("guarded", "Add", [h, delta], like=h), coordinates


def correction(
    scribe: Scribe, h: ir.Value, mode: str, layer: LayerGuard, dtype: str, supervisor: ir.Value | None
) -> tuple[ir.Value, ir.Value | None]:
    """`delta = w V`; a closed gate makes `w`, and so `delta`, exactly zero."""
    rows = layer.ssd if mode != "restore" else np.vstack([layer.ssd, layer.readout[None, :]])
    read = scribe.op("read", "MatMul", [h, scribe.constant("rows", rows.T, dtype)])
    if mode == "project":
        return _write(scribe, h, scribe.op("weights", "Neg", [read]), layer, dtype), None
    if dtype != "float32":
        read = scribe.cast("read_float32", read, "float32")
    if dtype == "float16":
        # A coordinate beyond float16 arrives as infinity, and infinity times a closed gate would be NaN.
        largest = float(np.finfo(np.float16).max)
        bounds = [
            scribe.constant(name, np.array(x), "float32") for name, x in (("lowest", -largest), ("highest", largest))
        ]
        read = scribe.op("read_clipped", "Clip", [read, *bounds])
    weights = _WEIGHTS[mode](scribe, read, layer, supervisor)
    if dtype != "float32":
        weights = scribe.cast("weights_cast", weights, dtype)
    return _write(scribe, h, weights, layer, dtype), read


def _write(scribe: Scribe, h: ir.Value, weights: ir.Value, layer: LayerGuard, dtype: str) -> ir.Value:
    return scribe.op("delta", "MatMul", [weights, scribe.constant("ssd", layer.ssd, dtype)], like=h)


def _steer(scribe: Scribe, c: ir.Value, layer: LayerGuard, supervisor: ir.Value | None) -> ir.Value:
    """`alpha g c`"""
    gate = _gate(scribe, _columns(scribe, "first", c, 0, 1) if layer.rank > 1 else c, layer)
    strength = scribe.op("strength", "Mul", [gate, scribe.constant("alpha", np.array(layer.alpha), "float32")])
    return scribe.op("weights", "Mul", [strength, c])


def _supervise(scribe: Scribe, c: ir.Value, layer: LayerGuard, supervisor: ir.Value | None) -> ir.Value:
    """`g(a) (alpha (a - o) - (c - o))`"""
    assert supervisor is not None
    gate = _gate(scribe, _columns(scribe, "first", supervisor, 0, 1) if layer.rank > 1 else supervisor, layer)
    origin = scribe.constant("origin", layer.origin, "float32")
    wanted = scribe.op("supervisor_centred", "Sub", [supervisor, origin])
    wanted = scribe.op("wanted", "Mul", [wanted, scribe.constant("alpha", np.array(layer.alpha), "float32")])
    present = scribe.op("present", "Sub", [c, origin])
    return scribe.op("weights", "Mul", [gate, scribe.op("difference", "Sub", [wanted, present])])


def _restore(scribe: Scribe, read: ir.Value, layer: LayerGuard, supervisor: ir.Value | None) -> ir.Value:
    """`g(s) (t - c)`"""
    c = _columns(scribe, "coordinates", read, 0, layer.rank)
    score = _columns(scribe, "score", read, layer.rank, layer.rank + 1)
    difference = scribe.op("difference", "Sub", [scribe.constant("target", layer.target, "float32"), c])
    return scribe.op("weights", "Mul", [_gate(scribe, score, layer), difference])


_WEIGHTS = {"steer": _steer, "supervise": _supervise, "restore": _restore}


def _gate(scribe: Scribe, score: ir.Value, layer: LayerGuard) -> ir.Value:
    """1 where the score is above the threshold, else 0; float32 `[..., 1]`."""
    threshold = scribe.constant("tau", np.array(layer.threshold), "float32")
    return scribe.cast("gate", scribe.op("opens", "Greater", [score, threshold]), "float32")


def _columns(scribe: Scribe, name: str, value: ir.Value, start: int, stop: int) -> ir.Value:
    """`value[..., start:stop]`"""
    return scribe.op(name, "Slice", [value, scribe.integers(start), scribe.integers(stop), scribe.integers(-1)])
