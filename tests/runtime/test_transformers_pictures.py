"""transformers' own image processors in a confined process: the same arrays as in this one, and what is refused in one line."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from vlmguard.graphs.errors import GuardError, ModelUnreadable
from vlmguard.graphs.extras import install_command
from vlmguard.runtime import confined
from vlmguard.runtime.chat.picture_markers import LAYOUTS, Placeholder
from vlmguard.runtime.images import transformers_pictures
from vlmguard.runtime.images.transformers_pictures import TransformersPreprocessor
from vlmguard.runtime.images.vision import look, open_preprocessor, unknown_processor
from vlmguard.runtime.runner_protocol import Port

# Processor, options, and the grid of tiles of a picture of 90 x 40 pixels.
CASES: dict[str, tuple[dict[str, Any], tuple[int, int] | None]] = {
    "BlipImageProcessor": ({"size": {"height": 28, "width": 28}}, None),
    "JanusImageProcessor": ({"size": {"height": 28, "width": 28}, "min_size": 7}, None),
    "PaddleOCRVLImageProcessor": ({"size": {"shortest_edge": 784, "longest_edge": 7840}}, None),
    "Ovis2ImageProcessor": ({"size": {"height": 28, "width": 28}, "crop_to_patches": True}, (4, 2)),
    "MiniCPMV4_6ImageProcessor": ({"scale_resolution": 28, "max_slice_nums": 4}, (1, 3)),
}


def folder_with(tmp_path: Path, kind: str, processor: str | None = None, **options: Any) -> Path:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": kind, **options}))
    if processor is not None:
        (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": processor}))
    return tmp_path


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("kind", CASES)
def test_the_arrays_are_those_of_the_class(tmp_path: Path, kind: str) -> None:
    options, grid = CASES[kind]
    preprocessor = open_preprocessor(folder_with(tmp_path, f"{kind}Fast", **options))
    assert isinstance(preprocessor, TransformersPreprocessor)
    theirs = getattr(transformers, f"{kind}Pil")(**options)
    for picture in (noise(90, 40), preprocessor.blank_image()):
        prepared = preprocessor.prepare(picture)
        expected = {name: np.asarray(array) for name, array in theirs(images=[picture], return_tensors="np").items()}
        assert prepared.arrays.keys() == expected.keys() and "pixel_values" in expected
        for name, array in prepared.arrays.items():
            np.testing.assert_array_equal(array, expected[name])
    assert preprocessor.prepare(noise(90, 40)).grid == grid


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed; make families installs it")
@pytest.mark.parametrize("kind", ["Cohere2VisionImageProcessor", "Llama4ImageProcessor"])
def test_a_class_without_a_half_for_pillow_runs_with_torchvision(tmp_path: Path, kind: str) -> None:
    preprocessor = open_preprocessor(folder_with(tmp_path, kind))
    assert isinstance(preprocessor, TransformersPreprocessor) and preprocessor.half == "torchvision"
    prepared = preprocessor.prepare(noise(90, 40))
    expected = getattr(transformers, kind)()(images=[noise(90, 40)], return_tensors="pt")
    for name, array in prepared.arrays.items():
        tensor = expected[name]
        np.testing.assert_array_equal(array, tensor.float() if tensor.is_floating_point() else tensor)
    assert prepared.arrays["pixel_values"].size


def test_parts_are_counted_by_what_the_encoder_gives(tmp_path: Path) -> None:
    """MiniCPM-V: the small copy and each slice have tokens in proportion to their patches."""

    class Encoder:
        inputs = {  # noqa: RUF012
            "pixel_values": Port("pixel_values", np.dtype(np.float32), (1, 3, None, None)),
            "target_sizes": Port("target_sizes", np.dtype(np.int64), (None, 2)),
        }
        outputs: dict[str, Port] = {}  # noqa: RUF012

        def run(self, feeds: Any) -> dict[str, np.ndarray]:
            return {"image_features": np.zeros((int(feeds["target_sizes"].prod(axis=1).sum()) // 4, 8), np.float32)}

    kind = "MiniCPMV4_6ImageProcessor"
    preprocessor = open_preprocessor(folder_with(tmp_path, kind, **CASES[kind][0]))
    (tokens,) = look(Encoder(), preprocessor, [(noise(90, 40), True)], None).pictures
    assert tokens.grid == (1, 3) and len(tokens.sizes) == 4 and sum(tokens.sizes) == 4 * tokens.count
    row = LAYOUTS["MiniCPMV4_6Processor"]
    text = Placeholder("T", "T", row, {name: usual for name, (_, usual) in row.markers.items()}).text_of(tokens)
    assert text.count("T") == tokens.count and text.count("<slice>") == 3


def test_tiles_that_an_encoder_does_not_take_are_not_dropped(tmp_path: Path) -> None:
    """DeepSeek-OCR 2, exported with pictures that are not cut: a larger one has tiles besides the whole."""

    class Encoder:
        inputs = {"pixel_values": Port("pixel_values", np.dtype(np.float32), (None, 3, 64, 64))}  # noqa: RUF012
        outputs: dict[str, Port] = {}  # noqa: RUF012

        def run(self, feeds: Any) -> dict[str, np.ndarray]:
            return {"image_features": np.zeros((4, 8), np.float32)}

    options = {"size": {"height": 64, "width": 64}, "tile_size": 64}
    folder = folder_with(tmp_path, "DeepseekOcr2ImageProcessor", "DeepseekOcr2Processor", **options)
    preprocessor = open_preprocessor(folder)
    assert look(Encoder(), preprocessor, [(noise(60, 40), True)], None).features.shape == (4, 8)
    assert line(lambda: look(Encoder(), preprocessor, [(noise(90, 40), True)], None), GuardError) == (
        "the image processor also gives pixel_values_local for this picture, which the vision encoder does not take; "
        "send a smaller picture"
    )


def test_a_processors_arguments_reach_its_image_processor(tmp_path: Path) -> None:
    options = {"size": {"height": 64, "width": 64}, "tile_size": 32, "crop_to_patches": False}
    folder = folder_with(tmp_path, "DeepseekOcr2ImageProcessor", "DeepseekOcr2Processor", **options)
    arrays = open_preprocessor(folder).prepare(noise(90, 40)).arrays
    theirs = transformers.DeepseekOcr2ImageProcessorPil(**options)
    call = {"crop_to_patches": True, "min_patches": 2, "max_patches": 6}
    expected = theirs(images=[noise(90, 40)], return_tensors="np", **call)
    assert arrays["num_local_patches"] == expected["num_local_patches"] and arrays["num_local_patches"] > 1


def line(call: Any, kind: type[GuardError]) -> str:
    with pytest.raises(kind) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_processors_that_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_torchvision = {"torch": object(), "transformers": object()}
    monkeypatch.setattr(transformers_pictures, "find_spec", without_torchvision.get)
    reasons = {
        "Llama4ImageProcessor": " that works without torchvision); install torchvision, ",
        "NobodysImageProcessor": "); ",
    }
    for kind, reason in reasons.items():
        folder = folder_with(tmp_path, kind)
        assert line(lambda folder=folder: open_preprocessor(folder), ModelUnreadable) == (
            f"{tmp_path}: its image processor {kind} cannot be run here (transformers has no class of that name{reason}"
            "prepare its inputs elsewhere, or use text-only prompts"
        )
        assert unknown_processor(folder) == kind
    # one whose Pillow half needs torch, and one with options that it cannot follow
    assert "requires PyTorch" in line(
        lambda: open_preprocessor(folder_with(tmp_path, "FuyuImageProcessor")), ModelUnreadable
    )
    assert "cannot be run here (" in line(
        lambda: open_preprocessor(folder_with(tmp_path, "BlipImageProcessor", size="large")), ModelUnreadable
    )

    folder = folder_with(tmp_path, "BlipImageProcessor")
    assert unknown_processor(folder) is None
    monkeypatch.setattr(transformers_pictures, "find_spec", lambda name: None)
    assert line(lambda: open_preprocessor(folder), ModelUnreadable) == (
        f"{tmp_path}: its image processor BlipImageProcessor runs with transformers, which is not installed; run "
        f"`{install_command('images')}`, or use text-only prompts"
    )
    assert unknown_processor(folder) == "BlipImageProcessor"


def test_options_of_a_folder_cannot_take_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that is to become a tebibyte ends the confined process alone."""
    folder = folder_with(tmp_path, "BlipImageProcessor", size={"height": 300_000, "width": 300_000})
    preprocessor = open_preprocessor(folder)
    refused = line(lambda: preprocessor.prepare(noise(4, 4)), GuardError)
    assert refused.startswith(
        f"{tmp_path}: its image processor BlipImageProcessor cannot take the image (it needs more than"
    )
    assert confined.TRANSFORMERS.memory == 8 << 30
