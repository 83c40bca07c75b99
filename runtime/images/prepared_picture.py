"""One picture, ready for the vision encoder, and what every image processor here can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image


@dataclass(frozen=True, eq=False)
class PreparedPicture:
    """An image processor's result for one picture.

    Attributes:
        arrays: by the names that transformers' image processors use (`pixel_values`, `image_grid_thw`, `image_sizes`, ...),
            with the leading axes that transformers gives for one prompt with this picture alone. The vision encoder gets
            those that its graph declares.
        grid: rows and columns of its tiles; `None`: it is not cut.
        sizes: relative sizes of its parts in the order of `arrays`, as `PictureTokens.sizes`.
        seen_size: height and width that the vision encoder sees, pixels, where they differ from picture to picture.
        tokens: how many image tokens the processor's config gives it; `None`: only the vision encoder determines that.
        apart: whether its parts, one in each row of every array, are pictures of their own to the vision encoder.
    """

    arrays: Mapping[str, np.ndarray]
    grid: tuple[int, int] | None = None
    sizes: tuple[int, ...] = ()
    seen_size: tuple[int, int] | None = None
    tokens: int | None = None
    apart: bool = False


class Preprocessor(Protocol):
    """The image processor of a model folder."""

    @property
    def kind(self) -> str:
        """Name of transformers' class, without `Fast` and `Pil`."""
        ...

    @property
    def keeps_count(self) -> bool:
        """Whether every picture takes the same number of image tokens."""
        ...

    def prepare(self, image: Image.Image, alone: bool = True) -> PreparedPicture:
        """One picture.

        Args:
            image: RGB.
            alone: whether it is the only picture of its prompt; some processors cut no picture that is not.

        Raises:
            GuardError: the model cannot take a picture of this shape.
        """
        ...

    def blank_image(self) -> Image.Image:
        """A white picture of the size with the fewest image tokens that a user's picture could have.

        Calibration shows it, and noise of the same size, beside hundreds of prompts.
        """
        ...
