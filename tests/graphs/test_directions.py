"""The directions file: what is written is read back, byte for byte the same each time, and anything else is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_graphs import directions, layer_directions, orthonormal, uncalibrated
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file

from vlmguard.graphs.directions import SCHEMA, Directions, LayerDirections, directions_bytes, read_directions
from vlmguard.graphs.errors import DirectionMismatch, OutputRefused
from vlmguard.graphs.modes import MODES

WIDTH = 16


# -------------------------------------------------------------------------------------------------------------- round trip

numbers = st.floats(-1e6, 1e6, width=32)
texts = st.text(max_size=20)


@st.composite
def any_layer(draw: st.DrawFn, width: int) -> LayerDirections:
    rank = draw(st.integers(1, min(8, width)))
    readout = arrays(np.float32, width, elements=numbers).filter(np.any)
    return LayerDirections(
        ssd=orthonormal(rank, width, draw(st.integers(0, 5))),
        origin=draw(st.none() | arrays(np.float32, rank, elements=numbers)),
        target=draw(st.none() | arrays(np.float32, rank, elements=numbers)),
        readout=draw(st.none() | readout),
        threshold=draw(st.none() | numbers),
        text_threshold=draw(st.none() | numbers),
    )


@st.composite
def any_directions(draw: st.DrawFn) -> Directions:
    width = draw(st.integers(1, 20))
    layers = draw(st.dictionaries(st.integers(0, 99999), any_layer(width), min_size=1, max_size=4))
    ordered = dict(sorted(layers.items()))
    recommended = draw(st.none() | st.sets(st.sampled_from(list(ordered)), min_size=1))
    evidence = st.dictionaries(
        st.integers(0, 99).map(str),
        st.dictionaries(texts, st.floats(allow_nan=False, allow_infinity=False)),
        max_size=3,
    )
    return Directions(
        width=width,
        layers=ordered,
        model_sha256=draw(st.none() | st.text("0123456789abcdef", min_size=64, max_size=64)),
        pairs=draw(st.none() | st.integers(1, 10**9)),
        evidence=draw(evidence),
        mode=draw(st.none() | st.sampled_from(MODES)),
        recommended_layers=None if recommended is None else tuple(sorted(recommended)),
        alpha=draw(st.none() | st.floats(0, 1e6)),
    )


def assert_same(found: Directions, expected: Directions) -> None:
    plain, wanted = vars(found) | {"layers": list(found.layers)}, vars(expected) | {"layers": list(expected.layers)}
    assert plain == wanted
    for number, layer in expected.layers.items():
        other = found.layers[number]
        assert other.threshold == layer.threshold
        assert other.text_threshold == layer.text_threshold
        for part in ("ssd", "origin", "target", "readout"):
            a, b = getattr(other, part), getattr(layer, part)
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == np.float32
                np.testing.assert_array_equal(a, b)


@given(any_directions())
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, expected: Directions) -> None:
    path = tmp_path_factory.getbasetemp() / "directions.safetensors"
    content = directions_bytes(expected)
    path.write_bytes(content)
    found = read_directions(path)
    assert_same(found, expected)
    assert directions_bytes(found) == content


def test_the_same_directions_are_the_same_bytes_in_every_process() -> None:
    """safetensors keeps metadata in a hash map of its own, in another order each run: the header is sorted after it."""
    script = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[1]); from hand_graphs import directions;"
        "from vlmguard.graphs.directions import directions_bytes;"
        "print(hashlib.sha256(directions_bytes(directions((2, 0), mode='steer', alpha=2.0, pairs=7))).hexdigest())"
    )
    tests = str(Path(__file__).parents[1])
    digests = {subprocess.check_output([sys.executable, "-c", script, tests], text=True) for _ in range(2)}
    content = directions_bytes(directions((2, 0), mode="steer", alpha=2.0, pairs=7))
    assert len(digests) == 1
    assert content == directions_bytes(directions((2, 0), mode="steer", alpha=2.0, pairs=7))
    metadata = header_of(content)["__metadata__"]
    assert list(metadata) == sorted(metadata)


def header_of(content: bytes) -> dict[str, Any]:
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0  # the tensors behind it stay aligned
    return json.loads(content[8 : 8 + size])


def test_the_file_says_what_the_schema_says() -> None:
    header = header_of(directions_bytes(directions((3,), rank=2, mode="restore", recommended_layers=(3,))))
    assert header.pop("__metadata__") == {
        "schema": "vlmguard.directions/1",
        "width": "16",
        "layers": "3",
        "evidence": "{}",
        "mode": "restore",
        "recommended_layers": "3",
    }
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "layers.3.ssd": ("F32", [2, 16]),
        "layers.3.origin": ("F32", [2]),
        "layers.3.target": ("F32", [2]),
        "layers.3.readout": ("F32", [16]),
        "layers.3.threshold": ("F32", [1]),
        "layers.3.text_threshold": ("F32", [1]),
    }


def test_a_layer_is_calibrated_when_restore_can_run_on_it() -> None:
    assert layer_directions().calibrated
    for part in ("target", "readout", "threshold"):
        assert not layer_directions(**{part: None}).calibrated
    assert layer_directions(origin=None).calibrated
    assert layer_directions(text_threshold=None).calibrated
    mixed = Directions(WIDTH, {1: layer_directions(), 4: LayerDirections(orthonormal(2)), 6: layer_directions()})
    assert mixed.calibrated_layers == (1, 6)
    assert uncalibrated((0, 1)).calibrated_layers == ()


# ----------------------------------------------------------------------------------------- refusals of what lies in a file

Tensors = dict[str, np.ndarray]
Metadata = dict[str, str]


def good() -> tuple[Tensors, Metadata]:
    layer = layer_directions()
    tensors = {f"layers.2.{part}": getattr(layer, part) for part in ("ssd", "origin", "target", "readout")}
    tensors["layers.2.threshold"] = np.array([0.125], np.float32)
    tensors["layers.2.text_threshold"] = np.array([0.25], np.float32)
    return tensors, {"schema": SCHEMA, "width": "16", "layers": "2", "evidence": "{}"}


def refusal_of(path: Path, tensors: Tensors, metadata: Metadata | None) -> str:
    save_file(tensors, path, metadata)
    return refusal(path)


def refusal(path: Path) -> str:
    with pytest.raises(DirectionMismatch) as raised:
        read_directions(path)
    sentence = str(raised.value)
    assert sentence.startswith(f"{path}: ") and "\n" not in sentence
    return sentence.removeprefix(f"{path}: ")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "d.safetensors"


def test_the_good_file_is_good(path: Path) -> None:
    tensors, metadata = good()
    save_file(tensors, path, metadata)
    assert_same(read_directions(path), Directions(WIDTH, {2: layer_directions()}))


def skewed(amount: float) -> np.ndarray:
    rows = orthonormal(2)
    rows[1] += amount * rows[0]
    return rows


# what is done to a tensor of the good file -> the sentence
TENSORS: list[tuple[str, np.ndarray, str]] = [
    ("layers.2.ssd", orthonormal(2, 15), "layers.2.ssd has shape (2, 15), expected 1 to 64 rows of width 16"),
    (
        "layers.2.ssd",
        np.zeros((65, 16), np.float32),
        "layers.2.ssd has shape (65, 16), expected 1 to 64 rows of width 16",
    ),
    ("layers.2.ssd", orthonormal(1)[0], "layers.2.ssd has shape (16,), expected 1 to 64 rows of width 16"),
    (
        "layers.2.ssd",
        np.zeros((0, 16), np.float32),
        "layers.2.ssd has shape (0, 16), expected 1 to 64 rows of width 16",
    ),
    ("layers.2.ssd", orthonormal(2).astype(np.float16), "layers.2.ssd is float16, expected float32"),
    ("layers.2.ssd", orthonormal(2).astype(np.float64), "layers.2.ssd is float64, expected float32"),
    ("layers.2.origin", np.zeros(3, np.float32), "layers.2.origin has shape (3,), expected (2,)"),
    ("layers.2.target", np.zeros((2, 1), np.float32), "layers.2.target has shape (2, 1), expected (2,)"),
    ("layers.2.readout", np.ones(15, np.float32), "layers.2.readout has shape (15,), expected (16,)"),
    ("layers.2.threshold", np.zeros(2, np.float32), "layers.2.threshold has shape (2,), expected (1,)"),
    ("layers.2.text_threshold", np.zeros(2, np.float32), "layers.2.text_threshold has shape (2,), expected (1,)"),
    ("layers.2.threshold", np.zeros((), np.float32), "layers.2.threshold has shape (), expected (1,)"),
    (
        "layers.2.readout",
        np.zeros(16, np.float32),
        "layers.2.readout is all zeros, its gate would never move; calibrate again",
    ),
    (
        "layers.2.ssd",
        skewed(0.01),
        "layers.2.ssd is not orthonormal (off by 1.0e-02, limit 1e-04); extract the directions again",
    ),
    (
        "layers.2.ssd",
        2 * orthonormal(2),
        "layers.2.ssd is not orthonormal (off by 3.0e+00, limit 1e-04); extract the directions again",
    ),
    (
        "layers.2.ssd",
        np.zeros((2, 16), np.float32),
        "layers.2.ssd is not orthonormal (off by 1.0e+00, limit 1e-04); extract the directions again",
    ),
    ("layers.2.bias", np.zeros(2, np.float32), f"tensor 'layers.2.bias' is not part of schema {SCHEMA}; remove it"),
    ("layers.02.ssd", orthonormal(2), f"tensor 'layers.02.ssd' is not part of schema {SCHEMA}; remove it"),
    ("layers.-1.ssd", orthonormal(2), f"tensor 'layers.-1.ssd' is not part of schema {SCHEMA}; remove it"),
    ("model.layers.2.ssd", orthonormal(2), f"tensor 'model.layers.2.ssd' is not part of schema {SCHEMA}; remove it"),
    ("layers.100000.ssd", orthonormal(2), f"tensor 'layers.100000.ssd' is not part of schema {SCHEMA}; remove it"),
    ("layers.3.ssd", orthonormal(2), "metadata lists layers (2,), the tensors are for layers (2, 3)"),
    (
        "layers.3.target",
        np.zeros(2, np.float32),
        "has no tensor 'layers.3.ssd', only layers.3.target; add it (docs/directions.md)",
    ),
]


@pytest.mark.parametrize(("name", "tensor", "sentence"), TENSORS)
def test_a_tensor_that_is_not_what_the_schema_promises(
    path: Path, name: str, tensor: np.ndarray, sentence: str
) -> None:
    tensors, metadata = good()
    assert refusal_of(path, tensors | {name: tensor}, metadata) == sentence


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["ssd", "origin", "target", "readout", "threshold", "text_threshold"])
def test_a_number_that_is_none_is_refused(path: Path, part: str, number: float) -> None:
    tensors, metadata = good()
    broken = tensors[f"layers.2.{part}"].copy()
    broken.flat[-1] = number
    expected = f"layers.2.{part} holds NaN or infinity; extract the directions again"
    if part.endswith("threshold"):
        expected = f"layers.2.{part} is {number}; calibrate again"
    assert refusal_of(path, tensors | {f"layers.2.{part}": broken}, metadata) == expected


@pytest.mark.parametrize("threshold", [1e30, -1e31])
@pytest.mark.parametrize("part", ["threshold", "text_threshold"])
def test_a_threshold_that_no_score_can_pass_is_refused(path: Path, part: str, threshold: float) -> None:
    """The second would even open for the coordinates that a listening pass sends."""
    tensors, metadata = good()
    found = refusal_of(path, tensors | {f"layers.2.{part}": np.array([threshold], np.float32)}, metadata)
    assert found == f"layers.2.{part} is {float(np.float32(threshold))}; calibrate again"


def test_rounding_is_not_a_lack_of_orthogonality(path: Path) -> None:
    tensors, metadata = good()
    save_file(tensors | {"layers.2.ssd": skewed(5e-5)}, path, metadata)
    assert read_directions(path).layers[2].ssd.shape == (2, 16)


MISSING = object()
METADATA: list[tuple[str, Any, str]] = [
    (
        "schema",
        "vlmguard.directions/2",
        f"schema is 'vlmguard.directions/2', this version reads {SCHEMA!r}; extract them again",
    ),
    ("schema", MISSING, f"metadata has no key 'schema'; write {SCHEMA} there (docs/directions.md)"),
    ("layers", "2,3", "metadata lists layers (2, 3), the tensors are for layers (2,)"),
    ("layers", "1", "metadata lists layers (1,), the tensors are for layers (2,)"),
    ("layers", "2,2", "metadata lists layers (2, 2), the tensors are for layers (2,)"),
    ("layers", "two", "metadata 'layers' is 'two', expected numbers such as '3,4'"),
    ("layers", "", "metadata 'layers' is '', expected numbers such as '3,4'"),
    ("layers", MISSING, "metadata has no key 'layers'; write numbers such as '3,4' there (docs/directions.md)"),
    ("recommended_layers", "x", "metadata 'recommended_layers' is 'x', expected numbers such as '3,4'"),
    ("recommended_layers", "3", "layers [3] are recommended but have no ssd"),
    ("recommended_layers", "2,5,9", "layers [5, 9] are recommended but have no ssd"),
    ("width", "15", "layers.2.ssd has shape (2, 16), expected 1 to 64 rows of width 15"),
    ("width", "0", "directions have width 0; expected the decoder's hidden size"),
    (
        "width",
        "wide",
        "metadata cannot be read (invalid literal for int() with base 10: 'wide'); extract the directions again",
    ),
    ("width", MISSING, "metadata has no key 'width'; write the decoder's hidden size there (docs/directions.md)"),
    (
        "pairs",
        "many",
        "metadata cannot be read (invalid literal for int() with base 10: 'many'); extract the directions again",
    ),
    ("mode", "erase", "mode 'erase' is unknown; expected one of project, steer, supervise, restore, combined, align"),
    ("alpha", "-1", "alpha -1.0 is not a strength; expected 0 or more"),
    ("alpha", "nan", "alpha nan is not a strength; expected 0 or more"),
    ("alpha", "inf", "alpha inf is not a strength; expected 0 or more"),
    (
        "alpha",
        "strong",
        "metadata cannot be read (could not convert string to float: 'strong'); extract the directions again",
    ),
    ("evidence", "[]", "evidence is not a table per layer; extract the directions again"),
    (
        "evidence",
        "{",
        "metadata cannot be read (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); "
        "extract the directions again",
    ),
]


@pytest.mark.parametrize(("key", "value", "sentence"), METADATA)
def test_metadata_that_is_not_what_the_schema_promises(path: Path, key: str, value: Any, sentence: str) -> None:
    tensors, metadata = good()
    metadata.pop(key, None)
    assert refusal_of(path, tensors, metadata if value is MISSING else metadata | {key: value}) == sentence


def test_evidence_too_deep_to_be_read_is_refused(path: Path) -> None:
    tensors, metadata = good()
    sentence = refusal_of(path, tensors, metadata | {"evidence": "[" * 100_000})
    assert sentence.startswith("metadata cannot be read (") and sentence.endswith("); extract the directions again")


def test_a_file_without_metadata_or_tensors_is_refused(path: Path) -> None:
    tensors, metadata = good()
    sentence = f"metadata has no key 'schema'; write {SCHEMA} there (docs/directions.md)"
    assert refusal_of(path, tensors, None) == sentence
    assert refusal_of(path, {}, metadata) == "holds no tensors; extract the directions again"


# --------------------------------------------------------------------------------------------- refusals of files as such


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    sentence = "no such directions file; extract one with `vlmguard directions`"
    assert refusal(tmp_path / "none.safetensors") == sentence
    assert refusal(tmp_path) == "is a folder; give a file"


def test_evidence_that_is_no_number_is_left_open(tmp_path: Path) -> None:
    """The metadata is JSON, which has no infinity."""
    found = Directions(8, {0: LayerDirections(np.eye(1, 8, dtype=np.float32))}, evidence={"0": {"auc": float("inf")}})
    path = tmp_path / "d.safetensors"
    path.write_bytes(directions_bytes(found))
    assert read_directions(path).evidence == {"0": {"auc": None}}


def broken_files() -> dict[str, Callable[[bytes], bytes]]:
    return {
        "empty": lambda content: b"",
        "seven bytes": lambda content: content[:7],
        "half a header": lambda content: content[:100],
        "half the tensors": lambda content: content[:-40],
        "one byte short": lambda content: content[:-1],
        "one byte long": lambda content: content + b"\0",
        "a picture": lambda content: b"\x89PNG\r\n\x1a\n" + content,
        "text": lambda content: b"layers: 3\n" * 20,
        "a header of 2^60 bytes": lambda content: (1 << 60).to_bytes(8, "little") + content[8:],
        "a header that is no JSON": lambda content: content[:8] + b"x" + content[9:],
    }


@pytest.mark.parametrize("damage", broken_files().values(), ids=broken_files())
def test_a_damaged_file_is_refused(path: Path, damage: Callable[[bytes], bytes]) -> None:
    path.write_bytes(damage(directions_bytes(directions())))
    sentence = refusal(path)
    assert sentence.startswith("is not a safetensors file (")
    assert sentence.endswith("); extract the directions again")


def test_a_dtype_that_numpy_does_not_have_is_refused(path: Path) -> None:
    content = directions_bytes(uncalibrated((0,), rank=1))
    header = header_of(content)
    header["layers.0.ssd"] |= {"dtype": "BF16", "shape": [2, 16]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :])
    assert "layers.0.ssd is bfloat16" in refusal(path) or "is not a safetensors file" in refusal(path)


def test_a_checkpoint_is_refused_before_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmguard.graphs.directions._LARGEST_FILE", 1000)
    path.write_bytes(directions_bytes(directions(rank=8)))
    assert refusal(path) == f"{path.stat().st_size} bytes is too large for directions; is it a checkpoint?"


@given(st.binary(max_size=300), st.integers(0, 400))
@settings(max_examples=100, deadline=None)
def test_any_damage_is_one_sentence_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, place: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    content = directions_bytes(directions(mode="restore", alpha=1.0))
    path.write_bytes(content[:place] + noise + content[place + len(noise) :])
    try:
        read_directions(path)
    except DirectionMismatch as refused:
        assert str(refused).startswith(f"{path}: ") and "\n" not in str(refused)


# ------------------------------------------------------------------------------------------------- refusals when put together


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"width": 16, "layers": {}}, "directions hold no layers; extract them again"),
        (
            {"width": -1, "layers": {0: LayerDirections(orthonormal(1))}},
            "directions have width -1; expected the decoder's hidden size",
        ),
        (
            {"width": 16, "layers": {0: LayerDirections(orthonormal(1))}, "recommended_layers": (1,)},
            "layers [1] are recommended but have no ssd",
        ),
    ],
)
def test_directions_in_memory_keep_the_same_promises(parts: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DirectionMismatch) as refused:
        Directions(**parts)
    assert str(refused.value) == sentence


# ------------------------------------------------------------------------------------------------------ from your own arrays


def test_directions_of_your_own_are_saved_and_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    one = rng.normal(size=16)
    made = Directions.from_arrays(
        {4: one, 2: {"ssd": orthonormal(2), "target": [1, 2], "readout": np.ones(16), "threshold": 0.5}},
        mode="restore",
        recommended_layers=[2],
        alpha=1.5,
        pairs=7,
        evidence={"2": {"auc": 0.9}},
        model_sha256="0" * 64,
    )
    path = made.save(tmp_path / "d.safetensors")
    found = read_directions(path)
    assert path == tmp_path / "d.safetensors" and tuple(found.layers) == (2, 4) and found.width == 16
    np.testing.assert_allclose(found.layers[4].ssd, one[None] / np.linalg.norm(one), rtol=1e-6)
    assert (found.layers[2].threshold, found.layers[2].calibrated, found.layers[4].calibrated) == (0.5, True, False)
    assert (found.mode, found.recommended_layers, found.alpha, found.pairs) == ("restore", (2,), 1.5, 7)
    assert found.evidence == {"2": {"auc": 0.9}} and found.model_sha256 == "0" * 64
    assert repr(found) == "Directions(layers 2, 4; width 16, rank 1 or 2, calibrated for restore)"
    assert repr(found.layers[2]) == "LayerDirections(rank 2, width 16, calibrated)"
    with pytest.raises(OutputRefused, match="exists already"):
        made.save(path)
    made.save(path, force=True)


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ({}, "layers is no mapping with a layer in it; give {layer number: array, ...}"),
        ([1.0], "layers is no mapping with a layer in it; give {layer number: array, ...}"),
        ({"2": np.ones(4)}, "layer '2' is no layer number; give whole numbers from 0"),
        ({2: {"target": [1.0]}}, "layer 2 has no key 'ssd', only target; add the direction"),
        (
            {2: {"ssd": np.ones(4), "bias": 1}},
            "layer 2 has a key 'bias'; the keys are ssd, origin, target, readout, threshold, text_threshold",
        ),
        ({2: np.zeros(4)}, "layers.2.ssd is all zeros, or holds NaN or infinity; give a direction"),
        (
            {2: [[1, 0], [1, 0]]},
            "layers.2.ssd is not orthonormal (off by 1.0e+00, limit 1e-04); extract the directions again",
        ),
        ({2: [1, 0], 3: [1, 0, 0]}, "layers.3.ssd has shape (1, 3), expected 1 to 64 rows of width 2"),
    ],
)
def test_arrays_that_are_no_directions_are_refused(layers: Any, sentence: str) -> None:
    with pytest.raises(DirectionMismatch) as refused:
        Directions.from_arrays(layers)
    assert str(refused.value) == sentence


def test_arrays_of_words_are_refused() -> None:
    with pytest.raises(
        DirectionMismatch, match=r"layer 2 holds something that is no array of numbers \(could not convert"
    ):
        Directions.from_arrays({2: ["a", "b"]})
