"""The steps that image processors share: resize, rescale, normalise, and the options that a folder declares for them.

The arithmetic, its order and its dtypes are those of transformers' Pillow processors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from ...graphs.errors import GuardError, ModelUnreadable, first_line
from ...graphs.json_files import read_json
from .picture_files import refuse_huge

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5,) * 3  # ImageNet's "standard" mean and deviation
# Steps that a config may switch on; colours are always converted to RGB, because the models have three channels.
KNOWN_STEPS = frozenset({"do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad"})
LONGEST_EDGE = 4_096  # pixels; no vision encoder takes more

# Options that every processor has, with CLIP's values.
STEPS: Mapping[str, Any] = {
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}

Made = TypeVar("Made")


@dataclass(frozen=True)
class PixelSteps:
    """Resize, rescale, normalise.

    Attributes:
        resample: Pillow's filter.
        rescale_factor: multiply by it, usually 1/255; `None` does not.
        mean, std: then `(x - mean) / std` per channel; `None` does not.
    """

    resample: Image.Resampling
    rescale_factor: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> PixelSteps:
        """From options with every key of `STEPS`; raises what a malformed one raises."""
        mean, std = channels(options["image_mean"]), channels(options["image_std"])
        if not all(std):
            raise GuardError("image_std is zero")
        return cls(
            resample=Image.Resampling(options["resample"]),
            rescale_factor=float(options["rescale_factor"]) if options["do_rescale"] else None,
            mean=mean if options["do_normalize"] else None,
            std=std if options["do_normalize"] else None,
        )

    def resized(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """The picture in another size; GuardError for a huge one."""
        refuse_huge(width, height, "resized by the model's image processor, the image")
        return image if image.size == (width, height) else image.resize((width, height), resample=self.resample)

    def values(self, pixels: np.ndarray | Image.Image) -> np.ndarray:
        """`[height, width, 3]` uint8 to `[3, height, width]` float32."""
        return normalised(np.asarray(pixels), self.rescale_factor, self.mean, self.std)


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


def tiles(pixels: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """`[rows * height, columns * width, ...]` cut into tiles, in reading order."""
    rows, columns = pixels.shape[0] // height, pixels.shape[1] // width
    return [
        pixels[row * height : (row + 1) * height, column * width : (column + 1) * width]
        for row in range(rows)
        for column in range(columns)
    ]


def patches(pixels: np.ndarray, edge: int) -> np.ndarray:
    """`[3, height, width]` -> `[patches, edge * edge * 3]`, patches in reading order, channels innermost."""
    depth, height, width = pixels.shape
    cut = pixels.reshape(depth, height // edge, edge, width // edge, edge).transpose(1, 3, 2, 4, 0)
    return np.ascontiguousarray(cut.reshape(-1, edge * edge * depth))


# What a folder declares


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


def opened(
    folder: Path | str,
    kind: str,
    defaults: Mapping[str, Any],
    make: Callable[[Mapping[str, Any]], Made],
    steps: frozenset[str] = frozenset(),
) -> Made:
    """The processor that `make` builds from the folder's options, completed with `defaults`.

    Args:
        folder: the model.
        kind: the processor's name, for errors.
        defaults: transformers' default of every option.
        make: raises an error for a malformed option.
        steps: steps that `make` supports besides `KNOWN_STEPS`.

    Raises:
        ModelUnreadable: the folder declares none, or options that cannot be followed.
    """
    declared = declared_processor(Path(folder))
    known = KNOWN_STEPS | steps
    unknown = sorted(key for key in declared if key.startswith("do_") and key not in known and declared[key])
    if unknown:  # a step left out would give other pixels than the model was trained on
        raise ModelUnreadable(
            f"{folder}: {kind} with {', '.join(unknown)} is not supported; prepare its images elsewhere"
        )
    # A null in a config means the default, as in transformers.
    options = {**defaults, **{key: value for key, value in declared.items() if value is not None}}
    try:
        return make(options)
    except (GuardError, TypeError, ValueError, KeyError) as error:
        raise ModelUnreadable(
            f"{folder}: the options of {kind} cannot be followed ({first_line(error)}); copy the processor's config again"
        ) from None


def size_option(size: Any, square: bool = True) -> tuple[int | None, tuple[int, int] | None]:
    """`(shortest_edge, (height, width))`, one of them `None`; a bare number is a square, or else a shortest edge."""
    if isinstance(size, int):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    if set(size) == {"shortest_edge"}:
        return edge_option(size["shortest_edge"]), None
    if set(size) == {"height", "width"}:
        return None, (edge_option(size["height"]), edge_option(size["width"]))
    raise GuardError(f"size {size} is neither a shortest_edge nor a height and width")


def fixed_size(name: str, size: Any) -> tuple[int, int]:
    """Height and width of an option that must have both."""
    shortest, fixed = size_option(size)
    if fixed is None:
        raise GuardError(f"{name} {{'shortest_edge': {shortest}}} has no height and width")
    return fixed


def edge_option(length: Any) -> int:
    """A length in pixels."""
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= LONGEST_EDGE:
        raise GuardError(f"{length!r} is not a length in pixels")
    return length


def count_option(name: str, number: Any) -> int:
    """A positive whole number."""
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise GuardError(f"{name} {number!r} is not a positive whole number")
    return number


def channels(values: Any) -> tuple[float, ...]:
    """Three numbers; a single one stands for all."""
    numbers = tuple(float(value) for value in (values if isinstance(values, list | tuple) else [values] * 3))
    if len(numbers) != 3 or not np.isfinite(numbers).all():
        raise GuardError(f"{values} are not three numbers")
    return numbers
