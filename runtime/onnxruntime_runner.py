"""ONNX Runtime: on the CPU, or on a device where the KV cache stays from call to call."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..graphs.dtypes import ORT_DTYPES
from ..graphs.errors import ExtraMissing, ModelUnreadable, RunFailed, first_line
from ..graphs.extras import install_command
from ..graphs.reasons import out_of_memory
from ..graphs.whole_numbers import whole_number
from .device import DeviceTensor, Tensor
from .runner_protocol import Port, Runner

if TYPE_CHECKING:
    import onnxruntime

_CPU, _CUDA, _TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_PREFERRED_PROVIDERS = (_CUDA, _CPU)
# Name of a provider -> the providers to use, in order, and the advice if the first is missing.
_ON_GPU = f"on a machine with an NVIDIA GPU, remove onnxruntime and run: {install_command('gpu')}"
_NAMED: dict[str, tuple[tuple[str, ...], str]] = {
    "cpu": ((_CPU,), f"run: {install_command('cpu')}"),
    "cuda": ((_CUDA, _CPU), _ON_GPU),
    "tensorrt": ((_TENSORRT, _CUDA, _CPU), f"{_ON_GPU}; TensorRT 10's libraries must be there too"),
}
_ON_CUDA = (_CUDA, _TENSORRT)
_FOLDER_OPTION = "session.model_external_initializers_file_folder_path"
_NO_PACKING = "session.disable_prepacking"


class OnnxRuntimeRunner:
    """One graph in one session.

    Args:
        graph: path, or serialized bytes whose external data lies in `folder`.
        folder: folder of the external data.
        optimize: ONNX Runtime's graph optimisations on (all) or off.
        providers: execution providers in order; `None` takes CUDA when present, then CPU.
        fallback: whether a provider that does not start may be left out, which onnxruntime does silently.
        packs: whether onnxruntime may keep packed copies of weights.

    Raises:
        ExtraMissing: onnxruntime is not installed, or a provider that must start does not.
        ModelUnreadable: onnxruntime refuses the graph.
    """

    def __init__(
        self,
        graph: Path | bytes,
        folder: Path,
        optimize: bool = True,
        providers: tuple[str, ...] | None = None,
        fallback: bool = True,
        packs: bool = True,
    ) -> None:
        runtime = import_onnxruntime()
        options = runtime.SessionOptions()
        levels = runtime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
        # Errors come as exceptions; the log would print untrusted names unescaped.
        options.log_severity_level = 4
        if not packs:
            options.add_session_config_entry(_NO_PACKING, "1")
        chosen = providers or _preferred(runtime.get_available_providers())
        if isinstance(graph, bytes):
            options.add_session_config_entry(_FOLDER_OPTION, str(folder))
        try:
            source: Any = graph if isinstance(graph, bytes) else str(graph)
            self._session = runtime.InferenceSession(source, options, providers=list(chosen), enable_fallback=fallback)
        except Exception as error:  # onnxruntime raises a family of its own, not exported under one name
            where = "the graph" if isinstance(graph, bytes) else str(graph)
            on = "" if fallback or chosen[0] == _CPU else f" on the {chosen[0]}, which has to start"
            raise ModelUnreadable(f"{where}: onnxruntime cannot open it{on} {_why(error)}") from None
        self.inputs = {port.name: _port(port) for port in self._session.get_inputs()}
        self.optional = {port.name: _port(port) for port in self._session.get_overridable_initializers()}
        self.outputs = {port.name: _port(port) for port in self._session.get_outputs()}
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map

    @property
    def providers(self) -> tuple[str, ...]:
        """Execution providers in use, in order."""
        return tuple(self._session.get_providers())

    def close(self) -> None:
        """Give the session's memory back; the runner cannot be run any more."""
        del self._session
        if sys.platform == "linux":  # the C library keeps what was freed, and the next session would come on top of it
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name."""
        names = list(self.outputs)
        try:
            return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        except Exception as error:  # a family of its own again: shapes that the graph does not take, memory, ...
            raise RunFailed(f"onnxruntime cannot run the graph on these inputs ({first_line(error)})") from error


class OnnxRuntimeDeviceRunner(OnnxRuntimeRunner):
    """A session whose outputs stay on its device, bound there with `IOBinding`."""

    @property
    def device(self) -> str:
        """onnxruntime's name of the device of outputs: `cuda` or `cpu`."""
        return "cuda" if self.providers[0] in _ON_CUDA else "cpu"

    def run_on_device(self, feeds: Mapping[str, Tensor], step: bool = False) -> dict[str, Tensor]:
        """All outputs by name, on the device.

        Raises:
            RunFailed: an input is missing, or onnxruntime cannot run the graph on these.
        """
        missing = [name for name in self.inputs if name not in feeds]
        if missing:  # onnxruntime looks at bound inputs only when a node reads them, and not always then
            raise RunFailed(f"onnxruntime cannot run the graph on these inputs ({', '.join(missing)} is missing)")
        try:
            binding = self._session.io_binding()
            for name, fed in feeds.items():
                if isinstance(fed, OrtTensor) and fed.value.device_name() == self.device:
                    binding.bind_ortvalue_input(name, fed.value)
                elif name in self.optional:  # `bind_cpu_input` rejects inputs with defaults
                    binding.bind_ortvalue_input(
                        name, import_onnxruntime().OrtValue.ortvalue_from_numpy(np.asarray(fed))
                    )
                else:
                    binding.bind_cpu_input(name, np.asarray(fed, order="C"))
            for name in self.outputs:
                binding.bind_output(name, self.device)
            self._session.run_with_iobinding(binding)
            values = binding.get_outputs()
        except RunFailed:
            raise
        except Exception as error:  # a family of its own
            raise RunFailed(f"onnxruntime cannot run the graph on these inputs ({first_line(error)})") from error
        ports = self.outputs.values()
        return {port.name: OrtTensor(value, port.dtype) for port, value in zip(ports, values, strict=True)}


class OrtTensor(DeviceTensor):
    """An `OrtValue`.

    Attributes:
        value: the tensor, in onnxruntime's hands.
    """

    def __init__(self, value: Any, dtype: np.dtype) -> None:
        self.value = value
        self._dtype = dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape())

    @property
    def dtype(self) -> np.dtype:
        return self._dtype

    def numpy(self) -> np.ndarray:
        try:
            return self.value.numpy()
        except Exception as error:  # bfloat16 among others
            raise RunFailed(f"onnxruntime cannot copy {self.dtype} to the host ({first_line(error)})") from error


def open_onnxruntime(
    graph: Path | bytes, folder: Path, optimize: bool, provider: str | None, packs: bool = True
) -> Runner:
    """Open a graph in ONNX Runtime.

    Args:
        graph: path, or serialized bytes whose external data lies in `folder`.
        folder: folder of the external data.
        optimize: enable ONNX Runtime's graph optimisations.
        provider: `cpu`, `cuda` or `tensorrt`; `None`: CUDA if available, else CPU.
        packs: whether onnxruntime may keep packed copies of weights.

    Raises:
        ExtraMissing: the named provider is not available or does not start; there is no fallback.
        ModelUnreadable: onnxruntime refuses the graph.
    """
    available = import_onnxruntime().get_available_providers()
    if provider is None:
        providers, missing = _preferred(available), ""
    else:
        providers, missing = _NAMED[provider]
        if providers[0] not in available:
            raise ExtraMissing(f"this onnxruntime has no {providers[0]}, it has {', '.join(available)}; {missing}")
    kind = OnnxRuntimeDeviceRunner if providers[0] in _ON_CUDA else OnnxRuntimeRunner
    runner = kind(graph, folder, optimize, providers, fallback=provider is None, packs=packs)
    if runner.providers[0] == providers[0]:
        return runner
    if provider is not None:
        raise ExtraMissing(f"{providers[0]} does not start, onnxruntime would take {runner.providers[0]}; {missing}")
    return OnnxRuntimeRunner(
        graph, folder, optimize, (_CPU,), packs=packs
    )  # onnxruntime-gpu on a machine without a GPU


# Words in the reason -> advice. "Is the file complete?" appears only where that can be the reason.
_WHAT_TO_DO: tuple[tuple[str, str], ...] = (
    (
        r"(?i)protobuf parsing failed|no graph was found|file doesn't exist|path does not exist|size mismatch"
        r"|out of bounds or can ?not be read",
        "is the file complete?",
    ),
    (
        r"operator .* is unknown",
        "it needs a runtime with this operator; `vlmguard export --proof structure` guards the graph without running it",
    ),
    (r"No opset import", "its list of operator sets lacks this domain; export it again"),
    (r"escapes model directory", "external data must lie beside the graph; the file may be malicious, do not use it"),
    (r"newer than the newest|Unsupported model IR version", "update onnxruntime, or export it with an older version"),
    (
        r"Could not find an implementation",
        "this provider cannot run the operator in this precision; choose another one",
    ),
)


def _why(error: Exception) -> str:
    """`(reason); what to do`, of a graph that onnxruntime cannot open."""
    reason = first_line(error)
    if out_of_memory(error):
        return f"({reason}); the machine has too little free memory"
    advice = next((advice for pattern, advice in _WHAT_TO_DO if re.search(pattern, reason)), "export it again")
    return f"({reason}); {advice}"


def _preferred(available: Sequence[str]) -> tuple[str, ...]:
    """The default execution providers."""
    return tuple(name for name in _PREFERRED_PROVIDERS if name in available)


def import_onnxruntime() -> Any:
    """The module.

    Raises:
        ExtraMissing: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ExtraMissing(
            f"onnxruntime is not installed; run: {install_command('cpu')} (or {install_command('gpu')} for CUDA; not both)"
        ) from None
    return onnxruntime


def _port(argument: onnxruntime.NodeArg) -> Port:
    return Port(argument.name, ORT_DTYPES.get(argument.type, np.dtype(np.float32)), tuple(map(_size, argument.shape)))


def _size(size: int | str | None) -> int | None:
    """A static size, or `None`; transformers' exporter writes fixed sizes as digit strings in `dim_param`."""
    if isinstance(size, str):
        return whole_number(size)
    return size if size is not None and size >= 0 else None
