"""Pictures to patches with their places, as Gemma 4 takes them: the largest size of the picture's shape within a budget.

The arithmetic, its order and its dtypes are those of transformers' `Gemma4ImageProcessorPil`.
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
from .pixel_steps import STEPS, PixelSteps, count_option, opened, patches
from .prepared_picture import PreparedPicture

GEMMA4_PROCESSOR = "Gemma4ImageProcessor"
_GEMMA4: Mapping[str, Any] = {
    **STEPS,
    "do_normalize": False,
    "image_mean": (0.0,) * 3,
    "image_std": (1.0,) * 3,
    "patch_size": 16,
    "max_soft_tokens": 280,
    "pooling_kernel_size": 3,
}
_MOST_TOKENS = 1120  # of one picture, in any release


@dataclass(frozen=True)
class Gemma4ImagePreprocessor:
    """The steps of a folder's image processor. Created by `open`.

    Attributes:
        patch: edge of a patch, pixels.
        pool: patches per side that become one token.
        tokens: the most tokens of a picture.
        resizes: whether the picture is resized at all.
        steps: filter of the resizing, then what is done to the numbers.
    """

    patch: int
    pool: int
    tokens: int
    resizes: bool
    steps: PixelSteps

    kind = GEMMA4_PROCESSOR
    keeps_count = False

    @classmethod
    def open(cls, folder: Path | str) -> Gemma4ImagePreprocessor:
        """Read the folder's image processor.

        Raises:
            ModelUnreadable: it declares none, or options that cannot be followed.
        """
        return opened(folder, GEMMA4_PROCESSOR, _GEMMA4, _from_options)

    @property
    def edge(self) -> int:
        """Pixels per side of one token."""
        return self.patch * self.pool

    def prepare(self, image: Image.Image, alone: bool = True) -> PreparedPicture:
        """`pixel_values [1, patches, numbers]` and `image_position_ids [1, patches, 2]`, column and row; -1 fills up."""
        height, width = image.height, image.width
        if self.resizes:
            height, width = self._fitting_size(height, width)
            image = self.steps.resized(image, height, width)
        elif height % self.edge or width % self.edge or height * width > self.tokens * self.edge**2:
            raise GuardError(
                f"the image has {width} x {height} pixels and the model does not resize; "
                f"send sides that are multiples of {self.edge}, at most {self.tokens} squares of that size"
            )
        rows, columns = height // self.patch, width // self.patch
        cut = patches(self.steps.values(image), self.patch)
        length = self.tokens * self.pool**2
        values = np.zeros((1, length, cut.shape[1]), np.float32)
        values[0, : len(cut)] = cut
        places = np.full((1, length, 2), -1, np.int64)
        places[0, : len(cut)] = np.indices((rows, columns)).reshape(2, -1)[::-1].T
        count = len(cut) // self.pool**2
        arrays = {
            "pixel_values": values,
            "image_position_ids": places,
            "num_soft_tokens_per_image": np.array([count], np.int64),
        }
        return PreparedPicture(arrays, seen_size=(height, width), tokens=count)

    def blank_image(self) -> Image.Image:
        """A white square of the size that a square picture is resized to; only strips take fewer tokens, at best half."""
        side = math.isqrt(self.tokens) * self.edge
        return Image.new("RGB", (side, side), "white")

    def _fitting_size(self, height: int, width: int) -> tuple[int, int]:
        """`(height, width)` as multiples of a token's edge, rounded down from the budget's size."""
        budget = self.tokens * self.pool**2 * self.patch**2
        scale = math.sqrt(budget / (height * width))
        rows, columns = (math.floor(scale * side / self.edge) for side in (height, width))
        if rows == 0 and columns:
            rows, columns = 1, min(math.floor(width / height), self.tokens)
        elif columns == 0 and rows:
            rows, columns = min(math.floor(height / width), self.tokens), 1
        if not 1 <= rows * columns <= self.tokens:
            raise GuardError(f"the image of {width} x {height} pixels fits no grid of {self.tokens} tokens; crop it")
        return rows * self.edge, columns * self.edge


def _from_options(options: Mapping[str, Any]) -> Gemma4ImagePreprocessor:
    """Options with every key present, checked; raises what a malformed one raises."""
    patch, pool, tokens = (
        count_option(name, options[name]) for name in ("patch_size", "pooling_kernel_size", "max_soft_tokens")
    )
    if tokens > _MOST_TOKENS:
        raise GuardError(f"max_soft_tokens {tokens} is more than {_MOST_TOKENS}")
    return Gemma4ImagePreprocessor(patch, pool, tokens, bool(options["do_resize"]), PixelSteps.of(options))
