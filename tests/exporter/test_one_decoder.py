"""At most one decoder is in memory at any time of an export, whatever the export does."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
from hand_graphs import decoder
from random_directions import random_directions, write_directions
from tiny_vlm_paths import SOURCE

import vlmguard
from vlmguard.graphs.graph_io import save_graph
from vlmguard.graphs.layouts import open_package
from vlmguard.runtime.decoder import open_decoder
from vlmguard.runtime.decoder_place import DecoderPlace
from vlmguard.runtime.vlm import VisionLanguageModel

pytest_plugins = ("tiny_vlm_fixtures",)
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many decoder sessions there were, at each opening of one."""
    sessions: weakref.WeakSet[Any] = weakref.WeakSet()
    counted: list[int] = []

    class Counted(onnxruntime.InferenceSession):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            before = len(sessions)
            super().__init__(*arguments, **options)
            if any(output.name == "logits" for output in self.get_outputs()):
                sessions.add(self)
                counted.append(before + 1)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Counted)
    return counted


@pytest.fixture
def directions(tmp_path: Path) -> Path:
    width = vlmguard.inspect(SOURCE).width
    return write_directions(tmp_path / "directions.safetensors", random_directions(width, [2, 4]))


@pytest.mark.slow
def test_one_decoder_is_open_while_a_guard_is_proved_and_asked(
    alive: list[int], directions: Path, tmp_path: Path
) -> None:
    spec = vlmguard.GuardSpec(mode="restore", tau=1e9, knobs=True)  # a gate that never opens removes no refusal
    vlmguard.export(SOURCE, tmp_path / "out", directions=directions, spec=spec, proof="full", allow_no_effect=True)
    assert len(alive) >= 6 and set(alive) == {1}


@pytest.mark.long
def test_one_decoder_is_open_while_a_guard_is_calibrated(alive: list[int], tmp_path: Path) -> None:
    spec = vlmguard.GuardSpec(mode="restore")
    result = vlmguard.export(SOURCE, tmp_path / "out", spec=spec, proof="full")
    assert result.calibration is not None and len(alive) >= 8 and set(alive) == {1}


def test_one_decoder_is_open_while_a_mode_is_chosen(alive: list[int], tmp_path: Path) -> None:
    result = vlmguard.export(SOURCE, tmp_path / "out", proof="full")
    assert result.choice is not None and len(alive) >= 6 and set(alive) == {1}


def test_one_decoder_is_open_for_random_inputs(alive: list[int], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_graph(decoder(layers=3), tmp_path / "model" / "model.onnx")
    found = write_directions(tmp_path / "directions.safetensors", random_directions(16, [0, 1]))
    vlmguard.export(tmp_path / "model" / "model.onnx", tmp_path / "out", directions=found, proof="full")
    assert len(alive) >= 5 and set(alive) == {1}


def test_a_decoder_that_lost_its_place_is_opened_again(alive: list[int]) -> None:
    place = DecoderPlace()
    model = VisionLanguageModel(open_package(SOURCE), place=place)
    assert alive == []  # nothing is opened before it is needed
    first = model.decoder
    other = model.with_decoder(model.package.load_decoder())
    assert not first.closed and other.decoder is not first and first.closed
    assert model.decoder is not first and other._session is not None and other._session.closed
    assert set(alive) == {1}
    place.close()
    assert model._session is not None and model._session.closed


def test_a_closed_session_is_not_run(alive: list[int]) -> None:
    session = open_decoder(open_package(SOURCE))
    session.close()
    with pytest.raises(AssertionError, match="a closed decoder session was run"):
        session._run({})
