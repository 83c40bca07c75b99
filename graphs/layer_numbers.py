"""The numbers that a guarded layer computes with, from the request and the directions."""

from __future__ import annotations

import numpy as np

from .directions import Directions, LayerDirections
from .errors import DirectionMismatch, GuardError
from .modes import guard_mode, modes_where
from .reference import SUPERVISED_ABOVE, LayerGuard
from .spec import GuardSpec

LARGEST_ALPHA = 1000.0  # alpha times the NO_SUPERVISOR sentinel must stay finite in float32


def layer_guard(number: int, directions: Directions, spec: GuardSpec, mode: str, notes: list[str]) -> LayerGuard:
    """The numbers of one guarded layer: those of the spec, else those of the directions, else the mode's defaults.

    Args:
        number: of the layer; the directions have it.
        directions: content of the directions file.
        spec: the requested guard.
        mode: the decided mode.
        notes: sentences for the plan are added here.

    Raises:
        DirectionMismatch: the directions lack what the mode needs.
        GuardError: a setting that the mode does not have, or out of range.
    """
    layer = directions.layers[number]
    rank = spec.rank or layer.ssd.shape[0]
    if rank > layer.ssd.shape[0]:
        raise DirectionMismatch(
            f"rank {rank} is more than the {layer.ssd.shape[0]} rows of the directions of layer {number}; "
            "extract them with a higher --rank"
        )
    if guard_mode(mode).has_alpha:
        alpha = spec.alpha if spec.alpha is not None else directions.alpha if directions.alpha is not None else 1.0
        if alpha > LARGEST_ALPHA:
            raise GuardError(f"alpha {alpha:g} is beyond {LARGEST_ALPHA:g}; no hidden state survives that")
    elif spec.alpha is not None:
        able = " or ".join(modes_where(has_alpha=True))
        raise GuardError(f"mode {mode} has no strength alpha; leave --alpha out, or choose {able}")
    else:
        alpha = 1.0
    if spec.tau is not None and not guard_mode(mode).has_threshold:
        what = "gate" if guard_mode(mode).gate is None else "threshold"
        raise GuardError(f"mode {mode} has no {what}; leave --tau out, or choose a mode with one")
    zeros = np.zeros(rank, np.float32)
    threshold = _threshold(number, layer, spec, mode, notes)
    return LayerGuard(
        ssd=layer.ssd[:rank],
        origin=layer.origin[:rank] if layer.origin is not None else zeros,
        target=_target(number, layer, rank, mode),
        readout=_readout(number, layer, mode, notes),
        threshold=threshold,
        alpha=float(np.float32(alpha)),
        text_shift=_text_shift(number, layer, mode, threshold),
    )


def _target(number: int, layer: LayerDirections, rank: int, mode: str) -> np.ndarray:
    if not guard_mode(mode).has_readout:
        return np.zeros(rank, np.float32)
    if layer.target is None:
        raise DirectionMismatch(
            f"mode {mode} needs a target level, layer {number} of the directions has none; calibrate with --anchors"
        )
    return layer.target[:rank]


def _readout(number: int, layer: LayerDirections, mode: str, notes: list[str]) -> np.ndarray:
    if layer.readout is not None:
        return layer.readout
    if guard_mode(mode).has_readout:
        notes.append(f"layer {number} has no readout of its own: its gate reads the first row of the SSD")
    return layer.ssd[0]


def _threshold(number: int, layer: LayerDirections, spec: GuardSpec, mode: str, notes: list[str]) -> float:
    if guard_mode(mode).gate == "any text":
        return -np.inf if spec.supervisor == "rows" else float(np.float32(SUPERVISED_ABOVE))
    if not guard_mode(mode).has_threshold:
        return 0.0
    if spec.tau is not None:
        return float(np.float32(spec.tau))
    if layer.threshold is not None:
        return float(np.float32(layer.threshold))  # what the graph compares with, and what a directions file holds
    if guard_mode(mode).has_readout:
        raise DirectionMismatch(
            f"mode {mode} needs a threshold, layer {number} of the directions has none; give --tau, or calibrate "
            "with --anchors"
        )
    notes.append("tau = 0, as in the paper: the directions carry no threshold, and coordinates are not centred on 0")
    return 0.0


def _text_shift(number: int, layer: LayerDirections, mode: str, threshold: float) -> float:
    """One threshold for the readout and for the text, each on its own scale."""
    if "text_shift" not in guard_mode(mode).numbers:
        return 0.0
    if layer.text_threshold is None:
        raise DirectionMismatch(
            f"mode {mode} needs a threshold for the text too, layer {number} of the directions has none; calibrate with "
            "--anchors"
        )
    return float(np.float32(threshold - layer.text_threshold))
