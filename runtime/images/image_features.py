"""Rows in the place of a picture's tokens, without a picture: what searches and tests show a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...graphs.errors import GuardError
from ..chat.picture_layouts import PictureTokens
from .open_picture import Picture


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """Image features of one picture, in place of the vision encoder's output.

    Attributes:
        rows: `[image tokens, d]`, finite; `d` is the width of the decoder's embeddings.
        cut: how the picture that they stand for is cut, which decides the text around them; `None`: it is not.
    """

    rows: np.ndarray
    cut: PictureTokens | None = None

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or not self.rows.size or not np.isfinite(self.rows).all():
            raise GuardError(
                f"image features {self.rows.shape} are not finite rows [image tokens, width]; give such rows"
            )

    @property
    def tokens(self) -> PictureTokens:
        """The image tokens of the picture that the rows stand for."""
        return self.cut or PictureTokens(len(self.rows))

    def content(self) -> bytes:
        """The rows as bytes, for digests."""
        return np.ascontiguousarray(self.rows, np.float32).tobytes()


Shown = Picture | ImageFeatures  # what a request shows
