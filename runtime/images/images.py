"""Pictures to `pixel_values`, from the files of a model folder: numpy and Pillow only.

1. `open_image`               a file or a Pillow image -> RGB, hostile files refused in one line
2. `ImagePreprocessor.open`   the image processor that a folder declares (preprocessor_config.json, or "image_processor"
                              inside processor_config.json, as transformers 5 writes it)
3. `ImagePreprocessor.pixel_values`  pad to square, resize, centre crop, rescale, normalise: CLIP, SigLIP, LLaVA
4. `image_token_count`        how many tokens one image takes in the prompt

The arithmetic, its order and its dtypes are those of transformers' Pillow processors (`CLIPImageProcessorPil`, ...).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...graphs.errors import GuardError, ModelUnreadable, first_line
from ...graphs.json_files import read_json
from .open_picture import open_image
from .picture_files import refuse_huge

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# What transformers' processors do where a config is silent. A new family of processors is a new row.
_CLIP: Mapping[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "do_pad": False,
}
_SIGLIP: Mapping[str, Any] = _CLIP | {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": (0.5,) * 3,
    "image_std": (0.5,) * 3,
}
PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "CLIPImageProcessor": _CLIP,
    # Pan and scan, further crops of the same picture, is off unless a folder declares it, and then refused.
    "Gemma3ImageProcessor": _SIGLIP | {"resample": 2},
    "LlavaImageProcessor": _CLIP,  # `do_pad` means: to a square, with the mean colour, before resizing
    "SiglipImageProcessor": _SIGLIP,
}
PADS_TO_SQUARE = frozenset({"LlavaImageProcessor"})
# Processors with more outputs than `pixel_values`; each has its own module, which `vision` chooses.
ELSEWHERE = ("Qwen2VLImageProcessor",)

# Extra features that a vision tower puts before its patches (a class token), by `model_type`.
CLASS_TOKENS: Mapping[str, int] = {"clip_vision_model": 1, "siglip_vision_model": 0}


# -------------------------------------------------------------------------------------------------------- the processor


@dataclass(frozen=True)
class ImagePreprocessor:
    """The steps of a folder's image processor, in this order. Created by `open`.

    Attributes:
        kind: the processor's name, a key of `PROCESSORS`.
        pad_to_square: pad with the mean colour to a square.
        shortest_edge: resize the shorter side to this many pixels, or
        resize_to: resize to `(height, width)` pixels; both `None`: keep the size.
        resample: Pillow's filter for resizing.
        crop_to: crop the centre to `(height, width)` pixels, padding with black; `None`: do not crop.
        rescale_factor: multiply, usually by 1/255; `None`: do not scale.
        mean, std: compute `(x - mean) / std` per channel; `None`: do not normalise.
    """

    kind: str
    pad_to_square: bool
    shortest_edge: int | None
    resize_to: tuple[int, int] | None
    resample: Image.Resampling
    crop_to: tuple[int, int] | None
    rescale_factor: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @classmethod
    def open(cls, folder: Path | str) -> ImagePreprocessor:
        """Read the folder's image processor.

        Raises:
            ModelUnreadable: it declares none, one that is not in `PROCESSORS`, or options that cannot be followed.
        """
        folder = Path(folder)
        declared = declared_processor(folder)
        kind = _kind(folder, declared)
        unknown = sorted(key for key in declared if key.startswith("do_") and key not in _KNOWN_STEPS and declared[key])
        if unknown:  # a step left out would give other pixels than the model was trained on
            raise ModelUnreadable(
                f"{folder}: {kind} with {', '.join(unknown)} is not supported; prepare its images elsewhere"
            )
        # A null in a config means the default, as in transformers.
        options = {**PROCESSORS[kind], **{key: value for key, value in declared.items() if value is not None}}
        try:
            return _from_options(kind, options)
        except (GuardError, TypeError, ValueError, KeyError) as error:
            raise ModelUnreadable(
                f"{folder}: the options of {kind} cannot be followed ({first_line(error)}); copy the processor's config again"
            ) from None

    def pixel_values(self, images: Sequence[Image.Image | Path | str]) -> np.ndarray:
        """`[batch, 3, height, width]` float32, one row per image.

        Raises:
            GuardError: as `open_image`; or no images, or images that come out in different sizes.
        """
        if not images:
            raise GuardError("no images to prepare; give at least one")
        rows = [self._prepare(open_image(image)) for image in images]
        shapes = sorted({row.shape for row in rows})
        if len(shapes) > 1:
            raise GuardError(
                f"{self.kind} keeps image sizes, so a batch of {shapes} cannot be stacked; send one by one"
            )
        return np.stack(rows)

    def blank_image(self) -> Image.Image:
        """A white picture of the size that the model sees, so that nothing is resized or cropped."""
        height, width = self.crop_to or self.resize_to or (self.shortest_edge or 224,) * 2
        return Image.new("RGB", (width, height), "white")

    def _prepare(self, image: Image.Image) -> np.ndarray:
        """`[3, height, width]` float32 of an RGB picture."""
        if self.pad_to_square:
            image = _pad_to_square(image, self.mean)
        target = self._resized_size(image)
        if target is not None:
            refuse_huge(target[1], target[0], "resized by the model's image processor, the image")
            image = image.resize((target[1], target[0]), resample=self.resample)
        pixels = np.asarray(image)
        if self.crop_to is not None:
            pixels = _center_crop(pixels, *self.crop_to)
        return normalised(pixels, self.rescale_factor, self.mean, self.std)

    def _resized_size(self, image: Image.Image) -> tuple[int, int] | None:
        """`(height, width)` after resizing; the longer side is rounded down, as in transformers and torchvision."""
        if self.shortest_edge is None:
            return self.resize_to
        short, long = sorted(image.size)
        edges = self.shortest_edge, int(self.shortest_edge * long / short)
        return edges if image.height <= image.width else (edges[1], edges[0])


_KNOWN_STEPS = frozenset(
    {"do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad"}
)  # colours are always converted to RGB: the model has three channels


def declared_processor(folder: Path) -> Mapping[str, Any]:
    """The nested config first, as transformers reads it."""
    nested = read_json(folder / "processor_config.json").get("image_processor")
    declared = nested if isinstance(nested, dict) else read_json(folder / "preprocessor_config.json")
    if not declared:
        raise ModelUnreadable(
            f"{folder}: has no preprocessor_config.json; copy the image processor's config from the model"
        )
    return declared


def processor_name(declared: Mapping[str, Any]) -> str:
    """The processor's name; `CLIPImageProcessorFast`, `...Pil` and `CLIPFeatureExtractor` are names of one processor."""
    name = str(declared.get("image_processor_type") or declared.get("feature_extractor_type") or "nothing")
    return name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")


def _kind(folder: Path, declared: Mapping[str, Any]) -> str:
    """The row of `PROCESSORS`."""
    kind = processor_name(declared)
    if kind not in PROCESSORS:
        name = declared.get("image_processor_type") or declared.get("feature_extractor_type") or "nothing"
        raise ModelUnreadable(
            f"{folder}: its image processor is {name}, supported are {', '.join(sorted({*PROCESSORS, *ELSEWHERE}))}; "
            "prepare pixel_values elsewhere, or use text-only prompts"
        )
    return kind


def _from_options(kind: str, options: Mapping[str, Any]) -> ImagePreprocessor:
    """Options with every key present, checked; raises what a malformed one raises."""
    if options["do_pad"] and kind not in PADS_TO_SQUARE:
        raise GuardError(f"do_pad is known for {', '.join(sorted(PADS_TO_SQUARE))} only")
    shortest_edge, resize_to = _size(options["size"], square=False) if options["do_resize"] else (None, None)
    crop_edge, crop_to = _size(options["crop_size"], square=True) if options["do_center_crop"] else (None, None)
    if crop_edge is not None:
        raise GuardError("crop_size must have height and width")
    mean, std = _channels(options["image_mean"]), _channels(options["image_std"])
    if not all(std):
        raise GuardError("image_std is zero")
    return ImagePreprocessor(
        kind=kind,
        pad_to_square=bool(options["do_pad"]),
        shortest_edge=shortest_edge,
        resize_to=resize_to,
        resample=Image.Resampling(options["resample"]),
        crop_to=crop_to,
        rescale_factor=float(options["rescale_factor"]) if options["do_rescale"] else None,
        mean=mean if options["do_normalize"] else None,
        std=std if options["do_normalize"] else None,
    )


def _size(size: Any, square: bool) -> tuple[int | None, tuple[int, int] | None]:
    """`(shortest_edge, (height, width))`, one of them `None`; a bare number is a square, or else a shortest edge."""
    if isinstance(size, int):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    if set(size) == {"shortest_edge"}:
        return _edge(size["shortest_edge"]), None
    if set(size) == {"height", "width"}:
        return None, (_edge(size["height"]), _edge(size["width"]))
    raise GuardError(f"size {size} is neither a shortest_edge nor a height and width")


def _edge(length: Any) -> int:
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= 4_096:
        raise GuardError(f"{length!r} is not a length in pixels")
    return length


def _channels(values: Any) -> tuple[float, ...]:
    """Three numbers; a single one stands for all."""
    channels = tuple(float(value) for value in (values if isinstance(values, list | tuple) else [values] * 3))
    if len(channels) != 3 or not np.isfinite(channels).all():
        raise GuardError(f"{values} are not three numbers")
    return channels


def normalised(
    pixels: np.ndarray, factor: float | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> np.ndarray:
    """Scale and normalise pixels, with float64 and float32 arithmetic in the order of transformers, for the same rounding.

    Args:
        pixels: `[height, width, 3]` uint8.
        factor: multiplied with the pixels, usually 1/255; `None` for none.
        mean, std: per channel, of the scaled pixels; `None` for none.

    Returns:
        `[3, height, width]` float32.
    """
    values = (pixels.astype(np.float64) * (1.0 if factor is None else factor)).astype(np.float32)
    if mean is not None and std is not None:
        values = (values - np.array(mean, np.float32)) / np.array(std, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _pad_to_square(image: Image.Image, mean: tuple[float, ...] | None) -> Image.Image:
    """The picture in the middle of a square as wide as its longer side, on the mean colour."""
    edge = max(image.size)
    if image.size == (edge, edge):
        return image
    refuse_huge(edge, edge, "padded to a square by the model's image processor, the image")
    red, green, blue = (int(channel * 255) for channel in mean or (0.0, 0.0, 0.0))
    square = Image.new("RGB", (edge, edge), (red, green, blue))
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return square


def _center_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """`[height, width, 3]` from the middle of `pixels`; black where the picture is smaller than that."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    inside = pixels[max(top, 0) : top + height, max(left, 0) : left + width]
    if inside.shape[:2] == (height, width):
        return inside
    cropped = np.zeros((height, width, 3), pixels.dtype)
    cropped[max(-top, 0) :, max(-left, 0) :][: inside.shape[0], : inside.shape[1]] = inside
    return cropped


# --------------------------------------------------------------------------------------------------------- image tokens


def image_token_count(folder: Path | str, pixel_values: np.ndarray) -> int:
    """Number of tokens of one image in the prompt, as `LlavaProcessor` counts them.

    It is the number of whole patches, plus the vision tower's class token, minus the first feature where the strategy is
    `default`. Values missing in processor_config.json (in older LLaVA folders) come from the model's config.json.

    Args:
        folder: the model.
        pixel_values: `[batch, 3, height, width]`.

    Raises:
        ModelUnreadable: neither file has a required value, or the values give no valid count.
    """
    folder = Path(folder)
    processor, model = read_json(folder / "processor_config.json"), read_json(folder / "config.json")
    vision = model.get("vision_config")
    vision = vision if isinstance(vision, dict) else {}
    strategy = "vision_feature_select_strategy"
    facts = {
        "patch_size": _first(processor.get("patch_size"), vision.get("patch_size")),
        strategy: _first(processor.get(strategy), model.get(strategy)),
        "num_additional_image_tokens": _first(
            processor.get("num_additional_image_tokens"), CLASS_TOKENS.get(str(vision.get("model_type")))
        ),
    }
    missing = sorted(fact for fact, value in facts.items() if value is None)
    if missing:
        raise ModelUnreadable(
            f"{folder}: neither processor_config.json nor config.json contains {', '.join(missing)}; "
            "copy both configs of the model into this folder"
        )
    whole = all(isinstance(facts[fact], int) for fact in ("patch_size", "num_additional_image_tokens"))
    if not whole or facts["patch_size"] < 1 or facts[strategy] not in ("default", "full"):
        raise ModelUnreadable(
            f"{folder}: image tokens cannot be counted from {facts}; copy both configs of the model again"
        )
    height, width = pixel_values.shape[-2:]
    patches = (height // facts["patch_size"]) * (width // facts["patch_size"])
    return patches + facts["num_additional_image_tokens"] - (facts[strategy] == "default")


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
