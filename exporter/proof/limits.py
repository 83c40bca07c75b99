"""Allowed deviation of a graph's results from the float64 reference, relative to the largest compared number."""

from __future__ import annotations

from collections.abc import Mapping

TOLERANCE: Mapping[str, float] = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
