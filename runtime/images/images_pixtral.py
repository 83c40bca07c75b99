"""Pictures of their own size, as Pixtral and Mistral 3 take them: scaled down to a longest edge, sides in whole tokens.

The arithmetic, its order and its dtypes are those of transformers' `PixtralImageProcessorPil`.
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
from ...graphs.json_files import read_json
from .pixel_steps import STEPS, PixelSteps, count_option, edge_option, opened, size_option
from .prepared_picture import PreparedPicture

PIXTRAL_PROCESSOR = "PixtralImageProcessor"
_PIXTRAL: Mapping[str, Any] = {
    **STEPS,
    "size": {"longest_edge": 1024},
    "patch_size": {"height": 16, "width": 16},
    "do_center_crop": False,
    "do_pad": True,
}
_BLANK = 4  # tokens per side of the blank picture


@dataclass(frozen=True)
class PixtralImagePreprocessor:
    """The steps of a folder's image processor. Created by `open`.

    Attributes:
        longest: height and width that a picture has at most, pixels; `None` keeps its size.
        edge: height and width of a token, pixels; sides are rounded up to multiples.
        steps: filter of the resizing, then what is done to the numbers.
    """

    longest: tuple[int, int] | None
    edge: tuple[int, int]
    steps: PixelSteps

    kind = PIXTRAL_PROCESSOR
    keeps_count = False

    @classmethod
    def open(cls, folder: Path | str) -> PixtralImagePreprocessor:
        """Read the folder's image processor.

        Raises:
            ModelUnreadable: it declares none, or options that cannot be followed.
        """
        processor = read_json(Path(folder) / "processor_config.json")
        return opened(folder, PIXTRAL_PROCESSOR, _PIXTRAL, lambda options: _from_options(options, processor))

    def prepare(self, image: Image.Image, alone: bool = True) -> PreparedPicture:
        """`pixel_values [1, 3, height, width]` and `image_sizes [1, 2]`, the size after resizing."""
        if self.longest is not None:
            image = self.steps.resized(image, *self._fitting_size(image.height, image.width))
        elif image.height % self.edge[0] or image.width % self.edge[1]:
            raise GuardError(
                f"the image has {image.width} x {image.height} pixels and the model does not resize; "
                f"send a width that is a multiple of {self.edge[1]}, and a height of {self.edge[0]}"
            )
        size = np.array([[image.height, image.width]], np.int64)
        arrays = {"pixel_values": self.steps.values(image)[None], "image_sizes": size}
        return PreparedPicture(arrays, seen_size=(image.height, image.width))

    def blank_image(self) -> Image.Image:
        """A white picture of 4 x 4 tokens, or of the largest size below: pictures are kept as small as they come."""
        longest = self.longest or (_BLANK * self.edge[0], _BLANK * self.edge[1])
        height, width = (
            max(1, min(_BLANK, most // edge)) * edge for most, edge in zip(longest, self.edge, strict=True)
        )
        return Image.new("RGB", (width, height), "white")

    def _fitting_size(self, height: int, width: int) -> tuple[int, int]:
        assert self.longest is not None
        ratio = max(height / self.longest[0], width / self.longest[1])
        if ratio > 1:
            height, width = max(1, math.floor(height / ratio)), max(1, math.floor(width / ratio))
        rows, columns = ((side - 1) // edge + 1 for side, edge in zip((height, width), self.edge, strict=True))
        return rows * self.edge[0], columns * self.edge[1]


def _from_options(options: Mapping[str, Any], processor: Mapping[str, Any]) -> PixtralImagePreprocessor:
    """Options with every key present, checked; raises what a malformed one raises."""
    size = options["size"]
    if set(size) == {"longest_edge"}:
        size = {"height": size["longest_edge"], "width": size["longest_edge"]}
    _, longest = size_option(size)
    if options["do_center_crop"]:
        raise GuardError("do_center_crop is not known for it")
    patch = options["patch_size"]
    edge = (patch, patch) if isinstance(patch, int) else (patch["height"], patch["width"])
    if processor.get("processor_class") == "PixtralProcessor":  # which hands its own numbers to the image processor
        side = count_option("patch_size", processor.get("patch_size", 16))
        side *= count_option("spatial_merge_size", processor.get("spatial_merge_size", 1))
        edge = side, side
    return PixtralImagePreprocessor(
        longest if options["do_resize"] else None, (edge_option(edge[0]), edge_option(edge[1])), PixelSteps.of(options)
    )
