"""Taps show the states that they say: at the last token for extraction, before and after each guard for the proof."""

from __future__ import annotations

import numpy as np
import pytest
from hand_graphs import (
    KINDS,
    WIDTH,
    Kind,
    copy_of,
    decoder,
    directions,
    guard_model,
    run,
    text_model,
    value_called,
)

from vlmguard.graphs import reference
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.dtypes import NUMPY_DTYPES
from vlmguard.graphs.errors import AnatomyNotFound
from vlmguard.graphs.modes import POSITIONS
from vlmguard.graphs.proof.structure import prove_structure
from vlmguard.graphs.spec import GuardSpec
from vlmguard.graphs.taps import RAW_OUTPUT, STATES_OUTPUT, tap_guard, tap_guard_last_token, tap_last_token

pytest.importorskip("onnxruntime")

MASK = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])


def feeds(dtype: str = "float32") -> dict[str, np.ndarray]:
    embeds = np.random.default_rng(0).normal(size=(3, 4, WIDTH))
    return {"inputs_embeds": embeds.astype(NUMPY_DTYPES[dtype]), "attention_mask": MASK}


# -------------------------------------------------------------------------------------------------------- the last token


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_at_the_last_token(kind: Kind, dtype: str) -> None:
    """In the order of the sites that were asked for; the hidden sum of the last fused node included."""
    model = decoder(kind, 3, dtype, hidden=False)
    sites = dissect(model).sites
    tap_last_token(model, [sites[2], sites[0]])
    found = run(model, feeds(dtype), optimize=False)
    states = found[STATES_OUTPUT]
    assert states.dtype == np.float32 and states.shape == (3, 2, WIDTH)
    assert [output.name for output in model.graph.outputs] == ["logits", STATES_OUTPUT]
    # the sums themselves, from a graph in which they are values
    shown = decoder(kind, 3, dtype)
    shown.graph.outputs.append(value_called(shown, "layer_0_sum"))
    expected = run(shown, feeds(dtype), optimize=False)
    last = (np.arange(3), [3, 3, 1])
    tolerance = 1e-5 if dtype == "float32" else 2e-2  # the fused kernel sums in more digits than float16 has
    for row, name in enumerate(("hidden", "layer_0_sum")):
        np.testing.assert_allclose(states[:, row], expected[name][last].astype(np.float32), rtol=0, atol=tolerance)
    assert found["logits"].tobytes() == expected["logits"].tobytes()


def test_without_a_mask_it_is_the_last_index() -> None:
    model = decoder(mask=False)
    tap_last_token(model, dissect(model).sites)
    found = run(model, {"inputs_embeds": feeds()["inputs_embeds"]})
    np.testing.assert_array_equal(found[STATES_OUTPUT][:, 0], found["hidden"][:, -1])


def test_taps_of_a_graph_that_was_not_dissected_are_refused() -> None:
    anatomy = dissect(decoder(layers=2))
    with pytest.raises(AnatomyNotFound) as refusal:
        tap_last_token(decoder(layers=1), anatomy.sites)
    assert str(refusal.value) == "layer 0: no node makes 'layer_0_sum'; was this graph dissected?"


# ------------------------------------------------------------------------------------------------- before and after a guard


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_before_and_after_a_guard(kind: Kind, dtype: str) -> None:
    source = decoder(kind, 2, dtype)
    made = guard_model(decoder(kind, 2, dtype), directions((1,)), GuardSpec(mode="restore", tau=-100.0))
    plain = run(copy_of(made.model), feeds(dtype), optimize=False)
    names = tap_guard(made.model, made.plan, made.report)
    assert names == [("vlmguard.raw.1", "vlmguard.guarded.1")]
    found = run(made.model, feeds(dtype), optimize=False)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for name, expected in (
        ("vlmguard.raw.1", run(source, feeds(dtype), optimize=False)["hidden"]),
        ("vlmguard.guarded.1", plain["hidden"]),
    ):
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], expected.astype(np.float32), rtol=0, atol=tolerance)
    assert found["logits"].tobytes() == plain["logits"].tobytes()  # looking changes nothing
    assert np.abs(found["vlmguard.raw.1"] - found["vlmguard.guarded.1"]).max() > 0.5


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_of_a_guarded_graph_at_the_last_token(kind: Kind, dtype: str) -> None:
    """Every layer behind its guard, and what the guards read: the numbers that the whole streams have there."""
    made, again = (
        guard_model(decoder(kind, 3, dtype), directions((0, 2)), GuardSpec(mode="restore", tau=-100.0))
        for _ in range(2)
    )
    plain = run(copy_of(made.model), feeds(dtype), optimize=False)
    tap_guard_last_token(made.model, made.anatomy.sites, made.report)
    found = run(made.model, feeds(dtype), optimize=False)
    assert found["logits"].tobytes() == plain["logits"].tobytes()
    assert found[STATES_OUTPUT].shape == (3, 3, WIDTH) and found[RAW_OUTPUT].shape == (3, 2, WIDTH)
    names = tap_guard(again.model, again.plan, again.report)
    streams = run(again.model, feeds(dtype), optimize=False)
    last = (np.arange(3), [3, 3, 1])
    for row, (layer, (raw, guarded)) in enumerate(zip((0, 2), names, strict=True)):
        for taken, whole in ((found[RAW_OUTPUT][:, row], raw), (found[STATES_OUTPUT][:, layer], guarded)):
            near = {"rtol": 0, "atol": 1e-5} if dtype == "float32" else {"rtol": 1e-3, "atol": 2e-2}
            np.testing.assert_allclose(taken, streams[whole][last], **near)
        assert np.abs(found[RAW_OUTPUT][:, row] - found[STATES_OUTPUT][:, layer]).max() > 0.5


# ---------------------------------------------------------------------------------------- a layer that reads the one below it

SIDE_BY_SIDE = {
    # attention and MLP in one sum: the residual of layer 1 is the very sum that is guarded at layer 0
    "plain": "h1 = Add(h0, both)",
    # the same after a fusion that began with the second layer
    "fused": "n1, mean, deviation, h1 = com.microsoft.SkipSimplifiedLayerNormalization(h0, both, g)",
    "fused, swapped": "n1, mean, deviation, h1 = com.microsoft.SkipSimplifiedLayerNormalization(both, h0, g)",
}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("second", SIDE_BY_SIDE.values(), ids=SIDE_BY_SIDE)
def test_guards_of_neighbouring_layers_add_up(second: str, positions: str) -> None:
    text = f"""
        g (float[B, S, 8] x) => (float[B, S, 8] y) <float[8, 8] w, float[8] g> {{
            t0 = Transpose <perm = [0, 2, 1]> (x)
            s0 = MatMul(x, t0)
            p0 = Softmax <axis = -1> (s0)
            a0 = MatMul(p0, x)
            h0 = Add(x, a0)
            t1 = Transpose <perm = [0, 2, 1]> (h0)
            s1 = MatMul(h0, t1)
            p1 = Softmax <axis = -1> (s1)
            a1 = MatMul(p1, h0)
            m1 = Sin(h0)
            both = Add(a1, m1)
            {second}
            y = MatMul(h1, w)
        }}
    """
    model = text_model(text)
    made = guard_model(model, directions((0, 1), width=8), GuardSpec(mode="restore", tau=-100.0, positions=positions))  # type: ignore[arg-type]
    checks = prove_structure(text_model(text), model, made.anatomy, made.plan, made.report)
    assert [check.note for check in checks if not check.ok] == []
    names = tap_guard(model, made.plan, made.report)
    outputs = run(model, {"x": np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)})
    selected = np.array([0.0, 0.0, 1.0])[None, :, None] if positions == "last" else None
    for site, (raw, guarded) in zip(made.plan.sites, names, strict=True):
        expected = reference.guard("restore", site.guard, outputs[raw].astype(np.float64), selected=selected)
        np.testing.assert_allclose(outputs[guarded], expected, atol=1e-5)
    # what layer 1 starts from is what the guard of layer 0 gave
    first = outputs[names[0][1]].astype(np.float64)
    shares = np.exp(scores := first @ first.transpose(0, 2, 1)) / np.exp(scores).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(outputs[names[1][0]], first + shares @ first + np.sin(first), rtol=1e-4, atol=1e-4)
