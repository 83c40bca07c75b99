"""The guard in numpy: the oracle that every lowering, every runner and the PyTorch hooks must agree with.

VLM-Guard (arXiv 2502.10486): per token `h' = h + w V`, where `V` holds the safety steering direction (SSD) of the layer
and `w` depends on what the layer reads, `c = h V^T`. All four modes are that one shape; only `w` differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# The supervisor coordinates that mean "no supervisor: listen only" (`supervise`, text-only pass). A finite number, far
# below every threshold: infinity or NaN times a closed gate would be NaN, and the closed gate must write exact zeros.
LISTEN = -1e30


@dataclass(frozen=True)
class LayerGuard:
    """The numbers that one guarded layer computes with; float32 arrays, width `d`, rank `m`.

    Attributes:
        ssd: `[m, d]`, orthonormal rows, `+` means harmful.
        origin: `[m]`, where the coordinates start (`supervise`).
        target: `[m]`, the level that the language model has for harmful text (`restore`).
        readout: `[d]`, what the gate of `restore` reads.
        threshold: the gate opens above it.
        alpha: strength (`steer`, `supervise`).
    """

    ssd: np.ndarray
    origin: np.ndarray
    target: np.ndarray
    readout: np.ndarray
    threshold: float
    alpha: float

    @property
    def rank(self) -> int:
        return self.ssd.shape[0]


def weights(mode: str, layer: LayerGuard, h: np.ndarray, supervisor: np.ndarray | None = None) -> np.ndarray:
    """`w` of `h' = h + w V`, `[..., m]`, for hidden states `h` `[..., d]`; `supervisor` `[..., m]` broadcasts to it.

    A closed gate gives exact zeros.
    """
    c = h @ layer.ssd.T
    if mode == "project":
        return -c
    if mode == "steer":
        return layer.alpha * opens(c[..., :1], layer) * c
    if mode == "supervise":
        assert supervisor is not None, "supervise needs the text-only coordinates"
        a, o = supervisor, layer.origin
        return opens(a[..., :1], layer) * (layer.alpha * (a - o) - (c - o))
    assert mode == "restore", mode
    return opens(h @ layer.readout[:, None], layer) * (layer.target - c)


def opens(score: np.ndarray, layer: LayerGuard) -> np.ndarray:
    """1 where the gate opens, else 0; the comparison is strict."""
    return (score > layer.threshold).astype(score.dtype)


def guard(
    mode: str,
    layer: LayerGuard,
    h: np.ndarray,
    supervisor: np.ndarray | None = None,
    selected: np.ndarray | None = None,
) -> np.ndarray:
    """Guarded hidden states.

    Args:
        h: hidden states `[batch, sequence, d]`.
        supervisor: coordinates of the text-only query, `[batch, 1, m]` (`supervise` only).
        selected: `[batch, sequence, 1]` of 0 and 1, the tokens to edit; `None` edits all of them.
    """
    delta = weights(mode, layer, h, supervisor) @ layer.ssd
    return h + (delta if selected is None else delta * selected)


def last_token(mask: np.ndarray) -> np.ndarray:
    """`[batch, sequence, 1]`: 1 at the last attended token of each row of `mask` `[batch, sequence]`.

    Left padding makes that the last index; right padding needs the mask. Where none is attended it is the last index:
    a mask may be longer than the tokens so far (a static cache), and its last columns then say nothing.
    """
    index = np.argmax((mask != 0) * mask.shape[1] + np.arange(1, mask.shape[1] + 1), axis=1)
    return (np.arange(mask.shape[1])[None, :] == index[:, None]).astype(np.float32)[..., None]
