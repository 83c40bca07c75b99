"""Pictures to patches, as Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5 and GLM-4V take them: any size, cut into a list of patches.

1. `fitting_size`            the multiple of a token's edge nearest to the picture's own size, within limits on its pixels
2. `QwenImagePreprocessor`   resize to it, rescale, normalise, cut into patches

A picture gives `height / patch * width / patch` patches; a square of `merge` x `merge` of them becomes one token, and they
come square by square, so that a token's patches lie side by side. Each patch holds the picture `temporal` times, because
the tower was made for videos and takes that many frames at once.

The arithmetic, its order and its dtypes are those of transformers' `Qwen2VLImageProcessorPil` and `Glm4vImageProcessorPil`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...graphs.errors import GuardError
from .open_picture import open_image
from .pixel_steps import STEPS, PixelSteps, count_option, declared_processor, opened, processor_name
from .prepared_picture import PreparedPicture

# What transformers' processors do where a config is silent. `size` counts pixels, in spite of its keys' names.
_QWEN: Mapping[str, Any] = {
    **STEPS,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
_GLM: Mapping[str, Any] = _QWEN | {"size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000}}
QWEN_PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "Qwen2VLImageProcessor": _QWEN,
    "Glm4vImageProcessor": _GLM,
    "Glm46VImageProcessor": _GLM,
}
# GLM counts the pixels of every frame against the limits, and scales a picture up that is narrower than a token.
_COUNTS_FRAMES = frozenset({"Glm4vImageProcessor", "Glm46VImageProcessor"})
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
        """Number of tokens of each picture in the prompt, `[images]` int64."""
        return self.image_grid_thw.prod(axis=1) // self.merge**2


@dataclass(frozen=True)
class QwenImagePreprocessor:
    """The steps of a folder's image processor, in this order. Created by `open`.

    Attributes:
        kind: the processor's name, a key of `QWEN_PROCESSORS`.
        patch, temporal, merge: edge of a patch in pixels; frames per patch; patches per side of a token.
        pixels: smallest and largest number of pixels of a resized picture; `None`: keep the size.
        steps: filter of the resizing, then scale and normalisation of the pixels.
    """

    kind: str
    patch: int
    temporal: int
    merge: int
    pixels: tuple[int, int] | None
    steps: PixelSteps

    keeps_count = False

    @classmethod
    def open(cls, folder: Path | str) -> QwenImagePreprocessor:
        """Read the folder's image processor, one of `QWEN_PROCESSORS`.

        Raises:
            ModelUnreadable: it declares none, or options that cannot be followed.
        """
        kind = processor_name(declared_processor(Path(folder)))
        return opened(folder, kind, QWEN_PROCESSORS[kind], lambda options: _from_options(kind, options))

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
        rows = [self._prepared(open_image(image)) for image in images]
        grids = [(1, pixels.shape[1] // self.patch, pixels.shape[2] // self.patch) for pixels in rows]
        values = np.concatenate([self._patchify(pixels) for pixels in rows])
        return Patches(values, np.array(grids, np.int64), self.merge)

    def prepare(self, image: Image.Image, alone: bool = True) -> PreparedPicture:
        """`pixel_values [patches, numbers]` and `image_grid_thw [1, 3]`."""
        found = self.patches([image])
        arrays = {"pixel_values": found.pixel_values, "image_grid_thw": found.image_grid_thw}
        return PreparedPicture(arrays, tokens=int(found.tokens[0]))

    def blank_image(self) -> Image.Image:
        """A white square of the smallest size that is not resized."""
        least = 1 if self.pixels is None else self.pixels[0] / (self.temporal if self.kind in _COUNTS_FRAMES else 1)
        tokens = max(1, math.ceil(math.sqrt(least) / self.edge))
        return Image.new("RGB", (tokens * self.edge, tokens * self.edge), "white")

    def _prepared(self, image: Image.Image) -> np.ndarray:
        """`[3, height, width]` float32 of an RGB picture."""
        if self.pixels is not None:
            sides = image.height, image.width, self.edge, *self.pixels
            by_frames = self.kind in _COUNTS_FRAMES
            height, width = fitting_size_of_frames(*sides, self.temporal) if by_frames else fitting_size(*sides)
            image = self.steps.resized(image, height, width)
        elif image.width % self.edge or image.height % self.edge:
            raise GuardError(
                f"the image has {image.width} x {image.height} pixels and the model does not resize; "
                f"send sides that are multiples of {self.edge}"
            )
        return self.steps.values(image)

    def _patchify(self, pixels: np.ndarray) -> np.ndarray:
        """`[3, height, width]` -> `[patches, 3 * temporal * patch * patch]`, the patches of a token side by side."""
        channels, height, width = pixels.shape
        tokens_high, tokens_wide = height // self.edge, width // self.edge
        cut = pixels.reshape(channels, tokens_high, self.merge, self.patch, tokens_wide, self.merge, self.patch)
        cut = cut.transpose(1, 4, 2, 5, 0, 3, 6)  # token row, token column, row in it, column in it, channel, y, x
        frames = np.broadcast_to(cut[:, :, :, :, :, None], (*cut.shape[:5], self.temporal, *cut.shape[5:]))
        return frames.reshape(tokens_high * tokens_wide * self.merge**2, -1)


def fitting_size(height: int, width: int, edge: int, least: int, most: int) -> tuple[int, int]:
    """`smart_resize` of Qwen2-VL.

    Args:
        height, width: of the picture, pixels.
        edge: both sides become multiples of it.
        least, most: smallest and largest number of pixels of the result.

    Returns:
        `(height, width)` of the resized picture.

    Raises:
        GuardError: one side is more than 200 times the other.
    """
    return _fitting(height, width, edge, least, most, frames=1)


def fitting_size_of_frames(height: int, width: int, edge: int, least: int, most: int, frames: int) -> tuple[int, int]:
    """`smart_resize` of GLM-4V: no side is shorter than `edge`.

    Args:
        height, width, edge: as for `fitting_size`.
        least, most: smallest and largest number of pixels of all frames.
        frames: number of frames.

    Raises:
        GuardError: one side is more than 200 times the other.
    """
    if height < edge or width < edge:
        scale = max(edge / height, edge / width)
        height, width = int(height * scale), int(width * scale)
    return _fitting(height, width, edge, least, most, frames)


def _fitting(height: int, width: int, edge: int, least: int, most: int, frames: int) -> tuple[int, int]:
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise GuardError(
            f"the image has {width} x {height} pixels, one side more than {_MAX_ASPECT} times the other; crop it first"
        )
    fitting = round(height / edge) * edge, round(width / edge) * edge
    if frames * fitting[0] * fitting[1] > most:
        shrink = math.sqrt(frames * height * width / most)
        return (
            max(edge, math.floor(height / shrink / edge) * edge),
            max(edge, math.floor(width / shrink / edge) * edge),
        )
    if frames * fitting[0] * fitting[1] < least:
        grow = math.sqrt(least / (frames * height * width))
        return math.ceil(height * grow / edge) * edge, math.ceil(width * grow / edge) * edge
    return fitting


def _from_options(kind: str, options: Mapping[str, Any]) -> QwenImagePreprocessor:
    """Options with every key present, checked; raises what a malformed one raises."""
    size = dict(options["size"])
    # Older files name the limits for what they are.
    least = count_option("min_pixels", options.get("min_pixels", size.get("shortest_edge")))
    most = count_option("max_pixels", options.get("max_pixels", size.get("longest_edge")))
    if least > most:
        raise GuardError(f"the least number of pixels {least} is above the most {most}")
    mean, std = (tuple(float(number) for number in options[key]) for key in ("image_mean", "image_std"))
    if len(mean) != 3 or len(std) != 3 or not np.isfinite((*mean, *std)).all() or not all(std):
        raise GuardError(f"image_mean {mean} and image_std {std} are not three numbers each, with no deviation of 0")
    return QwenImagePreprocessor(
        kind=kind,
        patch=count_option("patch_size", options["patch_size"]),
        temporal=count_option("temporal_patch_size", options["temporal_patch_size"]),
        merge=count_option("merge_size", options["merge_size"]),
        pixels=(least, most) if options["do_resize"] else None,
        steps=PixelSteps.of(options),
    )
