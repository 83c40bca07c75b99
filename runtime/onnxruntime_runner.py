"""ONNX Runtime: the CUDA provider when it is there, else the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ..graphs.errors import ExtraMissing, ModelUnreadable, RunFailed, first_line
from .runners import Port

if TYPE_CHECKING:
    import onnxruntime

_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
_PREFERRED_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
_FOLDER_OPTION = "session.model_external_initializers_file_folder_path"


class OnnxRuntimeRunner:
    """One graph in one session.

    Args:
        graph: path, or serialized bytes whose external data lies in `folder`.
        folder: where external data is looked for.
        optimize: ONNX Runtime's graph optimisations on (all) or off.
        providers: execution providers in order; `None` takes CUDA when present, then CPU.

    Raises:
        ExtraMissing: onnxruntime is not installed.
        ModelUnreadable: onnxruntime refuses the graph.
    """

    def __init__(
        self, graph: Path | bytes, folder: Path, optimize: bool = True, providers: tuple[str, ...] | None = None
    ) -> None:
        runtime = import_onnxruntime()
        options = runtime.SessionOptions()
        levels = runtime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
        options.log_severity_level = 3
        present = runtime.get_available_providers()
        chosen = providers or tuple(name for name in _PREFERRED_PROVIDERS if name in present)
        if isinstance(graph, bytes):
            options.add_session_config_entry(_FOLDER_OPTION, str(folder))
        try:
            source: Any = graph if isinstance(graph, bytes) else str(graph)
            self._session = runtime.InferenceSession(source, options, providers=list(chosen))
        except Exception as error:  # onnxruntime raises a family of its own, not exported under one name
            where = "the graph" if isinstance(graph, bytes) else str(graph)
            raise ModelUnreadable(
                f"{where}: onnxruntime cannot open it ({first_line(error)}); is the file complete?"
            ) from None
        self.inputs = {port.name: _port(port) for port in self._session.get_inputs()}
        self.outputs = {port.name: _port(port) for port in self._session.get_outputs()}

    @property
    def providers(self) -> tuple[str, ...]:
        """Execution providers in use, in order."""
        return tuple(self._session.get_providers())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = list(self.outputs)
        try:
            return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        except Exception as error:  # a family of its own again: shapes that the graph does not take, memory, ...
            raise RunFailed(f"onnxruntime cannot run the graph on these inputs ({first_line(error)})") from error


def import_onnxruntime() -> Any:
    """The module.

    Raises:
        ExtraMissing: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ExtraMissing(
            "onnxruntime is not installed; install vlmguard[cpu], or vlmguard[gpu] for CUDA (not both)"
        ) from None
    return onnxruntime


def _port(argument: onnxruntime.NodeArg) -> Port:
    return Port(argument.name, np.dtype(_NUMPY.get(argument.type, np.float32)), tuple(map(_size, argument.shape)))


def _size(size: int | str | None) -> int | None:
    """A static size, or `None`; transformers' exporter writes fixed sizes as digit strings in `dim_param`."""
    if isinstance(size, str):
        return int(size) if size.isdigit() else None
    return size if size is not None and size >= 0 else None
