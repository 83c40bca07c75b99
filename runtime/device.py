"""Tensors that stay where a runner computed them, and are copied to the host only when they are read.

The KV cache of a decoder is the next call's input, and the host never reads it: copied out and in again at every token, it
would cost more than the token. The same holds for the coordinates that `supervise` takes from its text-only pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


class DeviceTensor(ABC):
    """One tensor in the memory of one device. `np.asarray` copies it to the host.

    It keeps its memory as long as it lives; only runners of its own device can be fed with it without a copy.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def dtype(self) -> np.dtype: ...

    @abstractmethod
    def numpy(self) -> np.ndarray:
        """A copy on the host, once the device has computed it.

        Raises:
            RunFailed: what computes it failed.
        """

    def last(self) -> np.ndarray:
        """`[:, -1]` of a tensor `[batch, sequence, ...]`, on the host."""
        return self.numpy()[:, -1]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a tensor on a device cannot be seen from the host without a copy")
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)


Tensor = np.ndarray | DeviceTensor


class DeviceOutputs(Mapping[str, np.ndarray]):
    """A run's outputs by name, each copied to the host on first access.

    Attributes:
        tensors: the outputs on the device.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self._copied: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._copied:
            self._copied[name] = np.asarray(self.tensors[name])
        return self._copied[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors  # a mapping's own would look, and so copy

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class _View(Mapping[str, np.ndarray]):
    """A call's outputs, seen through a subclass; none is copied to the host before it is read."""

    def __init__(self, outputs: Mapping[str, np.ndarray]) -> None:
        self.outputs = outputs

    def __contains__(self, name: object) -> bool:
        return name in self.outputs

    def __iter__(self) -> Iterator[str]:
        return iter(self.outputs)

    def __len__(self) -> int:
        return len(self.outputs)


class FirstTokens(_View):
    """Outputs, some of them up to a token.

    Attributes:
        axes: name -> axis of tokens of those that are cut.
        tokens: how many remain.
    """

    def __init__(self, outputs: Mapping[str, np.ndarray], axes: Mapping[str, int], tokens: int) -> None:
        super().__init__(outputs)
        self.axes, self.tokens = axes, tokens

    def __getitem__(self, name: str) -> np.ndarray:
        whole = self.outputs[name]
        return whole[(slice(None),) * self.axes[name] + (slice(self.tokens),)] if name in self.axes else whole


class SomeRows(_View):
    """Some rows of a call's outputs, each `[batch, ...]`; none is copied to the host before it is read.

    Attributes:
        outputs: those of all rows.
        rows: which.
    """

    def __init__(self, outputs: Mapping[str, np.ndarray], rows: slice) -> None:
        super().__init__(outputs)
        self.rows = rows

    def __getitem__(self, name: str) -> np.ndarray:
        return self.outputs[name][self.rows]


def where_it_is(outputs: Mapping[str, np.ndarray], name: str) -> Tensor:
    """One output without a copy: on the device if that is where it was computed."""
    return outputs.tensors[name] if isinstance(outputs, DeviceOutputs) else outputs[name]


def last(outputs: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """An output `[batch, sequence, d]` at the last position, or one that is `[batch, d]` whole; no more of it is copied.

    The logits of a prompt of 2000 tokens are half a gigabyte for a vocabulary of 128000 in fp16, of which one row counts.
    """
    if isinstance(outputs, SomeRows):
        return last(outputs.outputs, name)[outputs.rows]
    found = where_it_is(outputs, name)
    if isinstance(found, DeviceTensor):
        return found.last() if len(found.shape) == 3 else found.numpy()
    return found[:, -1] if found.ndim == 3 else found
