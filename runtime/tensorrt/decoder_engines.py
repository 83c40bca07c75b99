"""A decoder of two engines: one for prompts, one for decode steps (`exporter.engines.engine_graphs`)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...graphs.errors import RunFailed
from ...graphs.plan import SUPERVISOR_INPUT
from ..device import Tensor
from ..runner_protocol import Port
from .engine_runner import TensorRTRunner


class DecoderEngines:
    """Runs each call on the engine that was built for its shapes. Both keep tensors on one device.

    Args:
        prefill: of the guarded decoder; its inputs and outputs are those of the pair.
        step: of the graph for one token per call, preferred where its shapes fit.
    """

    def __init__(self, prefill: TensorRTRunner, step: TensorRTRunner) -> None:
        self.prefill, self.step = prefill, step

    @property
    def inputs(self) -> Mapping[str, Port]:
        return self.prefill.inputs

    @property
    def outputs(self) -> Mapping[str, Port]:
        """Of a prompt's call; a decode step has no coordinates."""
        return self.prefill.outputs

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """All outputs by name, on the host."""
        return {name: np.asarray(tensor) for name, tensor in self.run_on_device(feeds).items()}

    def run_on_device(self, feeds: Mapping[str, Tensor], step: bool = False) -> dict[str, Tensor]:
        """As for `TensorRTRunner`."""
        self._require_stacked(feeds)
        fits = self.step.fits(feeds) or (step and not self.prefill.fits(feeds))  # in an error: the ranges for steps
        return (self.step if fits else self.prefill).run_on_device(feeds, step)

    def _require_stacked(self, feeds: Mapping[str, Tensor]) -> None:
        """Coordinates have the prefill engine's sizes in every call; the step engine does not know all of them."""
        port, fed = self.inputs.get(SUPERVISOR_INPUT), feeds.get(SUPERVISOR_INPUT)
        if port is None or fed is None:
            return
        open_batch = [name for name, other in self.inputs.items() if len(other.shape) > 1 and other.shape[0] is None]
        rows = {feeds[name].shape[0] for name in open_batch if name in feeds and name != SUPERVISOR_INPUT}
        if tuple(fed.shape[1:]) != port.shape[1:] or any(fed.shape[0] != number for number in rows):
            wanted = ", ".join(map(str, (*sorted(rows), *port.shape[1:])))
            raise RunFailed(f"input {port.name!r} has shape {tuple(fed.shape)}, these prompts need ({wanted})")

    def close(self) -> None:
        """Free both engines' memory."""
        self.step.close()
        self.prefill.close()
