"""The text-only coordinates of an engine that takes each of them as an input of its own.

Callers feed one tensor `[batch, layers, rank]`, as to any other runner. The engine of decode steps has an input `[batch, 1, 1]`
for each number (`graphs.engine_plans`): TensorRT fuses those, but would start a new kernel to slice one tensor in each layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ...graphs.errors import ModelUnreadable, RunFailed
from ...graphs.plan import SUPERVISOR_INPUT, number_of_input
from ..device import DeviceTensor, Tensor
from ..runner_protocol import Port
from .cuda import ALIGNMENT, BufferPart, CudaTensor, Pool

_ITEM = np.dtype(np.float32)


class NumberInputs:
    """The inputs of one engine for single coordinates.

    Args:
        inputs: names of the engine's inputs; at least one of them is a coordinate.
        where: the engine's file, for messages.

    Attributes:
        names: of the inputs for single coordinates, in the order of the stacked tensor.
        layers: of the stacked tensor.
        rows: how many of each layer's coordinates are inputs, the first ones.

    Raises:
        ModelUnreadable: a layer lacks one of its inputs.
    """

    def __init__(self, inputs: Iterable[str], where: str) -> None:
        places = {place: name for name in inputs if (place := number_of_input(name)) is not None}
        numbers = sorted({layer for layer, _ in places})
        self.layers, self.rows = len(numbers), 1 + max(row for _, row in places)
        whole = [(layer, row) for layer in numbers for row in range(self.rows)]
        if whole != sorted(places):
            raise ModelUnreadable(f"{where}: its layers take different numbers of coordinates; build the engine again")
        self.names = tuple(places[place] for place in whole)
        self._last: tuple[Tensor, dict[str, Tensor]] | None = None

    @property
    def port(self) -> Port:
        """The stacked input that callers feed. An engine does not show its rank: some guards read the first rows alone."""
        return Port(SUPERVISOR_INPUT, _ITEM, (None, self.layers, None))

    def shapes(self, fed: Tensor) -> dict[str, tuple[int, ...]]:
        """The shape of each of the engine's own inputs.

        Raises:
            RunFailed: `fed` has another shape than `[batch, layers, rank]`.
        """
        if len(fed.shape) != 3 or fed.shape[1] != self.layers or fed.shape[2] < self.rows:
            raise RunFailed(
                f"input {SUPERVISOR_INPUT!r} has shape {tuple(fed.shape)}, the engine takes (batch, {self.layers}, "
                f"{self.rows} or more)"
            )
        return dict.fromkeys(self.names, (fed.shape[0], 1, 1))

    def placed(self, fed: Tensor, pool: Pool) -> Mapping[str, Tensor]:
        """Each coordinate on the device: one copy for all, in places that TensorRT accepts.

        A tensor that another engine left on the device is copied once for the whole answer, in which it does not change.
        """
        if self._last is not None and self._last[0] is fed:
            return self._last[1]
        columns = np.asarray(fed, _ITEM)[:, :, : self.rows].reshape(fed.shape[0], len(self.names)).T
        size = columns.shape[1] * _ITEM.itemsize
        stride = max(1, -(-size // ALIGNMENT)) * ALIGNMENT
        block = np.zeros((len(self.names), stride // _ITEM.itemsize), _ITEM)
        block[:, : columns.shape[1]] = columns
        buffer = pool.take(block.nbytes)
        pool.cuda.copy_in(buffer.address, block)
        tensors: dict[str, Tensor] = {
            name: CudaTensor(BufferPart(buffer, number * stride), pool, (columns.shape[1], 1, 1), _ITEM)
            for number, name in enumerate(self.names)
        }
        if isinstance(fed, DeviceTensor):  # an array may be changed in place between two calls
            self._last = fed, tensors
        return tensors

    def close(self) -> None:
        """Give the device's memory back."""
        self._last = None
