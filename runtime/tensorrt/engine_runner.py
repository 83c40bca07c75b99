"""Engines of TensorRT and TensorRT-RTX behind the runner protocol.

An engine is executable code: it is deserialised only if its bytes have the expected digest, and what is
hashed is what is deserialised, not a file that could change in between.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ...graphs.errors import GuardError, ManifestMismatch, ModelUnreadable, RunFailed, first_line
from ...graphs.plan import SUPERVISOR_INPUT, number_of_input
from ..device import Tensor
from ..runner_protocol import Port
from .backend import Backend, why
from .cuda import Cuda, CudaTensor, Pool
from .execution_contexts import Call, Contexts, Shapes
from .kernel_cache import default_path
from .number_inputs import NumberInputs

_NUMPY = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "FP8": ml_dtypes.float8_e4m3fn,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


class TensorRTRunner:
    """One engine on one device. Closed when it is collected, or by `close`; what it computed can be read after that too.

    Args:
        engine: the file, or its bytes.
        sha256: hexadecimal digest that the engine must have, from a manifest or from the builder.
        backend: the TensorRT that built it.
        cuda: the device; runners that share one can be fed with one another's tensors. Default: a new one.
        cuda_graph: whether decode steps may be recorded and replayed (`Contexts`).
        runtime_cache: file for what TensorRT-RTX compiles on this machine; default: one in the user's cache folder.

    Raises:
        ManifestMismatch: the digest differs.
        ModelUnreadable: it is no engine, or one of another version or for another GPU.
        ExtraMissing, GuardError: there is no CUDA.
    """

    def __init__(
        self,
        engine: Path | bytes,
        sha256: str,
        backend: Backend,
        cuda: Cuda | None = None,
        cuda_graph: bool = True,
        runtime_cache: Path | None = None,
    ) -> None:
        where = "the engine" if isinstance(engine, bytes) else str(engine)
        content = _verified_content(engine, where, sha256)
        self._cuda = Cuda() if cuda is None else cuda
        try:
            runtime, loaded = _deserialise(content, where, backend)
            names = [loaded.get_tensor_name(number) for number in range(loaded.num_io_tensors)]
            modes, host = backend.module.TensorIOMode, backend.module.TensorLocation.HOST
            self._on_host = {name for name in names if loaded.get_tensor_location(name) == host}
            self._ports = {name: _port(loaded, name) for name in names if loaded.get_tensor_mode(name) == modes.INPUT}
            self.outputs = {name: _port(loaded, name) for name in names if loaded.get_tensor_mode(name) == modes.OUTPUT}
            numbers = range(loaded.num_optimization_profiles)
            self._profiles = [_profile(loaded, number, self._ports, self._on_host) for number in numbers]
            self._numbers = NumberInputs(self._ports, where) if any(map(number_of_input, self._ports)) else None
            self.inputs = self._ports if self._numbers is None else _stacked(self._ports, self._numbers)
            path = runtime_cache or default_path(sha256.lower())
            self._contexts = Contexts(backend, loaded, self._cuda, cuda_graph, path)
        except BaseException:
            if cuda is None:
                self._cuda.close()
            raise
        self._pool = Pool(self._cuda, own=cuda is None)
        self._finalizer = weakref.finalize(self, _close, self._contexts, self._pool, [loaded, runtime])

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """All outputs by name, on the host."""
        return {name: np.asarray(tensor) for name, tensor in self.run_on_device(feeds).items()}

    def run_on_device(self, feeds: Mapping[str, Tensor], step: bool = False) -> dict[str, Tensor]:
        """All outputs by name, on the device but for those that the engine itself computes on the host.

        Raises:
            RunFailed: an input is missing, unknown, of another dtype, or of a shape that no profile takes; or TensorRT,
                or the device, failed.
        """
        if not self._pool.open:
            raise RunFailed("the runner was closed; open the model again")
        self._require_ports(feeds)
        shapes = self._shapes(feeds)
        values = {name: np.array(feeds[name], order="C") for name in self._ports if name in self._on_host}
        profile = self._fitting(shapes, values)
        given = self._contexts.at(profile).shape(shapes, values)
        # These buffers may be released once the call is enqueued: their next user comes later in the stream.
        placed = self._all_placed(feeds)
        tensors = {n: self._output(port, given[n]) for n, port in self.outputs.items()}
        call = Call(profile, shapes, {name: _address(tensor) for name, tensor in (values | placed | tensors).items()})
        self._contexts.execute(call, step and not self._on_host)  # values on the host may change unseen
        for array in values.values():
            self._cuda.hold(array)
        if any(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
            self._cuda.synchronize()
        return tensors

    def close(self) -> None:
        """Free the device's memory, except tensors with references. Calling it again has no effect."""
        if self._numbers is not None:
            self._numbers.close()
        self._finalizer()

    def fits(self, feeds: Mapping[str, Tensor]) -> bool:
        """Whether some profile takes these shapes.

        Raises:
            RunFailed: an input is missing, unknown, of another dtype, or not of the coordinates' shape.
        """
        self._require_ports(feeds)
        shapes = self._shapes(feeds)
        return any(profile.takes(shapes, {}) for profile in self._profiles)

    def _shapes(self, feeds: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Of the engine's own inputs."""
        shapes = {name: tuple(feeds[name].shape) for name in self._ports if name in feeds}
        return shapes if self._numbers is None else shapes | self._numbers.shapes(feeds[SUPERVISOR_INPUT])

    def _require_ports(self, feeds: Mapping[str, Tensor]) -> None:
        """The device reads bytes: an input that is left out or of another type would be computed with, not refused."""
        missing = [name for name in self.inputs if name not in feeds]
        unknown = [name for name in feeds if name not in self.inputs]
        if missing or unknown:
            what = f"misses its input {missing[0]!r}" if missing else f"has no input {unknown[0]!r}"
            raise RunFailed(f"the engine {what}; it takes {', '.join(self.inputs)}")
        for name, port in self.inputs.items():
            if feeds[name].dtype != port.dtype:
                raise RunFailed(f"the engine takes {name!r} as {port.dtype}, not as {feeds[name].dtype}")

    def _fitting(self, shapes: Shapes, values: Mapping[str, np.ndarray]) -> int:
        """The profile that takes these shapes; of several the one that was tuned for the nearest."""
        held = {name: tuple(int(n) for n in array.reshape(-1)) for name, array in values.items()}
        fitting = [number for number, profile in enumerate(self._profiles) if profile.takes(shapes, held)]
        if fitting:
            return min(fitting, key=lambda number: self._profiles[number].distance(shapes))
        for name, shape in shapes.items():
            if not any(profile.shapes[name].holds(shape) for profile in self._profiles):
                ranges = " or ".join(dict.fromkeys(str(profile.shapes[name]) for profile in self._profiles))
                raise RunFailed(
                    f"input {name!r} has shape {shape}, the engine was built for {ranges}; send less, or build it with a "
                    "wider profile"
                )
        shown = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise RunFailed(
            f"no one profile of the engine takes these together: {shown[:300]}; build it with a wider profile"
        )

    def _all_placed(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The engine's own inputs on the device."""
        names = [name for name in self._ports if name in feeds and name not in self._on_host]
        placed: dict[str, Tensor] = {name: self._placed(feeds[name]) for name in names}
        return (
            placed if self._numbers is None else {**placed, **self._numbers.placed(feeds[SUPERVISOR_INPUT], self._pool)}
        )

    def _placed(self, fed: Tensor) -> CudaTensor:
        if isinstance(fed, CudaTensor) and fed.pool.cuda is self._cuda:
            return fed
        array = np.asarray(fed, order="C")
        buffer = self._pool.take(array.nbytes)
        self._cuda.copy_in(buffer.address, array)
        return CudaTensor(buffer, self._pool, array.shape, array.dtype)

    def _output(self, port: Port, shape: tuple[int, ...]) -> Tensor:
        if port.name in self._on_host:
            return np.zeros(shape, port.dtype)
        size = math.prod(shape) * port.dtype.itemsize
        return CudaTensor(self._pool.take(size), self._pool, shape, port.dtype)


@dataclass(frozen=True)
class _Range:
    """Of shapes, or of the values of a shape tensor: least, tuned for, most."""

    low: tuple[int, ...]
    best: tuple[int, ...]
    high: tuple[int, ...]

    def holds(self, sizes: tuple[int, ...]) -> bool:
        return len(sizes) == len(self.low) and all(
            low <= size <= high for low, size, high in zip(self.low, sizes, self.high, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.low}..{self.high}" if self.low != self.high else str(self.low)


@dataclass(frozen=True)
class _Profile:
    shapes: Mapping[str, _Range]
    values: Mapping[str, _Range]

    def takes(self, shapes: Shapes, values: Mapping[str, tuple[int, ...]]) -> bool:
        fit = all(self.shapes[name].holds(shape) for name, shape in shapes.items())
        return fit and all(self.values[name].holds(held) for name, held in values.items() if name in self.values)

    def distance(self, shapes: Shapes) -> float:
        pairs = (pair for name, shape in shapes.items() for pair in zip(shape, self.shapes[name].best, strict=True))
        return sum(abs(math.log((size + 1) / (best + 1))) for size, best in pairs)


def _close(contexts: Contexts, pool: Pool, loaded: list[Any]) -> None:
    """Give everything back, in the order in which it can be: what uses goes before what is used."""
    pool.cuda.synchronize()
    contexts.close()
    while loaded:  # the engine before the runtime
        loaded.pop(0)
    pool.close()


def _verified_content(engine: Path | bytes, where: str, sha256: str) -> bytes:
    try:
        content = engine if isinstance(engine, bytes) else engine.read_bytes()
    except OSError as error:
        raise ModelUnreadable(
            f"{where}: cannot be read ({first_line(error)}); check the file and its permissions"
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256.lower():
        raise ManifestMismatch(
            f"{where}: its sha256 is {found[:12]}, not {sha256.lower()[:12]}; an engine is executable code and is not "
            "opened unless it is the one that was built; build it again"
        )
    return content


def _deserialise(content: bytes, where: str, backend: Backend) -> tuple[Any, Any]:
    """TensorRT's runtime, which has to outlive the engine, and the engine."""
    runtime = engine = None
    with (
        backend.log.recording() as messages,
        contextlib.suppress(RuntimeError, TypeError),
    ):  # a null pointer is a TypeError
        runtime = backend.module.Runtime(backend.log.logger)
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise ModelUnreadable(
            f"{where}: {backend.name} {backend.version} cannot load it ({why(messages)}); an engine runs on the version "
            "and the kind of GPU that it was built for; build it again here"
        )
    return runtime, engine


def _port(engine: Any, name: str) -> Port:
    kind = engine.get_tensor_dtype(name).name
    if kind not in _NUMPY:
        raise GuardError(f"the engine's {name!r} is of type {kind}, which cannot be fed or read; build it otherwise")
    shape = tuple(None if size < 0 else int(size) for size in engine.get_tensor_shape(name))
    return Port(name, np.dtype(_NUMPY[kind]), shape)


def _stacked(ports: Mapping[str, Port], numbers: NumberInputs) -> dict[str, Port]:
    """The inputs that a caller feeds: one tensor in place of the single coordinates."""
    own = {name: port for name, port in ports.items() if name not in numbers.names}
    return own | {numbers.port.name: numbers.port}


def _profile(engine: Any, number: int, inputs: Mapping[str, Port], on_host: Collection[str]) -> _Profile:
    shapes, values = {}, {}
    for name, port in inputs.items():
        low, best, high = (tuple(dims) for dims in engine.get_tensor_profile_shape(name, number))
        shapes[name] = _Range(low, best, high) if len(low) == len(port.shape) else _fixed(port)
        if name in on_host:
            # the bindings' own names of these two arguments are swapped: only their order is right
            found = engine.get_tensor_profile_values(number, name)
            if len(found) == 3:
                values[name] = _Range(*map(tuple, found))
    return _Profile(shapes, values)


def _fixed(port: Port) -> _Range:
    """The range of an input that no profile mentions."""
    low = tuple(0 if size is None else size for size in port.shape)
    high = tuple(2**31 - 1 if size is None else size for size in port.shape)
    return _Range(low, low, high)


def _address(tensor: Tensor) -> int:
    return tensor.buffer.address if isinstance(tensor, CudaTensor) else np.asarray(tensor).ctypes.data
