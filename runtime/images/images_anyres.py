"""Pictures to a small copy and the tiles of one of several resolutions: LLaVA-OneVision and LLaVA-NeXT.

1. `best_resolution`   the one of `image_grid_pinpoints` that keeps most of the picture and wastes least
2. resize the picture to fit into it, fill it up with black bars, cut it into tiles; before them the whole picture as one tile

Where a prompt has several pictures, LLaVA-OneVision cuts none of them: each is padded to a square and is one tile.

The arithmetic, its order and its dtypes are those of transformers' `LlavaOnevisionImageProcessorPil` and
`LlavaNextImageProcessorPil`.
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
from .images import padded_to_square
from .pixel_steps import (
    STEPS,
    PixelSteps,
    declared_processor,
    edge_option,
    opened,
    processor_name,
    size_option,
    tiles,
)
from .prepared_picture import PreparedPicture

_SIDES = (384, 768, 1152, 1536, 1920, 2304)
ANYRES_PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "LlavaOnevisionImageProcessor": {
        **STEPS,
        "size": {"height": 384, "width": 384},
        "image_grid_pinpoints": [[height, width] for height in _SIDES for width in _SIDES],
        "do_center_crop": False,
        "crop_size": None,
        "do_pad": True,
    },
    "LlavaNextImageProcessor": {
        **STEPS,
        "size": {"shortest_edge": 224},
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_pad": True,
    },
}
_WHOLE_IF_SEVERAL = frozenset({"LlavaOnevisionImageProcessor"})
_MOST_RESOLUTIONS = 256


@dataclass(frozen=True)
class AnyresImagePreprocessor:
    """The steps of a folder's image processor. Created by `open`.

    Attributes:
        kind: the processor's name, a key of `ANYRES_PROCESSORS`.
        tile: edge of a tile, pixels.
        resolutions: heights and widths, multiples of a tile's edge.
        steps: filter of the resizing, then what is done to the numbers.
        mean: of the options, for the bars of a square; 0 to 1.
    """

    kind: str
    tile: int
    resolutions: tuple[tuple[int, int], ...]
    steps: PixelSteps
    mean: tuple[float, ...]

    keeps_count = False

    @classmethod
    def open(cls, folder: Path | str) -> AnyresImagePreprocessor:
        """Read the folder's image processor, one of `ANYRES_PROCESSORS`.

        Raises:
            ModelUnreadable: it declares none, or options that cannot be followed.
        """
        kind = processor_name(declared_processor(Path(folder)))
        return opened(folder, kind, ANYRES_PROCESSORS[kind], lambda options: _from_options(kind, options))

    def prepare(self, image: Image.Image, alone: bool = True) -> PreparedPicture:
        """`pixel_values [1, tiles, 3, edge, edge]`, the small copy first, and `image_sizes [1, 2]`, the picture's own."""
        size = np.array([[image.height, image.width]], np.int64)
        if not alone and self.kind in _WHOLE_IF_SEVERAL:
            square = self.steps.resized(padded_to_square(image, self.mean), self.tile, self.tile)
            return PreparedPicture({"pixel_values": self.steps.values(square)[None, None], "image_sizes": size})
        height, width = best_resolution((image.height, image.width), self.resolutions)
        filled = self._fitted(image, height, width)
        frames = [np.asarray(self.steps.resized(image, self.tile, self.tile)), *tiles(filled, self.tile, self.tile)]
        values = np.stack([self.steps.values(frame) for frame in frames])[None]
        grid = height // self.tile, width // self.tile
        return PreparedPicture({"pixel_values": values, "image_sizes": size}, grid, (1,) * len(frames))

    def blank_image(self) -> Image.Image:
        """A white picture of the smallest resolution, which needs no bars."""
        height, width = min(self.resolutions, key=math.prod)
        return Image.new("RGB", (width, height), "white")

    def _fitted(self, image: Image.Image, height: int, width: int) -> np.ndarray:
        """The picture as large as fits, in the middle of a black one, `[height, width, 3]` uint8."""
        across, down = width / image.width, height / image.height
        if across < down:
            size = min(math.ceil(image.height * across), height), width
        else:
            size = height, min(math.ceil(image.width * down), width)
        fitted = np.asarray(self.steps.resized(image, *size))
        filled = np.zeros((height, width, 3), fitted.dtype)
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        filled[top : top + size[0], left : left + size[1]] = fitted
        return filled


def best_resolution(size: Sequence[int], resolutions: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The resolution, height and width, that keeps most pixels of a picture of `size` and wastes least; the first of equals."""
    tall, wide = (int(length) for length in size)

    def kept_and_wasted(resolution: Sequence[int]) -> tuple[int, int]:
        scale = min(resolution[1] / wide, resolution[0] / tall)
        kept = min(int(wide * scale) * int(tall * scale), wide * tall)
        return kept, kept - resolution[0] * resolution[1]

    height, width = max(resolutions, key=kept_and_wasted)
    return int(height), int(width)


def _from_options(kind: str, options: Mapping[str, Any]) -> AnyresImagePreprocessor:
    """Options with every key present, checked; raises what a malformed one raises."""
    shortest, fixed = size_option(options["size"], square=False)
    tile = shortest if fixed is None else fixed[0]
    assert tile is not None
    if fixed is not None and fixed[0] != fixed[1]:
        raise GuardError(f"size {fixed} is no square")
    crop = options["crop_size"] if options["do_center_crop"] else None
    if crop is not None and size_option(crop) != (None, (tile, tile)):
        raise GuardError(f"crop_size {crop} is not the tile's {tile} x {tile}")
    if not options["do_resize"]:
        raise GuardError("do_resize false keeps a size that no tower of tiles takes")
    resolutions = tuple((edge_option(height), edge_option(width)) for height, width in options["image_grid_pinpoints"])
    if not 1 <= len(resolutions) <= _MOST_RESOLUTIONS or any(side % tile for pair in resolutions for side in pair):
        raise GuardError(f"image_grid_pinpoints are no resolutions in tiles of {tile} pixels")
    steps = PixelSteps.of(options)
    return AnyresImagePreprocessor(kind, tile, resolutions, steps, tuple(map(float, options["image_mean"])))
