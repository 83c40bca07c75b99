"""Pictures to tiles whose grid has nearly the picture's shape, and a small copy of the whole: InternVL and Aya Vision.

1. `closest_grid`   the grid of `min_patches` to `max_patches` tiles whose shape is nearest to the picture's
2. resize the picture to fill it, cut it into tiles; behind them, where there are several, the whole picture as one tile

The arithmetic, its order and its dtypes are those of transformers' `GotOcr2ImageProcessorPil`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...graphs.errors import GuardError
from ...graphs.json_files import read_json
from .pixel_steps import STEPS, PixelSteps, count_option, declared_processor, fixed_size, opened, processor_name, tiles
from .prepared_picture import PreparedPicture

TILED_PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "GotOcr2ImageProcessor": {
        **STEPS,
        "size": {"height": 384, "width": 384},
        "crop_to_patches": False,
        "min_patches": 1,
        "max_patches": 12,
    }
}
# These processors have their pictures cut, whatever the image processor's own config has.
_ALWAYS_CUT = frozenset({"InternVLProcessor", "AyaVisionProcessor", "QianfanOCRProcessor"})
_MOST_TILES = 256


@dataclass(frozen=True)
class TiledImagePreprocessor:
    """The steps of a folder's image processor. Created by `open`.

    Attributes:
        kind: the processor's name, a key of `TILED_PROCESSORS`.
        tile: height and width of a tile, pixels.
        fewest, most: tiles of a picture; `most` 1 cuts none.
        steps: filter of the resizing, then what is done to the numbers.
    """

    kind: str
    tile: tuple[int, int]
    fewest: int
    most: int
    steps: PixelSteps

    @classmethod
    def open(cls, folder: Path | str) -> TiledImagePreprocessor:
        """Read the folder's image processor, one of `TILED_PROCESSORS`.

        Raises:
            ModelUnreadable: it declares none, or options that cannot be followed.
        """
        kind = processor_name(declared_processor(Path(folder)))
        cut = read_json(Path(folder) / "processor_config.json").get("processor_class") in _ALWAYS_CUT
        forced = {"crop_to_patches": True} if cut else {}
        return opened(folder, kind, TILED_PROCESSORS[kind], lambda options: _from_options(kind, {**options, **forced}))

    @property
    def keeps_count(self) -> bool:
        return self.most == 1

    def prepare(self, image: Image.Image, alone: bool = True) -> PreparedPicture:
        """`pixel_values [tiles, 3, height, width]`."""
        height, width = self.tile
        rows, columns = (
            (1, 1) if self.most == 1 else closest_grid((image.height, image.width), self.tile, self.fewest, self.most)
        )
        filling = self.steps.resized(image, rows * height, columns * width)
        frames = tiles(np.asarray(filling), height, width)
        if len(frames) > 1:
            frames.append(np.asarray(self.steps.resized(image, height, width)))
        values = np.stack([self.steps.values(frame) for frame in frames])
        grid = None if len(frames) == 1 else (rows, columns)
        return PreparedPicture({"pixel_values": values}, grid, (1,) * len(frames))

    def blank_image(self) -> Image.Image:
        """A white picture of the fewest tiles, in one row."""
        height, width = self.tile
        # the ratio of a picture's sides decides how many tiles lie side by side, whatever the shape of a tile
        return Image.new("RGB", (width, height) if self.most == 1 else (height * self.fewest, height), "white")


def closest_grid(size: tuple[int, int], tile: tuple[int, int], fewest: int, most: int) -> tuple[int, int]:
    """Rows and columns of tiles.

    The ratio of the sides decides. Of grids with the same ratio a larger one wins while the picture has more than half of its
    pixels.

    Args:
        size: height and width of the picture.
        tile: height and width of a tile.
        fewest, most: tiles.
    """
    height, width = size
    ratio, area = width / height, width * height
    nearest, best = float("inf"), (1, 1)
    for rows, columns in _grids(fewest, most):
        away = abs(ratio - columns / rows)
        if away < nearest or (away == nearest and area > 0.5 * tile[0] * tile[1] * rows * columns):
            nearest, best = away, (rows, columns)
    return best


@lru_cache(maxsize=16)
def _grids(fewest: int, most: int) -> list[tuple[int, int]]:
    """Rows and columns of every grid, by their number of tiles, narrow ones first."""
    grids = [
        (rows, columns)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if fewest <= rows * columns <= most
    ]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


def _from_options(kind: str, options: Mapping[str, Any]) -> TiledImagePreprocessor:
    """Options with every key present, checked; raises what a malformed one raises."""
    fewest, most = (count_option(name, options[name]) for name in ("min_patches", "max_patches"))
    if fewest > most or most > _MOST_TILES:
        raise GuardError(f"min_patches {fewest} and max_patches {most} are no range of at most {_MOST_TILES} tiles")
    if not options["do_resize"] and not options["crop_to_patches"]:
        raise GuardError("do_resize false keeps a size that no tower of tiles takes")
    return TiledImagePreprocessor(
        kind=kind,
        tile=fixed_size("size", options["size"]),
        fewest=fewest if options["crop_to_patches"] else 1,
        most=most if options["crop_to_patches"] else 1,
        steps=PixelSteps.of(options),
    )
