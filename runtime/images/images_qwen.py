"""Pictures to patches, as Qwen2-VL, Qwen2.5-VL and Qwen3-VL take them: any size, cut into a list of patches.

1. `fitting_size`            the multiple of a token's edge nearest to the picture's own size, within limits on its pixels
2. `QwenImagePreprocessor`   resize to it, rescale, normalise, cut into patches

A picture gives `height / patch * width / patch` patches; a square of `merge` x `merge` of them becomes one token, and they
come square by square, so that a token's patches lie side by side. Each patch holds the picture `temporal` times, because
the tower was made for videos and takes that many frames at once.

The arithmetic, its order and its dtypes are those of transformers' `Qwen2VLImageProcessorPil`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...graphs.errors import GuardError, ModelUnreadable, first_line
from .images import CLIP_MEAN, CLIP_STD, declared_processor, normalised
from .open_picture import open_image
from .picture_files import refuse_huge

KIND = "Qwen2VLImageProcessor"

# What transformers' processor does where a config is silent. `size` counts pixels, in spite of its keys' names.
_DEFAULTS: Mapping[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
# A longer or narrower picture has sides that no multiple of a token's edge comes near.
_MAX_ASPECT = 200


@dataclass(frozen=True)
class Patches:
    """Pictures, ready for the vision encoder.

    Attributes:
        pixel_values: the patches of all pictures in a row, `[patches, channels * temporal * patch * patch]` float32.
        image_grid_thw: patches over time, height and width of each picture, `[images, 3]` int64.
        merge: patches per side that become one token.
    """

    pixel_values: np.ndarray
    image_grid_thw: np.ndarray
    merge: int

    @property
    def tokens(self) -> np.ndarray:
        """How many tokens each picture takes in the prompt, `[images]` int64."""
        return self.image_grid_thw.prod(axis=1) // self.merge**2


@dataclass(frozen=True)
class QwenImagePreprocessor:
    """The steps of a folder's image processor, in this order. Created by `open`.

    Attributes:
        patch, temporal, merge: edge of a patch in pixels; frames per patch; patches per side of a token.
        pixels: smallest and largest number of pixels of a resized picture; `None`: keep the size.
        resample: Pillow's filter for resizing.
        rescale_factor: multiply, usually by 1/255; `None`: do not scale.
        mean, std: compute `(x - mean) / std` per channel; `None`: do not normalise.
    """

    patch: int
    temporal: int
    merge: int
    pixels: tuple[int, int] | None
    resample: Image.Resampling
    rescale_factor: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @classmethod
    def open(cls, folder: Path | str) -> QwenImagePreprocessor:
        """Read the folder's image processor.

        Raises:
            ModelUnreadable: it declares none, or options that cannot be followed.
        """
        declared = declared_processor(Path(folder))
        given = {key: value for key, value in declared.items() if value is not None}
        try:
            return _from_options({**_DEFAULTS, **given})
        except (GuardError, TypeError, ValueError, KeyError) as error:
            raise ModelUnreadable(
                f"{folder}: the options of {KIND} cannot be followed ({first_line(error)}); copy the processor's config again"
            ) from None

    @property
    def edge(self) -> int:
        """Pixels per side of one token."""
        return self.patch * self.merge

    def patches(self, images: Sequence[Image.Image | Path | str]) -> Patches:
        """The patches of all pictures.

        Raises:
            GuardError: as `open_image`; or no images, or one whose sides the tower cannot take.
        """
        if not images:
            raise GuardError("no images to prepare; give at least one")
        rows = [self._prepare(open_image(image)) for image in images]
        grids = [(1, pixels.shape[1] // self.patch, pixels.shape[2] // self.patch) for pixels in rows]
        values = np.concatenate([self._patchify(pixels) for pixels in rows])
        return Patches(values, np.array(grids, np.int64), self.merge)

    def blank_image(self) -> Image.Image:
        """A white square of the smallest size that is not resized."""
        tokens = 1 if self.pixels is None else math.ceil(math.sqrt(self.pixels[0]) / self.edge)
        return Image.new("RGB", (tokens * self.edge, tokens * self.edge), "white")

    def _prepare(self, image: Image.Image) -> np.ndarray:
        """`[3, height, width]` float32 of an RGB picture."""
        if self.pixels is not None:
            height, width = fitting_size(image.height, image.width, self.edge, *self.pixels)
            refuse_huge(width, height, "resized by the model's image processor, the image")
            image = image.resize((width, height), resample=self.resample)
        elif image.width % self.edge or image.height % self.edge:
            raise GuardError(
                f"the image has {image.width} x {image.height} pixels and the model does not resize; "
                f"send sides that are multiples of {self.edge}"
            )
        return normalised(np.asarray(image), self.rescale_factor, self.mean, self.std)

    def _patchify(self, pixels: np.ndarray) -> np.ndarray:
        """`[3, height, width]` -> `[patches, 3 * temporal * patch * patch]`, the patches of a token side by side."""
        channels, height, width = pixels.shape
        tokens_high, tokens_wide = height // self.edge, width // self.edge
        cut = pixels.reshape(channels, tokens_high, self.merge, self.patch, tokens_wide, self.merge, self.patch)
        cut = cut.transpose(1, 4, 2, 5, 0, 3, 6)  # token row, token column, row in it, column in it, channel, y, x
        frames = np.broadcast_to(cut[:, :, :, :, :, None], (*cut.shape[:5], self.temporal, *cut.shape[5:]))
        return frames.reshape(tokens_high * tokens_wide * self.merge**2, -1)


def fitting_size(height: int, width: int, edge: int, least: int, most: int) -> tuple[int, int]:
    """`smart_resize` of transformers.

    Args:
        height, width: of the picture, pixels.
        edge: both sides become multiples of it.
        least, most: smallest and largest number of pixels of the result.

    Returns:
        `(height, width)` of the resized picture.

    Raises:
        GuardError: one side is more than 200 times the other.
    """
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise GuardError(
            f"the image has {width} x {height} pixels, one side more than {_MAX_ASPECT} times the other; crop it first"
        )
    fitting = round(height / edge) * edge, round(width / edge) * edge
    if fitting[0] * fitting[1] > most:
        shrink = math.sqrt(height * width / most)
        return (
            max(edge, math.floor(height / shrink / edge) * edge),
            max(edge, math.floor(width / shrink / edge) * edge),
        )
    if fitting[0] * fitting[1] < least:
        grow = math.sqrt(least / (height * width))
        return math.ceil(height * grow / edge) * edge, math.ceil(width * grow / edge) * edge
    return fitting


def _from_options(options: Mapping[str, Any]) -> QwenImagePreprocessor:
    """Options with every key present, checked; raises what a malformed one raises."""
    size = dict(options["size"])
    # Older files name the limits for what they are.
    least = _count("min_pixels", options.get("min_pixels", size.get("shortest_edge")))
    most = _count("max_pixels", options.get("max_pixels", size.get("longest_edge")))
    if least > most:
        raise GuardError(f"the least number of pixels {least} is above the most {most}")
    mean, std = (tuple(float(number) for number in options[key]) for key in ("image_mean", "image_std"))
    if len(mean) != 3 or len(std) != 3 or not np.isfinite((*mean, *std)).all() or not all(std):
        raise GuardError(f"image_mean {mean} and image_std {std} are not three numbers each, with no deviation of 0")
    return QwenImagePreprocessor(
        patch=_count("patch_size", options["patch_size"]),
        temporal=_count("temporal_patch_size", options["temporal_patch_size"]),
        merge=_count("merge_size", options["merge_size"]),
        pixels=(least, most) if options["do_resize"] else None,
        resample=Image.Resampling(options["resample"]),
        rescale_factor=float(options["rescale_factor"]) if options["do_rescale"] else None,
        mean=mean if options["do_normalize"] else None,
        std=std if options["do_normalize"] else None,
    )


def _count(name: str, number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise GuardError(f"{name} {number!r} is not a positive whole number")
    return number
