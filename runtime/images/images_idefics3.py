"""Pictures to tiles and a small copy of the whole, as Idefics3 and SmolVLM take them.

1. resize so that the longer side is `size.longest_edge`
2. resize to multiples of a tile's edge (`max_image_size.longest_edge`), cut into tiles
3. behind the tiles the whole picture, resized to one tile; a picture of one tile is that tile alone

The arithmetic, its order and its dtypes are those of transformers' `Idefics3ImageProcessorPil` and `SmolVLMImageProcessorPil`.
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
from .pixel_steps import HALF, STEPS, PixelSteps, declared_processor, edge_option, opened, processor_name, tiles
from .prepared_picture import PreparedPicture

_IDEFICS3: Mapping[str, Any] = {
    **STEPS,
    "resample": 1,
    "image_mean": HALF,
    "image_std": HALF,
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "do_image_splitting": True,
    "do_pad": True,
}
IDEFICS3_PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "Idefics3ImageProcessor": _IDEFICS3,
    "SmolVLMImageProcessor": _IDEFICS3,
}
_LONGEST = 4096  # pixels; longer sides are scaled down to it


@dataclass(frozen=True)
class Idefics3ImagePreprocessor:
    """The steps of a folder's image processor. Created by `open`.

    Attributes:
        kind: the processor's name, a key of `IDEFICS3_PROCESSORS`.
        longest_edge: of the picture before it is cut, pixels; `None` keeps its size.
        tile: edge of a tile, pixels.
        splits: whether the picture is cut; else it is one tile.
        steps: filter of the resizing, then what is done to the numbers.
    """

    kind: str
    longest_edge: int | None
    tile: int
    splits: bool
    steps: PixelSteps

    @classmethod
    def open(cls, folder: Path | str) -> Idefics3ImagePreprocessor:
        """Read the folder's image processor, one of `IDEFICS3_PROCESSORS`.

        Raises:
            ModelUnreadable: it declares none, or options that cannot be followed.
        """
        kind = processor_name(declared_processor(Path(folder)))
        make = lambda options: _from_options(kind, options)  # noqa: E731
        return opened(folder, kind, IDEFICS3_PROCESSORS[kind], make, frozenset({"do_image_splitting"}))

    @property
    def keeps_count(self) -> bool:
        return not self.splits

    def prepare(self, image: Image.Image, alone: bool = True) -> PreparedPicture:
        """`pixel_values [1, tiles, 3, edge, edge]` and `pixel_attention_mask [1, tiles, edge, edge]`."""
        if self.longest_edge is not None:
            image = self.steps.resized(image, *_with_longest_edge(image.height, image.width, self.longest_edge))
        frames, grid = self._frames(image)
        values = np.stack([self.steps.values(frame) for frame in frames])[None]
        mask = np.ones((*values.shape[:2], *values.shape[3:]), np.int64)
        arrays = {"pixel_values": values, "pixel_attention_mask": mask}
        return PreparedPicture(arrays, grid, (1,) * len(frames))

    def blank_image(self) -> Image.Image:
        """A white picture of one row of tiles: as it is as long as every picture, no other is cut into fewer."""
        if not self.splits or self.longest_edge is None or self.longest_edge <= self.tile:
            return Image.new("RGB", (self.tile, self.tile), "white")
        longest = min(self.longest_edge, _LONGEST)
        height = longest // math.ceil(longest / self.tile)
        return Image.new("RGB", (longest, height - height % 2), "white")

    def _frames(self, image: Image.Image) -> tuple[list[np.ndarray], tuple[int, int] | None]:
        """The tiles and the small copy, `[edge, edge, 3]` uint8 each; rows and columns, `None` for one tile."""
        edge = self.tile
        if not self.splits:
            return [np.asarray(self.steps.resized(image, edge, edge))], None
        height, width = _in_tiles(image.height, image.width, edge)
        image = self.steps.resized(image, height, width)
        if height <= edge and width <= edge:
            return [np.asarray(image)], None
        small = np.asarray(self.steps.resized(image, edge, edge))
        return [*tiles(np.asarray(image), edge, edge), small], (height // edge, width // edge)


def _with_longest_edge(height: int, width: int, longest: int) -> tuple[int, int]:
    """`(height, width)` with that longer side; the shorter one is even."""
    aspect = width / height
    if width >= height:
        height, width = int(longest / aspect), longest
        height += height % 2
    else:
        height, width = longest, int(longest * aspect)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    if width >= height and width > _LONGEST:
        height, width = int(_LONGEST / (width / height)), _LONGEST
    elif height > width and height > _LONGEST:
        height, width = _LONGEST, int(_LONGEST * (width / height))
    return max(height, 1), max(width, 1)


def _in_tiles(height: int, width: int, edge: int) -> tuple[int, int]:
    """`(height, width)` as multiples of a tile's edge, rounded up; the longer side decides first."""
    aspect = width / height
    if width >= height:
        width = math.ceil(width / edge) * edge
        height = math.ceil(int(width / aspect) / edge) * edge
    else:
        height = math.ceil(height / edge) * edge
        width = math.ceil(int(height * aspect) / edge) * edge
    return height, width


def _from_options(kind: str, options: Mapping[str, Any]) -> Idefics3ImagePreprocessor:
    """Options with every key present, checked; raises what a malformed one raises."""
    edges = {name: dict(options[name]) for name in ("size", "max_image_size")}
    for name, size in edges.items():
        if set(size) != {"longest_edge"}:
            raise GuardError(f"{name} {size} is no longest_edge")
    return Idefics3ImagePreprocessor(
        kind=kind,
        longest_edge=edge_option(edges["size"]["longest_edge"]) if options["do_resize"] else None,
        tile=edge_option(edges["max_image_size"]["longest_edge"]),
        splits=bool(options["do_image_splitting"]),
        steps=PixelSteps.of(options),
    )
