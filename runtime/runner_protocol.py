"""The runner protocol: what can execute a graph, and what some of these can do besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from .device import Tensor


@dataclass(frozen=True)
class Port:
    """One input or output of a graph; unknown dimensions are `None`."""

    name: str
    dtype: np.dtype
    shape: tuple[int | None, ...]


class Runner(Protocol):
    """Executes one graph."""

    @property
    def inputs(self) -> Mapping[str, Port]: ...

    @property
    def outputs(self) -> Mapping[str, Port]: ...

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name."""
        ...


@runtime_checkable
class OverridableRunner(Runner, Protocol):
    """A runner that supports inputs with defaults (overridable initializers), which feeds may omit."""

    @property
    def optional(self) -> Mapping[str, Port]: ...


@runtime_checkable
class DescribedRunner(Runner, Protocol):
    """A runner that knows what is written in the graph's metadata."""

    @property
    def metadata(self) -> Mapping[str, str]: ...


@runtime_checkable
class ClosableRunner(Runner, Protocol):
    """A runner that can give its memory back before it is forgotten."""

    def close(self) -> None:
        """End it; it is not run any more."""
        ...


@runtime_checkable
class DeviceRunner(Runner, Protocol):
    """A runner with memory of its own, in which outputs can stay until the next call."""

    def run_on_device(self, feeds: Mapping[str, Tensor], step: bool = False) -> Mapping[str, Tensor]:
        """All outputs by name, where they were computed.

        Args:
            feeds: arrays, and tensors that runners of the same device gave; those are not copied.
            step: one more token of a generation: the same shapes may come again, and recording the call may pay.

        Raises:
            RunFailed: the graph does not take these inputs, or the device failed.
        """
        ...
