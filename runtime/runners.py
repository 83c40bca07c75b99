"""The runner protocol and its table: what can execute a graph. A new runtime is one module and one row."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..graphs.errors import GuardError
from ..graphs.graph_io import external_files, in_memory, load_graph
from ..graphs.inline_weights import read_outline
from .runner_protocol import Runner

# path or serialized graph, folder of its external data, whether to optimise, whether to pack weights -> runner
_Open = Callable[[Path | bytes, Path, bool, bool], Runner]


def open_runner(
    graph: Path | bytes, folder: Path, runtime: str = "onnxruntime", optimize: bool = True, packs: bool = True
) -> Runner:
    """Open a graph with one of the runtimes.

    Args:
        graph: path, or serialized graph whose external data lies in `folder`.
        folder: where the graph's external data is.
        runtime: a row of the table.
        optimize: whether the runtime may fuse and reorder; off shows the graph exactly as it is written.
        packs: whether the runtime may keep packed copies of weights, which make products faster; off leaves mapped weights
            in their file.

    Raises:
        GuardError: the runtime is unknown, or runs engines and no graphs.
        ExtraMissing: it is not installed.
    """
    if runtime in _ENGINE_RUNTIMES:
        what = graph.name if isinstance(graph, Path) else "a graph in memory"
        raise GuardError(
            f"{runtime} runs engines, not {what}; build one with `vlmguard engine`, and open the folder that it writes"
        )
    if runtime not in _RUNNERS:
        raise GuardError(f"runtime {runtime!r} is unknown; choose one of {', '.join(_RUNNERS)}")
    if isinstance(graph, Path) and (_by_reference(graph) or read_outline(graph) is not None):
        # weights by reference, or mapped from inside the file: see `in_memory`
        graph, folder = in_memory(load_graph(graph, trust_links=True), graph.parent)
    return _RUNNERS[runtime](graph, folder, optimize, packs)


def _by_reference(graph: Path) -> bool:
    """Whether its external data are links. A folder with plain files alone has none, and its graph need not be read.

    Only the graph's own folder is listed: a bare model may lie in a home folder.
    """
    with os.scandir(graph.parent) as entries:
        if graph.is_symlink() or not any(entry.is_symlink() or entry.is_dir() for entry in entries):
            return False
    return any(data.is_symlink() for data in external_files(graph))


def _onnxruntime(provider: str | None) -> _Open:
    def opened(graph: Path | bytes, folder: Path, optimize: bool, packs: bool) -> Runner:
        from .onnxruntime_runner import open_onnxruntime

        return open_onnxruntime(graph, folder, optimize, provider, packs)

    return opened


_RUNNERS: dict[str, _Open] = {
    "onnxruntime": _onnxruntime(None),  # CUDA when it is there, else the CPU
    "onnxruntime-cpu": _onnxruntime("cpu"),
    "onnxruntime-cuda": _onnxruntime("cuda"),
    "onnxruntime-tensorrt": _onnxruntime("tensorrt"),
}
# These runtimes load engines, which are executable code built ahead of time: an engine is opened only against a digest
# (tensorrt/engine_runner.py).
_ENGINE_RUNTIMES = ("tensorrt", "tensorrt_rtx")
