"""The images of a request: pictures, or features in place of their image tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from .image_features import ImageFeatures, Shown
from .open_picture import open_image
from .vision import Seen

Pictures = Sequence[tuple[Image.Image, bool]]


def see(images: Sequence[tuple[Shown, bool]], look: Callable[[Pictures], Seen]) -> Seen:
    """The features of images for the decoder, in their order.

    Args:
        images: at least one, each with whether it is the only one of its prompt. One that comes again is opened once.
        look: runs the vision encoder on the pictures among them.

    Raises:
        GuardError: a picture cannot be read.
    """
    opened: dict[int, Image.Image] = {}
    for image, _ in images:
        if not isinstance(image, ImageFeatures) and id(image) not in opened:
            opened[id(image)] = open_image(image)
    pictures = [(opened[id(image)], alone) for image, alone in images if id(image) in opened]
    seen = look(pictures) if pictures else None
    if seen is not None and len(pictures) == len(images):
        return seen
    looked = iter(() if seen is None else zip(_split(seen), seen.pictures, strict=True))
    rows, tokens = [], []
    for image, _ in images:
        found, of_it = (image.rows, image.tokens) if isinstance(image, ImageFeatures) else next(looked)
        rows.append(found)
        tokens.append(of_it)
    return Seen(np.concatenate(rows), tuple(tokens), {})


def _split(seen: Seen) -> list[np.ndarray]:
    """The features of each picture."""
    return np.split(seen.features, np.cumsum([picture.count for picture in seen.pictures])[:-1])
