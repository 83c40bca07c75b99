"""The guard in numpy: the oracle that every lowering, every runner and the PyTorch hooks must agree with.

VLM-Guard (arXiv 2502.10486): per token `h' = h + w V`, where `V` holds the safety steering direction (SSD) of the layer
and `w` depends on what the layer reads, `c = h V^T`. All modes are that one shape; only `w` differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# The supervisor coordinates that mean "no supervisor" (the text-only pass). A finite number, far
# below every threshold: infinity or NaN times a closed gate would be NaN, and the closed gate must write exact zeros.
NO_SUPERVISOR = -1e30
# The largest strength that is accepted. In float16 a coordinate is read with one bit to spare (`lowerings.lowrank`); an
# unbounded strength could be infinite, and infinity times a closed gate is not zero.
LARGEST_STRENGTH = 2.0
# Limit of the threshold offset: a threshold must stay above NO_SUPERVISOR.
LARGEST_OFFSET = 1e29
# `combined` uses its readout only where there is a supervisor: the readout's score is capped this far above the
# supervisor's coordinate. The cap is above every real score, and NO_SUPERVISOR plus the cap is below every threshold.
SCORE_CAP = 1e29
# `align` edits wherever there is a supervisor: its gate opens above this, far below every coordinate and far above
# NO_SUPERVISOR.
SUPERVISED_ABOVE = -1e29
# A held gate that means "not decided yet: decide now".
UNDECIDED = -1.0


@dataclass(frozen=True)
class LayerGuard:
    """The numbers that one guarded layer computes with; float32 arrays, width `d`, rank `m`.

    Attributes:
        ssd: `[m, d]`, orthonormal rows, `+` means harmful.
        origin: `[m]`, where the coordinates start (`supervise`).
        target: `[m]`, the level that the language model has for harmful text (`restore`, `combined`).
        readout: `[d]`, what the gate of `restore` and `combined` reads.
        threshold: the gate opens above it (`align`: `SUPERVISED_ABOVE`; with paired rows minus infinity, there is no gate).
        alpha: strength (`steer`, `supervise`).
        text_shift: added to the text-only query's first coordinate to match the readout's scale, so that one threshold
            serves both (`combined`).
    """

    ssd: np.ndarray
    origin: np.ndarray
    target: np.ndarray
    readout: np.ndarray
    threshold: float
    alpha: float
    text_shift: float = 0.0

    @property
    def rank(self) -> int:
        return self.ssd.shape[0]


@dataclass(frozen=True)
class RuntimeControls:
    """Values that each call may set. Not in the paper; the defaults are the calibrated guard.

    Attributes:
        strength: every weight is multiplied with it: 0 only watches, 1 is as calibrated; taken as 0 to `LARGEST_STRENGTH`.
        threshold_offset: added to every layer's threshold, in the units of its score.
        held: gates that were decided before, `[..., 1]`, broadcasts to them: 1 open, 0 closed, below 0 (`UNDECIDED`) decide
            now; `None` decides all of them now.
    """

    strength: float = 1.0
    threshold_offset: float = 0.0
    held: np.ndarray | None = None


AS_CALIBRATED = RuntimeControls()


def weights(
    mode: str,
    layer: LayerGuard,
    h: np.ndarray,
    supervisor: np.ndarray | None = None,
    runtime_controls: RuntimeControls = AS_CALIBRATED,
) -> np.ndarray:
    """`w` of `h' = h + w V`, `[..., m]`. A closed gate and strength 0 give exact zeros.

    Args:
        mode: the guard's mode.
        layer: its numbers.
        h: hidden states `[..., d]`.
        supervisor: the text-only coordinates `[..., m]`, broadcast to `h`.
        runtime_controls: their values in this call.
    """
    c = h @ layer.ssd.T
    strength = float(np.clip(runtime_controls.strength, 0.0, LARGEST_STRENGTH))
    if mode == "project":
        return strength * -c
    opened = gate(mode, layer, h, supervisor, runtime_controls)
    if mode == "steer":
        return strength * opened * (layer.alpha * c)
    if mode == "supervise":
        assert supervisor is not None, "supervise needs the text-only coordinates"
        a, o = supervisor, layer.origin
        return strength * opened * (layer.alpha * (a - o) - (c - o))
    if mode == "align":
        assert supervisor is not None, "align needs the text-only coordinates"
        return strength * opened * (supervisor - c)
    assert mode in {"restore", "combined"}, mode
    return strength * opened * (layer.target - c)


def score(mode: str, layer: LayerGuard, h: np.ndarray, supervisor: np.ndarray | None = None) -> np.ndarray:
    """The score that the gate compares with its threshold, `[..., 1]`; `project` has no gate.

    Args:
        mode, layer, h, supervisor: as for `weights`.
    """
    if mode in {"supervise", "align"}:
        assert supervisor is not None, f"{mode} needs the text-only coordinates"
        return supervisor[..., :1]
    assert mode in {"steer", "restore", "combined"}, mode
    row = layer.ssd[0] if mode == "steer" else layer.readout
    read = h @ row[:, None]
    if mode != "combined":
        return read
    assert supervisor is not None, "combined needs the text-only coordinates"
    supervised = supervisor[..., :1]
    return np.minimum(np.maximum(read, supervised + layer.text_shift), supervised + SCORE_CAP)


def gate(
    mode: str,
    layer: LayerGuard,
    h: np.ndarray,
    supervisor: np.ndarray | None = None,
    runtime_controls: RuntimeControls = AS_CALIBRATED,
) -> np.ndarray:
    """1 where the gate is open, else 0, `[..., 1]`; the comparison is strict.

    Args:
        mode, layer, h, supervisor, runtime_controls: as for `weights`.
    """
    offset = float(np.clip(runtime_controls.threshold_offset, -LARGEST_OFFSET, LARGEST_OFFSET))
    found = score(mode, layer, h, supervisor)
    opened = found > layer.threshold + offset
    if runtime_controls.held is not None:
        opened = np.where(runtime_controls.held >= 0, runtime_controls.held > 0, opened)
    return opened.astype(found.dtype)


def guard(
    mode: str,
    layer: LayerGuard,
    h: np.ndarray,
    supervisor: np.ndarray | None = None,
    selected: np.ndarray | None = None,
    runtime_controls: RuntimeControls = AS_CALIBRATED,
) -> np.ndarray:
    """Guarded hidden states.

    Args:
        mode: the guard's mode.
        layer: its numbers.
        h: hidden states `[batch, sequence, d]`.
        supervisor: coordinates of the text-only query, `[batch, 1, m]` (`supervise`, `combined` and `align`).
        selected: `[batch, sequence, 1]` of 0 and 1, the tokens to edit; `None` edits all of them.
        runtime_controls: their values in this call.
    """
    delta = weights(mode, layer, h, supervisor, runtime_controls) @ layer.ssd
    return h + (delta if selected is None else delta * selected)


def text_rows(batch: int) -> np.ndarray:
    """`[batch]` int: the row that holds each row's text-only prompt where rows are paired: the even one of its pair."""
    index = np.arange(batch)
    return index - index % 2


def paired_rows(mask: np.ndarray, length: int | None = None, past: int = 0) -> np.ndarray:
    """`[batch, 1, 1]` of 0 and 1: the rows that a call edits where rows are paired; arguments as in `last_token`.

    Odd rows, in a call of more than one token, if they and their text-only rows have a token in it.
    """
    tokens = mask.shape[1] if length is None else length
    here = call_end(mask, tokens, past) - _attended_to(mask) < tokens
    index, text = np.arange(len(mask)), text_rows(len(mask))
    edited = (index != text) & here & here[text] & (tokens > 1)
    return edited.astype(np.float32)[:, None, None]


def text_coordinates(layer: LayerGuard, h: np.ndarray, last: np.ndarray) -> np.ndarray:
    """`[batch, 1, m]`: the supervisor of paired rows, each row's text-only row at its last token.

    Args:
        h: hidden states of the call, `[batch, sequence, d]`.
        last: of `last_index`, `[batch]`.
    """
    rows = text_rows(len(h))
    return (h[rows, last[rows]] @ layer.ssd.T)[:, None]


def last_token(
    mask: np.ndarray, length: int | None = None, past: int = 0, positions: np.ndarray | None = None
) -> np.ndarray:
    """`[batch, length, 1]`: 1 at the last attended token of each row, 0 elsewhere; what positions `last` edits.

    Which columns of the mask belong to this call is `call_end`'s rule. Where positions reach further than that (a part of a
    prompt that is padded on the right, behind a static mask), the place that they show is edited too.

    Args:
        mask: `[batch, T]`, not 0 for tokens that are attended.
        length: tokens of this call, S; default: the mask is of this call's tokens alone.
        past: length of the past axis of the KV cache that goes in: past tokens, or the capacity of a shared buffer.
        positions: `[batch, length]`, the position of each token of this call.
    """
    tokens = mask.shape[1] if length is None else length
    place, earlier = _places(mask, tokens, past, positions)
    index = np.arange(tokens)
    return ((index == place[:, None]) | (index == earlier[:, None])).astype(np.float32)[..., None]


def last_index(
    mask: np.ndarray, length: int | None = None, past: int = 0, positions: np.ndarray | None = None
) -> np.ndarray:
    """`[batch]` int: the token of each row at which gates, scores and coordinates are read.

    Args:
        mask, length, past, positions: as for `last_token`.
    """
    _, earlier = _places(mask, mask.shape[1] if length is None else length, past, positions)
    return np.maximum(earlier, 0)


def call_end(mask: np.ndarray, length: int, past: int = 0) -> int:
    """Number of the mask's columns up to the end of this call's tokens (`positions` has the reasons).

    past + length where the mask has so many columns; else the furthest attended column of any row, but no less than length.
    """
    columns = mask.shape[1]
    least = past + length if past + length <= columns else min(length, columns)
    return max(least, int(_attended_to(mask).max()))


def call_mask(mask: np.ndarray, length: int, past: int = 0) -> np.ndarray:
    """`[batch, length]`: the mask of this call's tokens alone; arguments as in `last_token`."""
    if mask.shape[1] < length:  # one column stands for all
        return np.repeat(mask[:, :1], length, axis=1)
    end = call_end(mask, length, past)
    return mask[:, end - length : end]


def _attended_to(mask: np.ndarray) -> np.ndarray:
    """`[batch]`: each row's last attended column, counted from 1; 0 where there is none."""
    return ((mask != 0) * np.arange(1, mask.shape[1] + 1)).max(axis=1)


def _places(mask: np.ndarray, length: int, past: int, positions: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The last attended token of each row, `[batch]`, as the mask shows it and as the positions do."""
    end = call_end(mask, length, past)
    behind = end - _attended_to(mask)
    place = np.where(behind < length, length - 1 - behind, length - 1)
    if positions is None:
        return place, place
    reach = min(int(positions[:, 0].max()) + length, mask.shape[1])
    return place, place - max(reach - end, 0)
