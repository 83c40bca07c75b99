"""`guard.toml` and the graph beside it: a number that was edited after the export is not what the graph computes with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...graphs.anatomy import DecoderAnatomy
from ...graphs.directions import DIRECTIONS_FILE, read_directions
from ...graphs.errors import GuardError, ManifestMismatch
from ...graphs.modes import guard_mode
from ...graphs.plan import GuardPlan
from ...graphs.planner import plan_guard
from ..calibration.guard_config import read_config


def require_config_of_graph(path: Path, plan: GuardPlan, stripped: ir.Model, anatomy: DecoderAnatomy) -> None:
    """Compare a `guard.toml` with the guard in the graph beside it.

    Args:
        path: of the file.
        plan: what the graph carries, as `verify` has established it.
        stripped, anatomy: the graph without its guard.

    Raises:
        ManifestMismatch: a value differs.
        GuardError: the file cannot be read.
    """
    config = read_config(path)
    held = values_of(plan)
    named = {"guard.mode": config.spec.mode, "guard.layers": config.spec.layers and list(config.spec.layers)}
    _require_alike(path, {name: value for name, value in named.items() if value is not None}, held)
    try:
        found = config.applied(read_directions(_directions(path, config.directions)))
        wanted = plan_guard(stripped, anatomy, found, config.spec)
    except GuardError as error:
        raise ManifestMismatch(f"{path}: is not the guard in the graph ({error}); {_AGAIN.format(path)}") from None
    _require_alike(path, values_of(wanted), held)


def _require_alike(path: Path, wanted: Mapping[str, Any], held: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if value != held.get(name):
            raise ManifestMismatch(
                f"{path}: {name} is {_shown(value)}, the graph has {_shown(held.get(name))}; {_AGAIN.format(path)}"
            )


_AGAIN = "export again with --config {}, or correct the file"


def values_of(plan: GuardPlan) -> dict[str, Any]:
    """Everything that a `guard.toml` decides, by the names that it has there."""
    values: dict[str, Any] = {
        "guard.mode": plan.mode,
        "guard.layers": list(plan.layers),
        "guard.positions": plan.positions,
        "guard.lowering": plan.lowering,
        "guard.gate": plan.gate,
        "guard.supervisor": plan.supervisor,
        "guard.knobs": bool(plan.knobs),
        "guard.telemetry": plan.telemetry,
    }
    for layer, guard in zip(plan.layers, plan.guards, strict=True):
        table = f"layers.{layer}"
        values["guard.rank"] = guard.rank
        if guard_mode(plan.mode).has_alpha:
            values["guard.alpha"] = guard.alpha
        if guard_mode(plan.mode).has_threshold:
            values[f"{table}.threshold"] = guard.threshold
        if "text_shift" in guard_mode(plan.mode).numbers:
            values[f"{table}.text_threshold"] = float(np.float32(guard.threshold) - np.float32(guard.text_shift))
        if guard_mode(plan.mode).has_readout:
            values[f"{table}.target"] = guard.target.tolist()
            values[f"{table}.readout"] = guard.readout.tolist()
        if "origin" in guard_mode(plan.mode).numbers:
            values[f"{table}.origin"] = guard.origin.tolist()
        values[f"the direction of layer {layer}"] = guard.ssd.tolist()
    return values


def _directions(path: Path, named: Path) -> Path:
    """The file that the config names; where that is gone, the folder's own."""
    return named if named.is_file() else path.parent / DIRECTIONS_FILE


def _shown(value: Any) -> str:
    """A number as `guard.toml` has it; long vectors are not printed."""
    if value is None:
        return "not set"
    if isinstance(value, list) and len(str(value)) > 80:
        return "another vector"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return f"[{', '.join(_shown(item) for item in value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
