"""Headroom: what is seen, where it is thin, where it is refused; and that the proof of a float16 graph reports it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hand_graphs import WIDTH, decoder, directions, guard_model

from vlmguard.exporter.proof.headroom import LARGEST, NAME, Headroom
from vlmguard.exporter.proof.inputs import random_inputs
from vlmguard.exporter.proof.prove import prove_by_running
from vlmguard.graphs.graph_io import save_graph
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.modes import MODES
from vlmguard.graphs.proof.structure import Check
from vlmguard.graphs.spec import GuardSpec


def seen(*largest: float) -> Check:
    """A check of states whose largest numbers these are, one per layer."""
    headroom = Headroom()
    for layer, number in enumerate(largest):
        headroom.see(layer, np.array([[1.0, -number]]), np.array([[0.5, 2.0]]))
    return headroom.check()


@pytest.mark.parametrize(
    ("largest", "ok", "said"),
    [
        (100.0, True, ""),
        (3e4, True, ""),
        (0.51 * LARGEST, True, "thin: beyond half of float16's range, prefer bfloat16 or float32"),
        (0.93 * LARGEST, True, "thin"),
        (
            0.94 * LARGEST,
            False,
            "float16 cannot hold layer 1, channel 1: export the model with a float32 residual stream",
        ),
        (float("inf"), False, "float16 cannot hold layer 1, channel 1"),
        (float("nan"), False, "float16 cannot hold layer 1, channel 1"),
    ],
)
def test_thin_and_refused(largest: float, ok: bool, said: str) -> None:
    check = seen(1.0, largest)
    assert check.ok == ok
    assert said in check.note
    assert ("thin" in check.note, "cannot hold" in check.note) == (said.startswith("thin"), "cannot hold" in said)


def test_each_layer_is_told_before_and_after_its_guard() -> None:
    check = seen(300.0, 41.5)
    assert check.note == "largest |h| before / after the guard, layer by layer: 0: 300 / 2, 1: 41.5 / 2"
    assert check.compared == 8
    assert check.worst == pytest.approx(300 / LARGEST)


def test_what_the_guard_makes_of_a_state_counts_too() -> None:
    headroom = Headroom()
    headroom.see(3, np.ones(4), np.full(4, 6.4e4))
    headroom.see(3, np.full(4, 2.0), np.ones(4))
    assert headroom.layers == {3: [2.0, 6.4e4]}
    assert not headroom.check().ok


def test_nothing_seen_is_not_ok() -> None:
    assert not Headroom().check().ok


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "align"])  # it wants a KV cache
def test_the_proof_of_a_float16_graph_reports_it(tmp_path: Path, mode: str) -> None:
    pytest.importorskip("onnxruntime")
    checks = {dtype: proved(tmp_path / dtype, dtype, mode) for dtype in ("float16", "float32")}
    assert NAME not in checks["float32"]
    check = checks["float16"][NAME]
    assert check.ok and check.compared > 0 and 0 < check.worst < 0.01
    assert check.note.count(":") == 3  # the sentence and two layers


def proved(folder: Path, dtype: str, mode: str) -> dict[str, Check]:
    folder.mkdir()
    save_graph(decoder(layers=2, dtype=dtype), folder / "model.onnx")
    package = open_package(folder / "model.onnx")
    made = guard_model(package.load_decoder(), directions((0, 1)), GuardSpec(mode=mode))  # type: ignore[arg-type]
    save_graph(made.model, folder / "guarded.onnx")
    from vlmguard.runtime.decoder import open_decoder

    inputs = random_inputs(open_decoder(package), WIDTH, 5, pads=True, why="hand-made")
    checks = prove_by_running(package, folder / "guarded.onnx", made.plan, made.report, inputs)
    return {check.name: check for check in checks}
