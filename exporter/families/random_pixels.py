"""Random pixels in the shapes that a vision encoder takes, where a checkpoint's image processor cannot be run here.

The graphs are the same; the runtime then cannot prepare pictures for them either, and callers give `pixel_values` of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .family import Arrays
from .generic_vision import feature_holder, feature_inputs
from .position_rules import merge_of

_TILES = (1, 2, 3, 2)
_GRIDS = ((4, 6), (6, 4), (4, 10), (2, 4))  # rows and columns of merged patches
_TILE_GRIDS = ((1, 2), (2, 1), (2, 2), (1, 1))  # rows and columns of tiles
_EDGE = 16  # pixels, where nothing says how large a patch is


def random_pixels(model: Any, runs: Callable[[Arrays], None]) -> list[Arrays] | None:
    """Four pictures in the first shapes that the encoder runs on; `None` where it takes more than pixels and a grid.

    Args:
        runs: runs the encoder, and raises what transformers raises for other shapes.
    """
    has_grid = "image_grid_thw" in feature_inputs(feature_holder(model))
    vision = getattr(model.config, "vision_config", None)
    required = required_inputs(model)
    if required == {"image_pixel_values", "image_sizes", "image_attention_mask"}:
        return _cropped(vision)
    if not required <= {"pixel_values", "image_grid_thw", "image_sizes"}:
        return None
    if vision is None:
        return _flat_patches(model.config)
    shapes = _patches(model, vision) if has_grid else _sized(vision) if "image_sizes" in required else _tiles(vision)
    for pictures in shapes:
        try:
            runs(pictures[0])
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue
        return pictures
    return None


def required_inputs(model: Any) -> set[str]:
    """Names of what its `get_image_features` cannot run without."""
    parameters = inspect.signature(feature_holder(model).get_image_features).parameters.values()
    return {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}


def _flat_patches(config: Any) -> list[Arrays] | None:
    """Pictures as rows of pixels, a row a patch, for a decoder that embeds pixels without an encoder (Fuyu)."""
    patch = getattr(config, "patch_size", None)
    if not isinstance(patch, int):
        return None
    row = _channels(config) * patch**2
    return [_random({"pixel_values": (1, rows * columns, row)}, seed) for seed, (rows, columns) in enumerate(_GRIDS)]


def _tiles(vision: Any) -> Iterator[list[Arrays]]:
    """Pictures of one to three tiles of the encoder's size; of patches, each over its frames, where it has none."""
    size, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
    if size is None and isinstance(patch, int):
        frames = _first_number(vision, ("temporal_patch_size",), 1)
        shape = (frames, patch, patch, _channels(vision))
        yield [_random({"pixel_values": (rows * columns, *shape)}, seed) for seed, (rows, columns) in enumerate(_GRIDS)]
        return
    if size is None:
        return
    height, width = (size, size) if isinstance(size, int) else size
    yield [
        _random({"pixel_values": (tiles, _channels(vision), height, width)}, seed) for seed, tiles in enumerate(_TILES)
    ]


def _cropped(vision: Any) -> list[Arrays]:
    """Pictures of one tile to four, part of the last ones without picture, and the whole one before them."""
    edge, pictures = vision.crop_size, []
    patches = edge // vision.patch_size
    for seed, (rows, columns) in enumerate(_TILE_GRIDS):
        seen = np.ones((rows * patches, columns * patches), np.float32)
        outside = slice(-(patches // 2), None)
        seen[(outside, slice(None)) if seed % 2 else (slice(None), outside)] = 0
        tiles = seen.reshape(rows, patches, columns, patches).swapaxes(1, 2).reshape(-1, patches, patches)
        whole = np.ones((1, patches, patches), np.float32)
        pixels = {"image_pixel_values": (1, 1 + rows * columns, _channels(vision), edge, edge)}
        sizes = np.array([[rows * edge, columns * edge]], np.int64)
        mask = np.ascontiguousarray(np.concatenate([whole, tiles])[None])
        pictures.append({**_random(pixels, seed), "image_sizes": sizes, "image_attention_mask": mask})
    return pictures


def _sized(vision: Any) -> Iterator[list[Arrays]]:
    """Pictures of several sizes, each with its height and width."""
    yield [
        _random({"pixel_values": (1, _channels(vision), rows * _EDGE, columns * _EDGE)}, seed)
        | {"image_sizes": np.array([[rows * _EDGE, columns * _EDGE]], np.int64)}
        for seed, (rows, columns) in enumerate(_GRIDS)
    ]


def _patches(model: Any, vision: Any) -> Iterator[list[Arrays]]:
    """Pictures as patches with their grid: of one frame or of two, flat or as squares."""
    patch, merge = getattr(vision, "patch_size", None), merge_of(model.config)
    if not isinstance(patch, int):
        return
    frames = _first_number(vision, ("temporal_patch_size", "patch_temporal"), 1)
    shapes = ((_channels(vision) * frames * patch**2,), (_channels(vision), patch, patch))
    for shape in shapes:
        yield [
            _random({"pixel_values": (rows * columns * merge**2, *shape)}, seed)
            | {"image_grid_thw": np.array([[1, rows * merge, columns * merge]], np.int64)}
            for seed, (rows, columns) in enumerate(_GRIDS)
        ]


def _channels(config: Any) -> int:
    return _first_number(config, ("num_channels", "in_channels", "in_chans"), 3)


def _first_number(vision: Any, names: Sequence[str], otherwise: int) -> int:
    """The first of these entries that the vision config has a number for."""
    return next((n for name in names if isinstance(n := getattr(vision, name, None), int)), otherwise)


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> Arrays:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
