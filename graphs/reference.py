"""The guard in numpy: the oracle that every lowering, every runner and the PyTorch hooks must agree with.

VLM-Guard (arXiv 2502.10486): per token `h' = h + w V`, where `V` holds the safety steering direction (SSD) of the layer
and `w` depends on what the layer reads, `c = h V^T`. All modes are that one shape; only `w` differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# The supervisor coordinates that mean "no supervisor: listen only" (the text-only pass). A finite number, far
# below every threshold: infinity or NaN times a closed gate would be NaN, and the closed gate must write exact zeros.
LISTEN = -1e30
# The largest strength that is taken. In float16 a coordinate is read with one bit to spare (`lowering_lowrank`), and a strength
# that is not bounded could be infinite, and infinity times a closed gate is not zero.
LARGEST_STRENGTH = 2.0
# A threshold offset is cut here: it must not bring a threshold below LISTEN.
LARGEST_OFFSET = 1e29
# `combined` hears its readout only where there is a supervisor: the readout's score is cut off this far above the
# supervisor's coordinate. Above every score that is one; and LISTEN plus it is below every threshold.
HEARING = 1e29
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
        threshold: the gate opens above it.
        alpha: strength (`steer`, `supervise`).
        text_shift: brings the text-only query's first coordinate to the readout's scale, so that one threshold serves both
            (`combined`).
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
class Dials:
    """What may be set at each call. Ours, not the paper's; the defaults are the guard as it was calibrated.

    Attributes:
        strength: every weight is multiplied with it: 0 only watches, 1 is as calibrated; taken as 0 to `LARGEST_STRENGTH`.
        threshold_offset: added to every layer's threshold, in the units of its score.
        held: gates that were decided before, `[..., 1]`, broadcasts to them: 1 open, 0 closed, below 0 (`UNDECIDED`) decide
            now; `None` decides all of them now.
    """

    strength: float = 1.0
    threshold_offset: float = 0.0
    held: np.ndarray | None = None


AS_CALIBRATED = Dials()


def weights(
    mode: str,
    layer: LayerGuard,
    h: np.ndarray,
    supervisor: np.ndarray | None = None,
    dials: Dials = AS_CALIBRATED,
) -> np.ndarray:
    """`w` of `h' = h + w V`, `[..., m]`, for hidden states `h` `[..., d]`; `supervisor` `[..., m]` broadcasts to it.

    A closed gate gives exact zeros, and so does strength 0.
    """
    c = h @ layer.ssd.T
    strength = float(np.clip(dials.strength, 0.0, LARGEST_STRENGTH))
    if mode == "project":
        return strength * -c
    opened = gate(mode, layer, h, supervisor, dials)
    if mode == "steer":
        return strength * opened * (layer.alpha * c)
    if mode == "supervise":
        assert supervisor is not None, "supervise needs the text-only coordinates"
        a, o = supervisor, layer.origin
        return strength * opened * (layer.alpha * (a - o) - (c - o))
    assert mode in {"restore", "combined"}, mode
    return strength * opened * (layer.target - c)


def score(mode: str, layer: LayerGuard, h: np.ndarray, supervisor: np.ndarray | None = None) -> np.ndarray:
    """What the gate compares with its threshold, `[..., 1]`; `project` has no gate."""
    if mode == "supervise":
        assert supervisor is not None, "supervise needs the text-only coordinates"
        return supervisor[..., :1]
    assert mode in {"steer", "restore", "combined"}, mode
    row = layer.ssd[0] if mode == "steer" else layer.readout
    read = h @ row[:, None]
    if mode != "combined":
        return read
    assert supervisor is not None, "combined needs the text-only coordinates"
    told = supervisor[..., :1]
    return np.minimum(np.maximum(read, told + layer.text_shift), told + HEARING)


def gate(
    mode: str,
    layer: LayerGuard,
    h: np.ndarray,
    supervisor: np.ndarray | None = None,
    dials: Dials = AS_CALIBRATED,
) -> np.ndarray:
    """1 where the gate is open, else 0, `[..., 1]`; the comparison is strict."""
    offset = float(np.clip(dials.threshold_offset, -LARGEST_OFFSET, LARGEST_OFFSET))
    found = score(mode, layer, h, supervisor)
    opened = found > layer.threshold + offset
    if dials.held is not None:
        opened = np.where(dials.held >= 0, dials.held > 0, opened)
    return opened.astype(found.dtype)


def guard(
    mode: str,
    layer: LayerGuard,
    h: np.ndarray,
    supervisor: np.ndarray | None = None,
    selected: np.ndarray | None = None,
    dials: Dials = AS_CALIBRATED,
) -> np.ndarray:
    """Guarded hidden states.

    Args:
        h: hidden states `[batch, sequence, d]`.
        supervisor: coordinates of the text-only query, `[batch, 1, m]` (`supervise` and `combined`).
        selected: `[batch, sequence, 1]` of 0 and 1, the tokens to edit; `None` edits all of them.
        dials: what is set at this call.
    """
    delta = weights(mode, layer, h, supervisor, dials) @ layer.ssd
    return h + (delta if selected is None else delta * selected)


def last_token(mask: np.ndarray) -> np.ndarray:
    """`[batch, sequence, 1]`: 1 at the last attended token of each row of `mask` `[batch, sequence]`.

    Left padding makes that the last index; right padding needs the mask. Where none is attended it is the last index:
    a mask may be longer than the tokens so far (a static cache), and its last columns then say nothing.
    """
    index = np.argmax((mask != 0) * mask.shape[1] + np.arange(1, mask.shape[1] + 1), axis=1)
    return (np.arange(mask.shape[1])[None, :] == index[:, None]).astype(np.float32)[..., None]
