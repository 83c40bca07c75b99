"""Pictures to patches: transformers' own `Qwen2VLImageProcessor`, on random pictures and configs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import Glm4vImageProcessorPil, Glm46VImageProcessorPil, Qwen2VLImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize as smart_resize_glm
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vlmguard.graphs.errors import GuardError, ModelUnreadable
from vlmguard.runtime.chat.picture_layouts import PictureTokens
from vlmguard.runtime.images.images_qwen import QwenImagePreprocessor, fitting_size, fitting_size_of_frames
from vlmguard.runtime.images.vision import look, open_preprocessor

SIZES = [(28, 28), (30, 500), (500, 30), (1, 1), (57, 41), (13, 1999), (900, 700)]
CONFIGS: list[dict[str, Any]] = [
    {},
    {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "min_pixels": 65536, "max_pixels": 300000},
    {"min_pixels": 3136, "max_pixels": 50000, "merge_size": 1},
    {"temporal_patch_size": 1, "resample": 2, "do_normalize": False, "size": {"shortest_edge": 1, "longest_edge": 99999}},
    {"do_rescale": False, "max_pixels": None},
]  # fmt: skip


def folder_with(tmp_path: Path, nested: bool = False, **config: Any) -> Path:
    declared = {"image_processor_type": "Qwen2VLImageProcessor", **config}
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps({"image_processor": declared} if nested else declared))
    return tmp_path


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(height * 7 + width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_transformers_gives_the_same(tmp_path: Path, config: dict[str, Any], nested: bool) -> None:
    folder = folder_with(tmp_path, nested, **config)
    pictures = [picture(*size) for size in SIZES[: 4 if nested else None]]
    if config.get("merge_size") == 1:
        pictures = pictures[:3]
    found = QwenImagePreprocessor.open(folder).patches(pictures)
    given = {key: value for key, value in config.items() if value is not None}
    expected = Qwen2VLImageProcessorPil(**given)(images=pictures, return_tensors="np")
    np.testing.assert_array_equal(found.image_grid_thw, expected["image_grid_thw"])
    np.testing.assert_allclose(found.pixel_values, expected["pixel_values"], rtol=0, atol=1e-6)
    assert found.pixel_values.dtype == np.float32 and found.image_grid_thw.dtype == np.int64
    assert found.tokens.sum() * found.merge**2 == len(found.pixel_values)


def test_sizes_are_those_of_smart_resize() -> None:
    random = np.random.default_rng(0)
    for _ in range(2000):
        height, width = (int(n) for n in np.exp(random.uniform(0, 8, 2)))
        edge = int(random.choice([8, 28, 32]))
        least = int(random.choice([1, 56 * 56, 65536]))
        most = least * int(random.choice([2, 50, 5000]))
        if max(height, width) / min(height, width) <= 200:
            assert fitting_size(height, width, edge, least, most) == smart_resize(height, width, edge, least, most)


@pytest.mark.parametrize("theirs", [Glm4vImageProcessorPil, Glm46VImageProcessorPil])
@pytest.mark.parametrize(
    "config", [{}, {"size": {"shortest_edge": 112 * 112, "longest_edge": 90000}, "patch_size": 16}]
)
def test_glm_is_of_the_same_kind(tmp_path: Path, theirs: Any, config: dict[str, Any]) -> None:
    kind = theirs.__name__.removesuffix("Pil")
    preprocessor = open_preprocessor(folder_with(tmp_path, image_processor_type=kind, **config))
    for size in SIZES:
        prepared = preprocessor.prepare(picture(*size))
        expected = theirs(**config)(images=[picture(*size)], return_tensors="np")
        np.testing.assert_array_equal(prepared.arrays["image_grid_thw"], expected["image_grid_thw"])
        np.testing.assert_allclose(prepared.arrays["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-6)
    blank = preprocessor.blank_image()
    (grid,) = preprocessor.prepare(blank).arrays["image_grid_thw"]
    patch = config.get("patch_size", 14)
    assert (grid[2] * patch, grid[1] * patch) == blank.size


def test_sizes_are_those_of_glm() -> None:
    random = np.random.default_rng(0)
    for _ in range(1000):
        height, width = (int(n) for n in np.exp(random.uniform(0, 8, 2)))
        edge, frames = int(random.choice([8, 28, 32])), int(random.choice([1, 2, 4]))
        least = int(random.choice([1, 112 * 112]))
        most = least * int(random.choice([2, 50, 5000]))
        try:
            expected = smart_resize_glm(frames, height, width, frames, edge, least, most)
        except ValueError:
            continue
        assert fitting_size_of_frames(height, width, edge, least, most, frames) == expected


def test_pictures_that_are_not_rgb(tmp_path: Path) -> None:
    preprocessor = QwenImagePreprocessor.open(folder_with(tmp_path))
    for mode in ("L", "RGBA", "P"):
        found = preprocessor.patches([picture(60, 60, mode)])
        expected = preprocessor.patches([picture(60, 60, mode).convert("RGB")])
        np.testing.assert_array_equal(found.pixel_values, expected.pixel_values)


def test_a_blank_image_is_seen_as_it_is(tmp_path: Path) -> None:
    for config in CONFIGS[:3]:
        preprocessor = QwenImagePreprocessor.open(folder_with(tmp_path, **config))
        blank = preprocessor.blank_image()
        (grid,) = preprocessor.patches([blank]).image_grid_thw
        assert (grid[2] * preprocessor.patch, grid[1] * preprocessor.patch) == blank.size
        assert np.asarray(blank).min() == 255
    kept = QwenImagePreprocessor.open(folder_with(tmp_path, do_resize=False))
    assert kept.blank_image().size == (28, 28)


def refusal(kind: type[GuardError], call: Any) -> str:
    with pytest.raises(kind) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_pictures_that_are_refused(tmp_path: Path) -> None:
    preprocessor = QwenImagePreprocessor.open(folder_with(tmp_path))
    assert refusal(GuardError, lambda: preprocessor.patches([])) == "no images to prepare; give at least one"
    assert refusal(GuardError, lambda: preprocessor.patches([picture(2, 402)])) == (
        "the image has 402 x 2 pixels, one side more than 200 times the other; crop it first"
    )
    kept = QwenImagePreprocessor.open(folder_with(tmp_path, do_resize=False))
    assert refusal(GuardError, lambda: kept.patches([picture(28, 30)])) == (
        "the image has 30 x 28 pixels and the model does not resize; send sides that are multiples of 28"
    )
    (tmp_path / "huge").mkdir()
    huge = folder_with(tmp_path / "huge", size={"shortest_edge": 10**9, "longest_edge": 10**9})
    assert refusal(GuardError, lambda: QwenImagePreprocessor.open(huge).patches([picture(28, 28)])).startswith(
        "resized by the model's image processor, the image has 31640 x 31640 pixels"
    )


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"patch_size": 0}, "patch_size 0 is not a positive whole number"),
        ({"merge_size": "2"}, "merge_size '2' is not a positive whole number"),
        ({"size": {"height": 2, "width": 3}}, "min_pixels None is not a positive whole number"),
        ({"min_pixels": 9, "max_pixels": 8}, "the least number of pixels 9 is above the most 8"),
        (
            {"image_std": [1, 1, 0]},
            "image_mean (0.48145466, 0.4578275, 0.40821073) and image_std (1.0, 1.0, 0.0) are not three numbers each, "
            "with no deviation of 0",
        ),
    ],
)
def test_options_that_are_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    folder = folder_with(tmp_path, **config)
    assert refusal(ModelUnreadable, lambda: QwenImagePreprocessor.open(folder)) == (
        f"{folder}: the options of Qwen2VLImageProcessor cannot be followed ({reason}); "
        "copy the processor's config again"
    )


# The vision encoder around it


class Encoder:
    """A vision encoder with these inputs that gives `features` rows; 0: one for each square of four patches."""

    def __init__(self, names: tuple[str, ...], features: int) -> None:
        from vlmguard.runtime.runner_protocol import Port

        dtypes = {"image_grid_thw": np.dtype(np.int64)}
        self.inputs = {name: Port(name, dtypes.get(name, np.dtype(np.float16)), (None, None)) for name in names}
        self.outputs: dict[str, Any] = {}
        self.features, self.calls = features, 0

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert {name: array.dtype for name, array in feeds.items()} == {n: p.dtype for n, p in self.inputs.items()}
        self.calls += 1
        rows = self.features or int(feeds["image_grid_thw"].prod()) // 4
        return {"image_features": np.zeros((rows, 4), np.float16)}


QWEN_INPUTS = ("pixel_values", "image_grid_thw")


def test_features_are_told_apart_by_picture(tmp_path: Path) -> None:
    preprocessor = open_preprocessor(folder_with(tmp_path))
    pictures = [(picture(56, 56), True), (picture(56, 112), True)]
    encoder = Encoder(QWEN_INPUTS, 0)
    seen = look(encoder, preprocessor, [*pictures, pictures[0]], "qwen2_vl")
    assert seen.pictures == (PictureTokens(4), PictureTokens(8), PictureTokens(4)) and len(seen.features) == 16
    assert seen.grids is not None and seen.grids.tolist() == [[1, 4, 4], [1, 4, 8], [1, 4, 4]] and seen.merge == 2
    assert encoder.calls == 2  # the picture that comes again is looked at once


def test_encoder_and_image_processor_must_belong_together(tmp_path: Path) -> None:
    def line(encoder: Encoder) -> str:
        return refusal(GuardError, lambda: look(encoder, preprocessor, [(picture(56, 56), True)], None))

    preprocessor = open_preprocessor(folder_with(tmp_path))
    assert line(Encoder((*QWEN_INPUTS, "spatial_shapes"), 4)) == (
        "the vision encoder takes pixel_values, image_grid_thw, spatial_shapes, the folder's image processor gives "
        "pixel_values, image_grid_thw; copy the image processor's config that belongs to this model"
    )
    assert line(Encoder(QWEN_INPUTS, 5)) == (
        "the vision encoder gives 5 features for 4 image tokens; the image processor's config is not this model's, copy the "
        "one that belongs to it"
    )
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    preprocessor = open_preprocessor(tmp_path)
    assert line(Encoder(QWEN_INPUTS, 5)) == (
        "the vision encoder takes pixel_values of 2 axes, the folder's image processor gives [1, 3, 224, 224]; "
        "copy the image processor's config that belongs to this model"
    )
