"""Pictures to patches, as LFM2-VL takes them: small pictures whole, large ones as tiles with a small copy of the whole.

A picture is resized to the multiple of a token's edge that is nearest to its own size, with `min_image_tokens` to
`max_image_tokens` tokens. Where its own size would take more than `max_pixels_tolerance` times the largest number, it is
cut into tiles of a fixed size instead, and the resized picture follows as a small copy. Every part is a list of patches,
filled up with zeros to one length.

The arithmetic is that of transformers' `Lfm2VlImageProcessor`, which needs torchvision; its resizing differs from Pillow's
by at most one grey level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...graphs.errors import GuardError
from .images_tiled import closest_grid
from .pixel_steps import HALF, STEPS, PixelSteps, count_option, edge_option, opened, patches, tiles
from .prepared_picture import PreparedPicture

LFM2_PROCESSOR = "Lfm2VlImageProcessor"
_LFM2: Mapping[str, Any] = {
    **STEPS,
    "resample": 2,
    "image_mean": HALF,
    "image_std": HALF,
    "downsample_factor": 2,
    "do_image_splitting": True,
    "min_tiles": 2,
    "max_tiles": 10,
    "use_thumbnail": True,
    "min_image_tokens": 64,
    "max_image_tokens": 256,
    "encoder_patch_size": 16,
    "tile_size": 512,
    "max_pixels_tolerance": 2.0,
    "do_pad": True,
}
_MOST_TILES = 256


@dataclass(frozen=True)
class Lfm2ImagePreprocessor:
    """The steps of a folder's image processor. Created by `open`.

    Attributes:
        patch: edge of a patch, pixels.
        merge: patches per side that become one token.
        tokens: the fewest and the most tokens of a picture that is not cut.
        tile: edge of a tile, pixels.
        tiles: the fewest and the most tiles; `(1, 1)` cuts no picture.
        has_copy: whether a small copy of the whole follows the tiles.
        tolerance: times the most tokens; a larger picture is cut.
        steps: filter of the resizing, then what is done to the numbers.
    """

    patch: int
    merge: int
    tokens: tuple[int, int]
    tile: int
    tiles: tuple[int, int]
    has_copy: bool
    tolerance: float
    steps: PixelSteps

    kind = LFM2_PROCESSOR
    keeps_count = False

    @classmethod
    def open(cls, folder: Path | str) -> Lfm2ImagePreprocessor:
        """Read the folder's image processor.

        Raises:
            ModelUnreadable: it declares none, or options that cannot be followed.
        """
        return opened(folder, LFM2_PROCESSOR, _LFM2, _from_options, frozenset({"do_image_splitting"}))

    @property
    def edge(self) -> int:
        """Pixels per side of one token."""
        return self.patch * self.merge

    @property
    def length(self) -> int:
        """Patches of every part, those that fill it up included."""
        tile = (self.tile // self.patch) ** 2 if self.tiles != (1, 1) else 0
        return max(self.tokens[1] * self.merge**2, tile)

    def prepare(self, image: Image.Image, alone: bool = True) -> PreparedPicture:
        """`pixel_values [parts, patches, numbers]`, `pixel_attention_mask [parts, patches]`, `spatial_shapes [parts, 2]`."""
        frames, grid = self._frames(image)
        shapes = np.array([(frame.height // self.patch, frame.width // self.patch) for frame in frames], np.int64)
        if shapes.prod(axis=1).max() > self.length:
            raise GuardError(
                f"the image has {image.width} x {image.height} pixels, which is too narrow to be resized to {self.tokens[1]} "
                "tokens; crop it first"
            )
        values = np.zeros((len(frames), self.length, 3 * self.patch**2), np.float32)
        mask = np.zeros(values.shape[:2], np.int64)
        for part, frame in enumerate(frames):
            cut = patches(self.steps.values(frame), self.patch)
            values[part, : len(cut)] = cut
            mask[part, : len(cut)] = 1
        arrays = {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": shapes}
        return PreparedPicture(arrays, grid, tuple(int(size) for size in shapes.prod(axis=1)), apart=True)

    def blank_image(self) -> Image.Image:
        """A white square of the smallest size that is not resized."""
        side = math.ceil(math.sqrt(self.tokens[0])) * self.edge
        return Image.new("RGB", (side, side), "white")

    def _frames(self, image: Image.Image) -> tuple[list[Image.Image], tuple[int, int] | None]:
        """The parts of a picture; rows and columns of its tiles, `None` if it is not cut."""
        height, width = self._whole_size(image.height, image.width)
        if self.tiles == (1, 1) or not self._is_large(image.height, image.width):
            return [self.steps.resized(image, height, width)], None
        rows, columns = closest_grid((image.height, image.width), (self.tile, self.tile), *self.tiles)
        filling = self.steps.resized(image, rows * self.tile, columns * self.tile)
        frames = [Image.fromarray(tile) for tile in tiles(np.asarray(filling), self.tile, self.tile)]
        if self.has_copy and len(frames) > 1:
            frames.append(self.steps.resized(image, height, width))
        # one tile is written like a picture that is not cut
        return frames, None if len(frames) == 1 else (rows, columns)

    def _whole_size(self, height: int, width: int) -> tuple[int, int]:
        """`(height, width)` of the picture that is not cut, or of the small copy."""
        edge, (least, most) = self.edge, (count * self.edge**2 for count in self.tokens)
        fitting = max(edge, round(height / edge) * edge), max(edge, round(width / edge) * edge)
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

    def _is_large(self, height: int, width: int) -> bool:
        rounded = [max(self.patch, round(side / self.edge) * self.edge) for side in (height, width)]
        return rounded[0] * rounded[1] > self.tokens[1] * self.edge**2 * self.tolerance


def _from_options(options: Mapping[str, Any]) -> Lfm2ImagePreprocessor:
    """Options with every key present, checked; raises what a malformed one raises."""
    fewest, most = (count_option(name, options[name]) for name in ("min_tiles", "max_tiles"))
    if fewest > most or most > _MOST_TILES:
        raise GuardError(f"min_tiles {fewest} and max_tiles {most} are no range of at most {_MOST_TILES} tiles")
    patch, merge = (count_option(name, options[name]) for name in ("encoder_patch_size", "downsample_factor"))
    tile = edge_option(options["tile_size"])
    if tile % (patch * merge):
        raise GuardError(f"tile_size {tile} is no multiple of a token's edge {patch * merge}")
    least, largest = (count_option(name, options[name]) for name in ("min_image_tokens", "max_image_tokens"))
    if least > largest:
        raise GuardError(f"min_image_tokens {least} is above max_image_tokens {largest}")
    return Lfm2ImagePreprocessor(
        patch=patch,
        merge=merge,
        tokens=(least, largest),
        tile=tile,
        tiles=(fewest, most) if options["do_image_splitting"] else (1, 1),
        has_copy=bool(options["use_thumbnail"]),
        tolerance=float(options["max_pixels_tolerance"]),
        steps=PixelSteps.of(options),
    )
