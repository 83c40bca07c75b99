"""Pictures that are cut, or keep their shape: equal to transformers' Pillow processors; LFM2-VL to the source of its class."""

from __future__ import annotations

import ast
import json
import math
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from vlmguard.graphs.errors import GuardError, ModelUnreadable
from vlmguard.runtime.images.images_lfm2 import Lfm2ImagePreprocessor
from vlmguard.runtime.images.prepared_picture import Preprocessor
from vlmguard.runtime.images.vision import OWN, open_preprocessor

# `(width, height)`: smaller than a tile, a tile, larger, odd, very wide, very tall.
SIZES = ((28, 28), (7, 5), (1, 1), (97, 31), (31, 97), (120, 80), (90, 200), (199, 61), (300, 7), (64, 64))
TILES = [[high * 28, wide * 28] for high in (1, 2, 3) for wide in (1, 2, 3)]
SQUARE = {"size": {"height": 28, "width": 28}}
# Processor and its options.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "idefics3": (
        "Idefics3ImageProcessor",
        {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 28}},
    ),
    "idefics3, as published": ("Idefics3ImageProcessor", {}),
    "smolvlm": (
        "SmolVLMImageProcessor",
        {"size": {"longest_edge": 90}, "max_image_size": {"longest_edge": 28}, "image_mean": [0.1, 0.2, 0.3]},
    ),
    "smolvlm, not cut": (
        "SmolVLMImageProcessor",
        {"do_image_splitting": False, "size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 28}},
    ),
    "internvl": ("GotOcr2ImageProcessor", {**SQUARE, "crop_to_patches": True}),
    "internvl, few tiles": (
        "GotOcr2ImageProcessor",
        {"size": {"height": 20, "width": 32}, "crop_to_patches": True, "min_patches": 2, "max_patches": 5},
    ),
    "got_ocr2, not cut": ("GotOcr2ImageProcessor", SQUARE),
    "llava_onevision": ("LlavaOnevisionImageProcessor", {**SQUARE, "image_grid_pinpoints": TILES}),
    "llava_onevision, as published": ("LlavaOnevisionImageProcessor", {}),
    "llava_next": (
        "LlavaNextImageProcessor",
        {
            "size": {"shortest_edge": 28},
            "crop_size": {"height": 28, "width": 28},
            "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
        },
    ),
    "gemma4": ("Gemma4ImageProcessor", {"max_soft_tokens": 70, "patch_size": 4}),
    "gemma4, as published": ("Gemma4ImageProcessor", {}),
    "pixtral": ("PixtralImageProcessor", {"size": {"longest_edge": 96}, "patch_size": {"height": 8, "width": 8}}),
    "pixtral, as published": ("PixtralImageProcessor", {}),
}


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A random picture with soft edges, so that every filter matters."""
    small = np.random.default_rng(seed).integers(0, 256, (max(size[1] // 3, 1), max(size[0] // 3, 1), 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def write(folder: Path, **declared: Any) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(declared))
    return folder


def case(tmp_path: Path, name: str) -> tuple[Preprocessor, Any]:
    """Ours and transformers'."""
    kind, options = CASES[name]
    ours = open_preprocessor(write(tmp_path, image_processor_type=kind, **options))
    return ours, getattr(transformers, f"{kind}Pil")(**options)


def refusal(call: Any, kind: type[GuardError]) -> str:
    with pytest.raises(kind) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", CASES)
def test_transformers_gives_the_same(tmp_path: Path, name: str) -> None:
    ours, theirs = case(tmp_path, name)
    assert type(ours).__module__.startswith("vlmguard.runtime.images.images") and OWN[ours.kind]
    more = {"return_row_col_info": True} if ours.kind in ("Idefics3ImageProcessor", "SmolVLMImageProcessor") else {}
    compared = 0
    for seed, size in enumerate(SIZES if "published" not in name else SIZES[3:6]):
        picture = noise(size, seed)
        expected = theirs(images=[picture], return_tensors="np", **more)
        prepared = ours.prepare(picture)
        for key, array in prepared.arrays.items():
            assert array.shape == expected[key].shape and array.dtype.kind == expected[key].dtype.kind, (size, key)
            np.testing.assert_allclose(array, expected[key], rtol=0, atol=1e-6, err_msg=f"{size} {key}")
            compared += array.size
        assert set(expected) - set(prepared.arrays) <= {"num_patches", "batch_num_images", "rows", "cols"}
        if "rows" in expected:
            cut = (int(np.ravel(expected["rows"])[0]), int(np.ravel(expected["cols"])[0]))
            assert prepared.grid == (None if cut == (0, 0) else cut)
        if prepared.grid is not None and ours.kind in ("GotOcr2ImageProcessor", "SmolVLMImageProcessor"):
            assert len(prepared.sizes) == prepared.grid[0] * prepared.grid[1] + 1
        if ours.kind == "Gemma4ImageProcessor":
            assert prepared.tokens == expected["num_soft_tokens_per_image"][0]
        if ours.kind == "PixtralImageProcessor":
            assert prepared.seen_size == tuple(expected["image_sizes"][0])
    assert compared > 1000


def test_several_pictures_of_a_prompt_are_not_cut_by_llava_onevision(tmp_path: Path) -> None:
    ours, theirs = case(tmp_path, "llava_onevision")
    pictures = [noise(size) for size in SIZES]
    expected = theirs(images=[pictures], return_tensors="np")
    found = [ours.prepare(picture, alone=False) for picture in pictures]
    values = np.concatenate([prepared.arrays["pixel_values"] for prepared in found])
    np.testing.assert_allclose(values, expected["pixel_values"], rtol=0, atol=1e-6)
    assert all(prepared.grid is None for prepared in found)


@pytest.mark.parametrize("name", CASES)
def test_a_blank_image_is_white(tmp_path: Path, name: str) -> None:
    ours, _ = case(tmp_path, name)
    blank = ours.blank_image()
    assert (blank.mode, blank.getextrema()) == ("RGB", ((255, 255),) * 3)
    arrays = ours.prepare(blank).arrays
    values = arrays["pixel_values"]
    if ours.kind == "Gemma4ImageProcessor":
        assert (values[arrays["image_position_ids"][..., 0] >= 0] == 1).all()
    else:
        assert (values == values[..., :1, :1]).all() and np.ptp(values[..., 0, 0, 0]) == 0


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("gemma4", "pixtral"))])
def test_no_picture_is_cut_into_fewer_parts_than_the_blank_one(tmp_path: Path, name: str) -> None:
    ours, _ = case(tmp_path, name)

    def parts(picture: Image.Image) -> int:
        return math.prod(ours.prepare(picture).arrays["pixel_values"].shape[:-3])

    assert parts(ours.blank_image()) <= min(parts(noise(size)) for size in (*SIZES, (400, 100), (100, 400)))


@pytest.mark.parametrize("longest", [20, 28, 84, 90, 97, 112, 1456])
@pytest.mark.parametrize("tile", [14, 27, 28, 364])
def test_the_blank_picture_of_idefics3_is_one_row_of_tiles(tmp_path: Path, longest: int, tile: int) -> None:
    sizes = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": tile}}
    ours = open_preprocessor(write(tmp_path, image_processor_type="SmolVLMImageProcessor", **sizes))
    grid = ours.prepare(ours.blank_image()).grid
    across = math.ceil(min(longest, 4096) / tile)
    assert grid == (None if across == 1 else (1, across))


def test_internvl_cuts_whatever_its_image_processor_declares(tmp_path: Path) -> None:
    write(tmp_path, image_processor_type="GotOcr2ImageProcessorFast", crop_to_patches=False, **SQUARE)
    assert len(open_preprocessor(tmp_path).prepare(noise((90, 28))).arrays["pixel_values"]) == 1
    (tmp_path / "processor_config.json").write_text('{"processor_class": "InternVLProcessor"}')
    assert len(open_preprocessor(tmp_path).prepare(noise((90, 28))).arrays["pixel_values"]) == 4


def test_pixtral_takes_its_processors_patches(tmp_path: Path) -> None:
    """`PixtralProcessor` hands patch size times merge size to the image processor, whatever that declares."""
    write(tmp_path, image_processor_type="PixtralImageProcessor", patch_size=16)
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2})
    )
    assert open_preprocessor(tmp_path).prepare(noise((100, 60))).seen_size == (84, 112)


@pytest.mark.parametrize(
    "declared, reason",
    [
        (
            {"image_processor_type": "Idefics3ImageProcessor", "size": {"height": 5, "width": 5}},
            "size {'height': 5, 'width': 5} is no longest_edge",
        ),
        (
            {"image_processor_type": "GotOcr2ImageProcessor", "min_patches": 9, "max_patches": 3},
            "min_patches 9 and max_patches 3 are no range of at most 256 tiles",
        ),
        (
            {"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": [[384, 500]]},
            "image_grid_pinpoints are no resolutions in tiles of 384 pixels",
        ),
        ({"image_processor_type": "Gemma4ImageProcessor", "max_soft_tokens": 9999}, "max_soft_tokens 9999 is more than 1120"),
        ({"image_processor_type": "Lfm2VlImageProcessor", "tile_size": 50}, "tile_size 50 is no multiple of a token's edge 32"),
        ({"image_processor_type": "PixtralImageProcessor", "patch_size": 0}, "0 is not a length in pixels"),
    ],
)  # fmt: skip
def test_options_that_are_refused(tmp_path: Path, declared: dict[str, Any], reason: str) -> None:
    kind = declared["image_processor_type"]
    assert refusal(lambda: open_preprocessor(write(tmp_path, **declared)), ModelUnreadable) == (
        f"{tmp_path}: the options of {kind} cannot be followed ({reason}); copy the processor's config again"
    )


# LFM2-VL: transformers' class needs torchvision, so its rules come from its source, and its resizing from torch

LFM2 = {"encoder_patch_size": 4, "tile_size": 32, "min_image_tokens": 4, "max_image_tokens": 16}


@pytest.fixture(scope="module")
def lfm2_rules() -> SimpleNamespace:
    """The functions of `Lfm2VlImageProcessor` that need neither torch nor torchvision, from the file itself."""
    path = Path(transformers.__file__).parent / "models/lfm2_vl/image_processing_lfm2_vl.py"
    module = ast.parse(path.read_text(encoding="utf-8"))
    (cls,) = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "Lfm2VlImageProcessor")
    wanted = {"round_by_factor", "find_closest_aspect_ratio", "_target_ratios", "smart_resize", "_is_image_too_large"}
    functions: list[ast.stmt] = [
        node for node in (*module.body, *cls.body) if isinstance(node, ast.FunctionDef) and node.name in wanted
    ]
    assert len(functions) == len(wanted)
    names: dict[str, Any] = {"math": math, "lru_cache": lru_cache}
    exec(compile(ast.Module(functions, []), str(path), "exec"), names)
    return SimpleNamespace(**names)


def test_lfm2_sizes_and_grids_are_its_classs(lfm2_rules: SimpleNamespace, tmp_path: Path) -> None:
    ours = open_preprocessor(write(tmp_path, image_processor_type="Lfm2VlImageProcessor", **LFM2))
    assert isinstance(ours, Lfm2ImagePreprocessor)
    random = np.random.default_rng(0)
    cut = 0
    for _ in range(300):
        height, width = (int(n) for n in np.exp(random.uniform(0, 6, 2)))
        sizes = {"height": height, "width": width, "encoder_patch_size": 4, "downsample_factor": 2}
        wide, high = lfm2_rules.smart_resize(None, **sizes, min_image_tokens=4, max_image_tokens=16)
        large = lfm2_rules._is_image_too_large(None, **sizes, max_image_tokens=16, max_pixels_tolerance=2.0)
        picture = Image.new("RGB", (width, height))
        if high * wide > 16 * 8 * 8:  # more patches than a part has room for
            assert "too narrow" in refusal(lambda picture=picture: ours.prepare(picture), GuardError)
            continue
        prepared = ours.prepare(picture)
        shapes = prepared.arrays["spatial_shapes"].tolist()
        assert shapes[-1] == [high // 4, wide // 4]
        assert (prepared.grid is not None) == large
        if large:
            ratios = lfm2_rules._target_ratios(None, 2, 10)
            columns, rows = lfm2_rules.find_closest_aspect_ratio(width / height, ratios, width, height, 32)
            assert prepared.grid == (rows, columns)
            assert shapes[:-1] == [[8, 8]] * (rows * columns)
            cut += 1
        assert prepared.sizes == tuple(high * wide for high, wide in shapes)
    assert 50 < cut < 250


@pytest.mark.parametrize("size", [(60, 33), (20, 20), (150, 90), (17, 200)])
def test_lfm2_pixels_are_torchs_to_one_grey_level(size: tuple[int, int], tmp_path: Path) -> None:
    options = {"image_processor_type": "Lfm2VlImageProcessor", "do_normalize": False, "do_rescale": False, **LFM2}
    prepared = open_preprocessor(write(tmp_path, **options)).prepare(noise(size))
    pixels = torch.from_numpy(np.array(noise(size))).permute(2, 0, 1)[None]
    rows, columns = prepared.grid or (0, 0)
    parts = []
    if prepared.grid:
        whole = _resized(pixels, rows * 32, columns * 32)
        parts = [whole[:, y : y + 32, x : x + 32] for y in range(0, rows * 32, 32) for x in range(0, columns * 32, 32)]
    high, wide = prepared.arrays["spatial_shapes"][-1]
    parts.append(_resized(pixels, high * 4, wide * 4))
    assert len(parts) == len(prepared.arrays["pixel_values"])
    for part, values, mask, shape in zip(
        parts,
        *(prepared.arrays[name] for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")),
        strict=True,
    ):
        high, wide = shape
        expected = part.reshape(3, high, 4, wide, 4).transpose(1, 3, 2, 4, 0).reshape(high * wide, -1)
        assert np.abs(values[mask == 1] - expected).max() <= 1
        assert mask.sum() == high * wide and not values[mask == 0].any()


def _resized(pixels: torch.Tensor, height: int, width: int) -> np.ndarray:
    """As torchvision resizes uint8: torch's own antialiased filter."""
    size = (int(height), int(width))
    return torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)[0].float().numpy()
