"""Pictures to pixel values: equal to transformers' Pillow processors, one line for everything that is not a picture."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vlmguard.graphs.errors import GuardError, ModelUnreadable
from vlmguard.runtime.images.images import ImagePreprocessor
from vlmguard.runtime.images.open_picture import open_image
from vlmguard.runtime.images.picture_files import MAX_PIXELS
from vlmguard.runtime.images.pixel_steps import PixelSteps

# `(width, height)`: the model's own, smaller, odd, one pixel, very wide, very tall, larger.
SIZES = ((28, 28), (7, 5), (29, 31), (1, 1), (97, 3), (2, 50), (6, 9), (10, 7), (120, 80))
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK")

SMALL: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
PROCESSORS = {
    "clip": lambda: CLIPImageProcessorPil(**SMALL),
    "clip, odd crop": lambda: CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 31, "width": 17}),
    "clip, square": lambda: CLIPImageProcessorPil(size={"height": 30, "width": 14}, do_center_crop=False, resample=2),
    "clip, crop only": lambda: CLIPImageProcessorPil(do_resize=False, crop_size={"height": 28, "width": 28}),
    "clip, raw": lambda: CLIPImageProcessorPil(**SMALL, do_normalize=False, resample=0),
    "clip, not rescaled": lambda: CLIPImageProcessorPil(**SMALL, do_rescale=False),
    "siglip": lambda: SiglipImageProcessorPil(size={"height": 28, "width": 28}),
    "llava": lambda: LlavaImageProcessorPil(**SMALL, do_pad=True),
    "llava, unpadded": lambda: LlavaImageProcessorPil(**SMALL),
}


def noise(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A random picture; `LA` and `RGBA` with random transparency, `P` with a transparent colour."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(values, "RGBA")
    if mode == "P":
        image = image.convert("RGB").quantize(16)
        image.info["transparency"] = 3
        return image
    return image if mode == "RGBA" else image.convert(mode)


def write(folder: Path, nested: bool = True, **declared: object) -> Path:
    """A folder with this image processor config, nested as transformers 5 writes it, or in the older file."""
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (folder / name).write_text(json.dumps({"image_processor": declared} if nested else declared))
    return folder


def refusal(call, error: type[Exception] = GuardError) -> str:
    """The one line that `call` is refused with."""
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ equal to transformers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixel_values(tmp_path: Path, name: str, mode: str) -> None:
    theirs = PROCESSORS[name]()
    ours = ImagePreprocessor.open(write(tmp_path, **theirs.to_dict()))
    images = [noise(mode, size, seed) for seed, size in enumerate(SIZES)]
    expected = np.stack([np.asarray(theirs(image)["pixel_values"][0]) for image in images])
    found = ours.pixel_values(images)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@given(width=st.integers(1, 200), height=st.integers(1, 200), edge=st.integers(1, 40), crop=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_every_size_rounds_as_transformers(width: int, height: int, edge: int, crop: int) -> None:
    theirs = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": crop, "width": 13})
    ours = ImagePreprocessor(
        kind="CLIPImageProcessor",
        pad_to_square=False,
        shortest_edge=edge,
        resize_to=None,
        crop_to=(crop, 13),
        steps=PixelSteps(Image.Resampling.BICUBIC, 1 / 255, theirs.image_mean, theirs.image_std),
    )
    image = noise("RGB", (width, height))
    expected = theirs(image)["pixel_values"][0]
    np.testing.assert_allclose(ours.pixel_values([image])[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "theirs", [CLIPImageProcessorPil(), LlavaImageProcessorPil(do_pad=True), SiglipImageProcessorPil()]
)
def test_what_a_config_leaves_out(tmp_path: Path, theirs) -> None:
    """Older configs name the processor and little else; null means the default, as in transformers."""
    kind = type(theirs).__name__.removesuffix("Pil")
    more = {"do_pad": True} if kind == "LlavaImageProcessor" else {}
    folder = write(tmp_path, image_processor_type=kind, crop_size=None, **more)
    image = noise("RGB", (300, 200))
    expected = theirs(image)["pixel_values"][0]
    np.testing.assert_allclose(ImagePreprocessor.open(folder).pixel_values([image])[0], expected, rtol=0, atol=1e-6)


def test_where_a_processor_is_found(tmp_path: Path) -> None:
    def edge() -> int | None:
        return ImagePreprocessor.open(tmp_path).shortest_edge

    # CLIP as OpenAI's repositories still declare it: old name, bare numbers.
    write(tmp_path, nested=False, feature_extractor_type="CLIPFeatureExtractor", size=30, crop_size=28)
    assert edge() == 30
    assert ImagePreprocessor.open(tmp_path).crop_to == (28, 28)
    write(tmp_path, nested=False, image_processor_type="CLIPImageProcessorFast", size={"shortest_edge": 31})
    assert edge() == 31
    (tmp_path / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
    assert edge() == 31
    write(tmp_path, image_processor_type="CLIPImageProcessorPil", size={"shortest_edge": 32})
    assert edge() == 32  # nested first, as transformers reads it


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_blank_image_is_white_and_fits(tmp_path: Path, name: str) -> None:
    theirs = PROCESSORS[name]()
    ours = ImagePreprocessor.open(write(tmp_path, **theirs.to_dict()))
    blank = ours.blank_image()
    pixels = ours.pixel_values([blank])
    assert (blank.mode, blank.getextrema()) == ("RGB", ((255, 255),) * 3)
    if ours.crop_to or ours.resize_to:
        assert pixels.shape[2:] == (blank.height, blank.width)
    if ours.crop_to != (31, 17):  # there the crop is taller than what was resized, and the border is black
        assert (pixels == pixels[:, :, :1, :1]).all()


# -------------------------------------------------------------------------------------------------------- opening files


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm"])
def test_open_image_reads_the_formats_people_send(tmp_path: Path, suffix: str) -> None:
    noise("RGB", (20, 10)).save(tmp_path / f"a.{suffix}")
    image = open_image(tmp_path / f"a.{suffix}")
    assert (image.mode, image.size) == ("RGB", (20, 10))
    assert open_image(str(tmp_path / f"a.{suffix}")) == open_image((tmp_path / f"a.{suffix}").read_bytes()) == image


def test_open_image_turns_upright_and_puts_transparency_on_white(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    noise("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (10, 20)

    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_image(image).getpixel((1, 0)) == (255, 255, 255)


def png_claiming(width: int, height: int) -> bytes:
    """A well-formed PNG header with next to nothing behind it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    written = (
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert refusal(lambda: open_image(b"not a picture")) == (
        "the image cannot be read (of no known format); save it again as PNG or JPEG"
    )
    assert refusal(lambda: open_image(path)) == (
        f"{path}: no such image file; name a BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP file"
    )
    assert refusal(lambda: open_image(tmp_path)).startswith(f"{tmp_path}: no such image file")

    def line(content: bytes) -> str:
        path.write_bytes(content)
        return refusal(lambda: open_image(path))

    for content in (b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\x89PNG\r\n\x1a\n"):
        assert line(content).startswith(f"{path}: is not an image that can be read (")
        assert line(content).endswith("); save it again as PNG or JPEG")
    assert "of no known format" in line(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # nothing is run for it
    noise("RGB", (64, 64)).save(path)
    whole = path.read_bytes()
    assert "truncated" in line(whole[: len(whole) // 2])
    # Bombs: over our limit, over the one where Pillow warns, over the one where Pillow raises.
    assert line(png_claiming(7100, 7100)) == (
        f"{path}: the image has 7100 x 7100 pixels, more than {MAX_PIXELS:,}; scale it down first"
    )
    assert "the image has 10000 x 10000 pixels" in line(png_claiming(10_000, 10_000))
    assert line(png_claiming(60_000, 60_000)) == (
        f"{path}: the image has more than {MAX_PIXELS:,} pixels; scale it down first"
    )
    late = Image.open(tmp_path / "a.png") if path.write_bytes(whole[: len(whole) // 2]) else None
    assert refusal(lambda: open_image(late)).startswith("the image cannot be read (")


@given(
    place=st.integers(0, 10_000), value=st.binary(min_size=1, max_size=4), kind=st.sampled_from(["png", "jpg", "gif"])
)
@settings(max_examples=60, deadline=None)
def test_a_damaged_file_is_a_picture_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: bytes, kind: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    noise("RGB", (12, 9)).save(path)
    content = bytearray(path.read_bytes())
    place %= len(content)
    content[place : place + len(value)] = value
    path.write_bytes(content)
    try:
        assert open_image(path).mode == "RGB"
    except GuardError as error:
        assert "\n" not in str(error)


def test_pictures_that_are_refused(tmp_path: Path) -> None:
    clip = ImagePreprocessor.open(write(tmp_path, image_processor_type="CLIPImageProcessor"))
    assert refusal(lambda: clip.pixel_values([])) == "no images to prepare; give at least one"
    assert refusal(lambda: clip.pixel_values([Image.new("RGB", (0, 4))])) == (
        "the image has 0 x 4 pixels; send a picture"
    )
    # A thread-like picture is small until its short side is scaled up to the model's.
    assert refusal(lambda: clip.pixel_values([Image.new("L", (2_000, 1))])) == (
        "resized by the model's image processor, the image has 448000 x 224 pixels, "
        f"more than {MAX_PIXELS:,}; scale it down first"
    )
    llava = ImagePreprocessor.open(write(tmp_path, image_processor_type="LlavaImageProcessor", do_pad=True))
    padded = refusal(lambda: llava.pixel_values([Image.new("L", (8_000, 1))]))
    assert "padded to a square by the model's image processor" in padded
    plain = write(tmp_path, image_processor_type="CLIPImageProcessor", do_resize=False, do_center_crop=False)
    assert refusal(lambda: ImagePreprocessor.open(plain).pixel_values([noise("L", (4, 4)), noise("L", (5, 4))])) == (
        "CLIPImageProcessor keeps image sizes, so a batch of [(3, 4, 4), (3, 4, 5)] cannot be stacked; send one by one"
    )


# ------------------------------------------------------------------------------------------------------ folders, counts


@pytest.mark.parametrize(
    "declared, line",
    [
        (
            {"image_processor_type": "CLIPImageProcessor", "do_image_splitting": True, "do_thumbnail": False},
            "CLIPImageProcessor with do_image_splitting is not supported; prepare its images elsewhere",
        ),
        (
            {"image_processor_type": "CLIPImageProcessor", "do_pad": True},
            "the options of CLIPImageProcessor cannot be followed (do_pad is known for LlavaImageProcessor only); "
            "copy the processor's config again",
        ),
        (
            {"image_processor_type": "CLIPImageProcessor", "size": {"longest_edge": 9}},
            "the options of CLIPImageProcessor cannot be followed (size {'longest_edge': 9} is neither a shortest_edge "
            "nor a height and width); copy the processor's config again",
        ),
        (
            {"image_processor_type": "CLIPImageProcessor", "crop_size": {"height": -1, "width": 9}},
            "the options of CLIPImageProcessor cannot be followed (-1 is not a length in pixels); "
            "copy the processor's config again",
        ),
        (
            {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5]},
            "the options of CLIPImageProcessor cannot be followed ([0.5] are not three numbers); "
            "copy the processor's config again",
        ),
        (
            {"image_processor_type": "CLIPImageProcessor", "image_std": 0},
            "the options of CLIPImageProcessor cannot be followed (image_std is zero); "
            "copy the processor's config again",
        ),
        (
            {"image_processor_type": "CLIPImageProcessor", "resample": 9},
            "the options of CLIPImageProcessor cannot be followed (9 is not a valid Resampling); "
            "copy the processor's config again",
        ),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_processors_that_are_refused(tmp_path: Path, nested: bool, declared: dict, line: str) -> None:
    folder = write(tmp_path, nested, **declared)
    assert refusal(lambda: ImagePreprocessor.open(folder), ModelUnreadable) == f"{folder}: {line}"


def test_a_folder_without_an_image_processor(tmp_path: Path) -> None:
    # onnxruntime-genai keeps another kind of file under this name.
    (tmp_path / "processor_config.json").write_text('{"processor": {"name": "image_processing", "transforms": []}}')
    assert refusal(lambda: ImagePreprocessor.open(tmp_path), ModelUnreadable) == (
        f"{tmp_path}: has no preprocessor_config.json; copy the image processor's config from the model"
    )
