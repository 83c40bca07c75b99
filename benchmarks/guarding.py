"""Guarded copies of a model, made as `vlmguard export` makes them, with directions of random numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlmguard.exporter.export_result import ExportResult
from vlmguard.exporter.pipeline import export
from vlmguard.graphs.directions import Directions, LayerDirections, directions_bytes
from vlmguard.graphs.spec import GuardSpec

# A gate compares sums of a few thousand products with its threshold: these decide it before any token is read.
ALWAYS_CLOSED, ALWAYS_OPEN = 1e9, -1e9


def write_directions(path: Path, width: int, layers: int, rank: int = 8) -> Path:
    """Calibrated directions for every layer: orthonormal rows, small targets, so that an open gate stays finite."""
    made = {}
    for number in range(layers):
        random = np.random.default_rng(number)
        rows = np.linalg.qr(random.normal(size=(width, rank)))[0].T
        made[number] = LayerDirections(
            ssd=np.ascontiguousarray(rows, np.float32),
            origin=np.zeros(rank, np.float32),
            target=random.normal(size=rank).astype(np.float32) / 10,
            readout=rows[0].astype(np.float32),
            threshold=0.0,
            text_threshold=0.0,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(directions_bytes(Directions(width, made)))
    return path


def guarded(model: Path, out: Path, directions: Path, spec: GuardSpec) -> ExportResult:
    """The guarded folder; proved by structure alone, because a benchmark runs it anyway."""
    return export(model, out, spec=spec, directions=directions, proof="structure", digests=False, force=True)
