"""From a vision encoder's rows to those that go to a picture's image tokens, where the two differ.

Most encoders give the image tokens' rows in their order. Where the shapes depend on the picture no graph can do that, and the
caller has to: `PLACES` has the rules, by `model_type`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from .prepared_picture import PreparedPicture

# (what the image processor gives for one picture, what the encoder gives for it) -> [image tokens, width]
Place = Callable[[PreparedPicture, Mapping[str, np.ndarray]], np.ndarray]
# LLaVA-OneVision scales a picture's grid of features down to about those of so many tiles (`vision_aspect_ratio`).
ONEVISION_TILES = 9


def in_order(picture: PreparedPicture, seen: Mapping[str, np.ndarray]) -> np.ndarray:
    """Every row of the features, first to last."""
    features = seen.get("image_features", next(iter(seen.values())))
    return features.reshape(-1, features.shape[-1])


def llava_onevision(
    picture: PreparedPicture, seen: Mapping[str, np.ndarray], most_tiles: int = ONEVISION_TILES
) -> np.ndarray:
    """As `laid_out`, the grid scaled down; the rule of `LlavaOnevisionModel.pack_image_features`."""
    return laid_out(picture, seen, most_tiles)


def llava_next(picture: PreparedPicture, seen: Mapping[str, np.ndarray]) -> np.ndarray:
    """As `laid_out`; the rule of `LlavaNextModel.pack_image_features`."""
    return laid_out(picture, seen, None)


def laid_out(picture: PreparedPicture, seen: Mapping[str, np.ndarray], most_tiles: int | None) -> np.ndarray:
    """The small copy, then the tiles laid out as one grid without its bars, a separator behind every row.

    Args:
        picture: with its `image_sizes`.
        seen: `image_features [tiles, tokens + 1, width]`, the last row of each tile is the separator. A picture that is not cut
            takes all of them.
        most_tiles: scale the grid down to about the features of so many tiles; `None` does not.
    """
    features = seen["image_features"]
    if picture.grid is None:
        return features[0]
    (size,) = picture.arrays["image_sizes"]
    separator, tiles = features[0, -1], features[:, :-1]
    side = math.isqrt(tiles.shape[1])
    rows, columns = picture.grid
    grid = tiles[1:].reshape(rows, columns, side, side, -1).transpose(0, 2, 1, 3, 4)
    grid = _unpadded(grid.reshape(rows * side, columns * side, -1), size)
    ratio = math.sqrt(grid.shape[0] * grid.shape[1] / (most_tiles * side**2)) if most_tiles is not None else 1.0
    if ratio > 1.1:
        grid = _resized(grid, int(grid.shape[0] // ratio), int(grid.shape[1] // ratio))
    ends = np.broadcast_to(separator, (len(grid), 1, len(separator)))
    return np.concatenate([tiles[0], np.concatenate([grid, ends], axis=1).reshape(-1, len(separator))])


def _unpadded(grid: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Without the bars that made the picture fit the grid; `[height, width, channels]`."""
    tall, wide = (int(length) for length in size)
    height, width = grid.shape[:2]
    if wide / tall > width / height:
        bar = (height - int(round(tall * (width / wide), 7))) // 2
        return grid[bar : height - bar]
    bar = (width - int(round(wide * (height / tall), 7))) // 2
    return grid[:, bar : width - bar]


def _resized(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, corners not aligned, no antialiasing: torch's `interpolate(mode="bilinear")`."""

    def along(axis: int, grid: np.ndarray, length: int) -> np.ndarray:
        have = grid.shape[axis]
        at = np.maximum((np.arange(length) + 0.5) * (have / length) - 0.5, 0).astype(np.float32)
        low = at.astype(np.int64)
        high = np.minimum(low + 1, have - 1)
        weight = (at - low).reshape(-1, *[1] * (grid.ndim - axis - 1)).astype(grid.dtype)
        return grid.take(low, axis) * (1 - weight) + grid.take(high, axis) * weight

    return along(1, along(0, grid, height), width)


PLACES: Mapping[str, Place] = {"llava_onevision": llava_onevision, "llava_next": llava_next}
