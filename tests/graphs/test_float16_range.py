"""Massive activations in a float16 graph: nothing overflows, and the result is still the reference's.

Real models have single channels beyond 3e4 at some tokens, and float16 ends at 65504. Run in ONNX's own evaluator, which
keeps float16 between nodes as engines on a GPU do; ONNX Runtime's CPU provider computes most of it in float32.
"""

from __future__ import annotations

import numpy as np
import onnx.reference
import onnx_ir as ir
import pytest
from hand_graphs import WIDTH, directions, guard_model, orthonormal, possible, run, supervisor_input, text_model
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmguard.graphs import reference
from vlmguard.graphs.dtypes import NUMPY_DTYPES
from vlmguard.graphs.lowerings.gate import LARGEST_HALF_EDIT
from vlmguard.graphs.lowerings.table import LOWERINGS
from vlmguard.graphs.modes import MODES, POSITIONS, guard_mode
from vlmguard.graphs.reference import LayerGuard
from vlmguard.graphs.spec import GuardSpec

HALF = float(np.finfo(np.float16).max)
PAIRS = [(lowering.name, mode) for lowering in LOWERINGS for mode in MODES if mode in lowering.modes]
every_pair = pytest.mark.parametrize(("lowering", "mode"), PAIRS)
TOLERANCE = {"float16": 5e-3, "bfloat16": 3e-2}
BATCH, SEQUENCE, MASSIVE = 2, 3, 5

# One attention, scaled down so far that the unguarded graph itself is far from overflowing; `h` is the layer's output.
STREAM = """
    g ({dtype}[B, S, 16] x, int64[B, S] attention_mask)
        => ({dtype}[B, S, 16] y, {dtype}[B, S, 16] h) <{dtype} small, {dtype}[16] row> {{
        k = Mul(small, row)
        q = Mul(x, k)
        t = Transpose <perm = [0, 2, 1]> (q)
        s = MatMul(q, t)
        p = Softmax <axis = -1> (s)
        a = MatMul(p, q)
        {total}
        y = Mul(n, k)
    }}
"""
PLAIN = "h = Add(x, a)\n n = Identity(h)"
FUSED = "n, , , h = com.microsoft.SkipSimplifiedLayerNormalization(x, a, row)"


def stream(dtype: str = "float16", total: str = PLAIN) -> ir.Model:
    made = text_model(STREAM.format(dtype=dtype, total=total))
    small = made.graph.initializers["small"]
    small.const_value = ir.Tensor(np.array(1e-3, NUMPY_DTYPES[dtype]), name="small")
    return made


def planted(dtype: str = "float16") -> np.ndarray:
    """Ordinary states with one channel at 3e4, either sign."""
    states = np.random.default_rng(0).normal(size=(BATCH, SEQUENCE, WIDTH))
    states[..., MASSIVE] = 3e4
    states[0, :, MASSIVE] *= -1
    return states.astype(NUMPY_DTYPES[dtype])


def feeds(x: np.ndarray) -> dict[str, np.ndarray]:
    return {"x": x, "attention_mask": np.ones((BATCH, SEQUENCE), np.int64)}


def guarded(
    total: str, dtype: str, lowering: str, mode: str, positions: str, **parts: object
) -> tuple[ir.Model, LayerGuard]:
    found = directions(rank=parts["ssd"].shape[0], parts=parts, alpha=0.5 if mode in {"steer", "supervise"} else None)  # type: ignore[attr-defined]
    spec = GuardSpec(mode=mode, positions=positions, lowering=lowering)  # type: ignore[arg-type]
    made = guard_model(stream(dtype, total), found, spec)
    return made.model, made.plan.sites[0].guard


def evaluate(model: ir.Model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with np.errstate(over="ignore", invalid="ignore"):
        outputs = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, inputs)
    return {str(value.name): array for value, array in zip(model.graph.outputs, outputs, strict=True)}


def told(mode: str, rank: int) -> np.ndarray | None:
    """Coordinates of a text-only query, gate open."""
    return np.full((BATCH, 1, rank), 2.0, np.float32) if guard_mode(mode).supervisor else None


def selected(positions: str) -> np.ndarray | None:
    return None if positions == "all" else reference.last_token(np.ones((BATCH, SEQUENCE)))


def aligned(rank: int) -> np.ndarray:
    """Orthonormal rows whose first is mostly the massive channel: the hardest ones to read and to write."""
    rows = np.random.default_rng(1).normal(size=(rank, WIDTH))
    rows[0] *= 0.05
    rows[0, MASSIVE] = 1.0
    return np.ascontiguousarray(np.linalg.qr(rows.T)[0].T * [[-1.0]], dtype=np.float32)


@every_pair
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rows", ["spread", "aligned"])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_massive_activations_equal_the_reference(
    lowering: str, mode: str, positions: str, dtype: str, rows: str, rank: int
) -> None:
    ssd = orthonormal(rank) if rows == "spread" else aligned(rank)
    model, layer = guarded(PLAIN, dtype, lowering, mode, positions, ssd=ssd, readout=ssd[0], threshold=-1e29)
    inputs, supervisor = feeds(planted(dtype)), told(mode, rank)
    raw = evaluate(stream(dtype), inputs)["h"].astype(np.float64)
    extra = {} if supervisor is None else {supervisor_input(mode): supervisor}
    found = evaluate(model, inputs | extra)
    expected = reference.guard(mode, layer, raw, supervisor, selected(positions))
    assert np.abs(expected - raw).max() > 100  # or it says nothing about large numbers
    assert np.abs(expected).max() < HALF
    for array in found.values():
        assert np.isfinite(array.astype(np.float64)).all()
    assert np.abs(found["h"].astype(np.float64) - expected).max() / np.abs(raw).max() < TOLERANCE[dtype]


@every_pair
@pytest.mark.parametrize("positions", POSITIONS)
def test_massive_activations_in_a_fused_norm(lowering: str, mode: str, positions: str) -> None:
    """Only onnxruntime has this operator; its CPU provider sums in float32."""
    pytest.importorskip("onnxruntime")
    ssd = aligned(4)
    model, layer = guarded(FUSED, "float16", lowering, mode, positions, ssd=ssd, readout=ssd[0], threshold=-1e29)
    inputs, supervisor = feeds(planted()), told(mode, 4)
    raw = run(stream(total=FUSED), inputs)["h"].astype(np.float64)
    found = run(model, inputs | ({} if supervisor is None else {supervisor_input(mode): supervisor}))
    expected = reference.guard(mode, layer, raw, supervisor, selected(positions))
    assert all(np.isfinite(array).all() for array in found.values())
    assert np.abs(found["h"] - expected).max() / np.abs(raw).max() < TOLERANCE["float16"]


@every_pair
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_coordinate_beyond_float16_is_still_read(lowering: str, mode: str, positions: str) -> None:
    """Each channel fits, their sum does not: `h . v` is 1.2e5, and the gate must see that it is above the threshold."""
    ssd = np.full((1, WIDTH), 0.25, np.float32)
    ssd[0, ::2] *= -1
    x = (np.sign(ssd) * 3e4 * np.ones((BATCH, SEQUENCE, 1))).astype(np.float16)
    model, layer = guarded(
        PLAIN,
        "float16",
        lowering,
        mode,
        positions,
        ssd=ssd,
        readout=ssd[0],
        threshold=1e5,
        target=np.zeros(1, np.float32),
    )
    raw = evaluate(stream(), feeds(x))["h"].astype(np.float64)
    assert (raw @ ssd[0] > HALF).all()
    # above the threshold in `supervise`; the text of `combined` is below its own, so that its readout alone opens the gate
    a = {"supervise": 1.1e5, "combined": 0.0, "align": 1.1e5}.get(mode)
    supervisor = None if a is None else np.full((BATCH, 1, 1), a, np.float32)
    found = evaluate(model, feeds(x) | ({} if supervisor is None else {supervisor_input(mode): supervisor}))["h"]
    expected = reference.guard(mode, layer, raw, supervisor, selected(positions))
    assert (expected != raw).any()
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() / np.abs(raw).max() < TOLERANCE["float16"]


@every_pair
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_no_state_up_to_half_the_range_makes_anything_overflow(lowering: str, mode: str, data: st.DataObject) -> None:
    """Whatever the gate says, whatever the numbers of the guard are; an absurd edit is clipped, never infinite."""
    rank = data.draw(st.sampled_from([1, 3, 8]))
    signs = data.draw(st.lists(st.sampled_from([-1.0, 0.01, 1.0]), min_size=WIDTH, max_size=WIDTH))
    x = np.broadcast_to(np.array(signs) * 32000, (BATCH, SEQUENCE, WIDTH)).astype(np.float16)
    scale = data.draw(st.sampled_from([1.0, 1e-6, 1e6]))
    parts = {
        "ssd": aligned(rank) if data.draw(st.booleans()) else orthonormal(rank),
        "readout": (scale * np.random.default_rng(2).normal(size=WIDTH)).astype(np.float32),
        "threshold": data.draw(st.sampled_from([-1e29, 0.0, 1e29])),
        "text_threshold": data.draw(st.sampled_from([-1e29, 0.25, 1e29])),
        "target": np.full(rank, data.draw(st.sampled_from([-1e30, 0.0, 1e30])), np.float32),
        "origin": np.full(rank, data.draw(st.sampled_from([-1e6, 0.0])), np.float32),
    }
    positions = data.draw(st.sampled_from([one for one in POSITIONS if possible(mode, one)]))
    found = directions(rank=rank, parts=parts, alpha=1000.0)
    spec = GuardSpec(mode=mode, positions=positions, lowering=lowering)  # type: ignore[arg-type]
    model = guard_model(stream(), found, spec).model
    a = data.draw(st.sampled_from([reference.NO_SUPERVISOR, 0.0, 1e30]))
    extra = {supervisor_input(mode): np.full((BATCH, 1, rank), a, np.float32)} if guard_mode(mode).supervisor else {}
    outputs = evaluate(model, feeds(x) | extra)
    for array in outputs.values():
        assert np.isfinite(array).all()
    if extra and a == reference.NO_SUPERVISOR:  # whatever the thresholds are
        assert outputs["h"].tobytes() == evaluate(stream(), feeds(x))["h"].tobytes()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("lowering", ["lowrank", "rank1"])
def test_a_readout_of_any_length_decides_in_float16(lowering: str, scale: float) -> None:
    """Too long or too short for float16 as it stands; the same readout and threshold, scaled, decide the same."""
    x = np.random.default_rng(3).normal(size=(BATCH, SEQUENCE, WIDTH)).astype(np.float16)
    readout = orthonormal(1, seed=5)[0]
    raw = evaluate(stream(), feeds(x))["h"]
    scores = np.sort((raw.astype(np.float64) @ readout).ravel())
    threshold = float(scores[2:4].mean())
    model, _ = guarded(
        PLAIN,
        "float16",
        lowering,
        "restore",
        "all",
        ssd=orthonormal(2),
        readout=(readout * scale).astype(np.float32),
        threshold=threshold * scale,
    )
    moved = (evaluate(model, feeds(x))["h"] != raw).any(axis=-1)
    np.testing.assert_array_equal(moved, raw.astype(np.float64) @ readout > threshold)
    assert 0 < moved.sum() < moved.size


def test_half_an_edit_and_half_a_state_fit_into_float16() -> None:
    assert LARGEST_HALF_EDIT * (1 + 2**-10) + 2**15 < HALF
