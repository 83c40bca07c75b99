"""Headroom: how near the states of a float16 graph come to the end of float16, 65504, layer by layer.

The guard's own arithmetic stays finite for any finite state, and for states up to half the range the guarded sum too
(`graphs/lowerings/gate.py`). What the proof cannot know is the prompts that were not tried, so there are two lines:
beyond half the range the headroom is thin, which is said; beyond 15/16 of it, or if anything was not finite, the guard
is refused, because a state of another prompt need only be a sixteenth larger to be infinite.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ...graphs.proof.structure import Check

LARGEST = float(np.finfo(np.float16).max)
WAY_OUT = (
    "export the model with a float32 residual stream (--dtype w16a32 from a checkpoint, or int4 with a float32 stream), in "
    "bfloat16 or in float32"
)
THIN, REFUSED = 1 / 2, 15 / 16
NAME = "float16 headroom: the largest state against 65504"


@dataclass
class Headroom:
    """The largest |h| seen at each guarded layer of a float16 stream, before and after its guard.

    Attributes:
        layers: layer -> `[before, after]`; infinite where a state was not finite.
        channels: layer -> the channel of its largest state.
        compared: how many numbers were looked at.
    """

    layers: dict[int, list[float]] = field(default_factory=dict)
    channels: dict[int, int] = field(default_factory=dict)
    compared: int = 0

    def see(self, layer: int, raw: np.ndarray, guarded: np.ndarray) -> None:
        """Take in states of one call, of any shape."""
        known = self.layers.setdefault(layer, [0.0, 0.0])
        for at, states in enumerate((raw, guarded)):
            self.compared += states.size
            if not states.size:
                continue
            sizes = np.where(np.isfinite(states), np.abs(states), np.inf)
            largest = float(sizes.max())
            if largest > max(known):
                self.channels[layer] = int(sizes.argmax()) % states.shape[-1]
            known[at] = max(known[at], largest)

    def check(self) -> Check:
        """The record for the manifest; `worst` and `limit` are shares of float16's range."""
        share = max((max(pair) for pair in self.layers.values()), default=0.0) / LARGEST
        said = ", ".join(f"{layer}: {raw:.3g} / {new:.3g}" for layer, (raw, new) in sorted(self.layers.items()))
        note = f"largest |h| before / after the guard, layer by layer: {said}"
        if share > REFUSED:
            layer = max(self.layers, key=lambda number: max(self.layers[number]))
            note += f"; float16 cannot hold layer {layer}, channel {self.channels[layer]}: {WAY_OUT}"
        elif share > THIN:
            note += "; thin: beyond half of float16's range, prefer bfloat16 or float32"
        return Check(NAME, self.compared, share, REFUSED, self.compared > 0 and share <= REFUSED, note)
