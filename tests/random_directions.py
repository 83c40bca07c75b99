"""Directions made of seeded random numbers: for tests in which it does not matter what they mean, only that they count."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vlmguard.graphs.directions import Directions, LayerDirections, directions_bytes


def random_layer(seed: int, width: int, rank: int = 2, calibrated: bool = True) -> LayerDirections:
    """Orthonormal rows; calibrated ones have everything that any mode reads, and a threshold of 0."""
    random = np.random.default_rng(seed)
    ssd = np.ascontiguousarray(np.linalg.qr(random.normal(size=(width, rank)))[0].T, np.float32)
    if not calibrated:
        return LayerDirections(ssd)
    readout = random.normal(size=width)
    return LayerDirections(
        ssd=ssd,
        origin=random.normal(size=rank).astype(np.float32),
        target=(2 + random.normal(size=rank)).astype(np.float32),
        readout=(readout / np.linalg.norm(readout)).astype(np.float32),
        threshold=0.0,
        text_threshold=0.0,
    )


def random_directions(
    width: int, layers: Iterable[int], rank: int = 2, calibrated: bool = True, **more: Any
) -> Directions:
    """One random layer each; `more` goes to `Directions`."""
    return Directions(width, {number: random_layer(number, width, rank, calibrated) for number in layers}, **more)


def write_directions(path: Path, directions: Directions) -> Path:
    path.write_bytes(directions_bytes(directions))
    return path
