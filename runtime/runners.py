"""The runner protocol and its table: what can execute a graph. A new runtime is one module and one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ..graphs.errors import GuardError
from ..graphs.package import external_files, in_memory, load_graph


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


# path or serialized graph, folder of its external data, options -> runner
OpenRunner = Callable[[Path | bytes, Path], Runner]


def open_runner(graph: Path | bytes, folder: Path, runtime: str = "onnxruntime", optimize: bool = True) -> Runner:
    """Open a graph with one of the runtimes.

    Args:
        graph: path, or serialized graph whose external data lies in `folder`.
        folder: where the graph's external data is.
        runtime: a row of the table.
        optimize: whether the runtime may fuse and reorder; off shows the graph exactly as it is written.

    Raises:
        GuardError: the runtime is unknown.
        ExtraMissing: it is not installed.
    """
    if runtime not in _RUNNERS:
        raise GuardError(f"runtime {runtime!r} is unknown; choose one of {', '.join(_RUNNERS)}")
    if isinstance(graph, Path) and _by_reference(graph):
        graph, folder = in_memory(load_graph(graph), graph.parent)  # weights by reference, see `in_memory`
    return _RUNNERS[runtime](graph, folder, optimize)


def _by_reference(graph: Path) -> bool:
    """Whether its external data are links. Most folders have none, and then their graph need not be read to know it."""
    if graph.is_symlink() or not any(path.is_symlink() for path in graph.parent.rglob("*")):
        return False
    return any(data.is_symlink() for data in external_files(graph))


def _onnxruntime(graph: Path | bytes, folder: Path, optimize: bool) -> Runner:
    from .onnxruntime_runner import OnnxRuntimeRunner

    return OnnxRuntimeRunner(graph, folder, optimize=optimize)


_RUNNERS: dict[str, Callable[[Path | bytes, Path, bool], Runner]] = {"onnxruntime": _onnxruntime}
