"""Headroom: how close the states of a float16 graph come to float16's limit, 65504, layer by layer.

The guard's own arithmetic is finite for any finite state, and for states up to half the range so is the guarded sum
(`graphs/lowerings/gate.py`). Prompts that were not run may reach larger states, so there are two limits. Beyond half the range
the check notes thin headroom. Beyond 15/16 of it, or with a value that is not finite, the guard is rejected: another prompt's
state need only be a sixteenth larger to overflow.
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
        compared: number of compared values.
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
