"""Execution contexts of an engine: one per optimisation profile, and calls that were recorded as CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...graphs.errors import RunFailed
from .backend import Backend, Message, why
from .cuda import Cuda
from .kernel_cache import RuntimeCache

Shapes = Mapping[str, tuple[int, ...]]
_GRAPHS = 8  # recorded calls of one engine; each has an execution context of its own, with its memory
_REMEMBERED = 4096  # calls of which it is known that they were met once


@dataclass(frozen=True)
class Call:
    """One run of an engine, complete but for the values.

    Attributes:
        profile: number of the optimisation profile.
        shapes: of all inputs.
        addresses: of all inputs and outputs, on the device or, for shape tensors, on the host.
    """

    profile: int
    shapes: Shapes
    addresses: Mapping[str, int]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for calls that can replay the same recorded graph."""
        return self.profile, tuple(self.shapes.items()), tuple(self.addresses.items())


class Contexts:
    """Runs calls, and records those that come again.

    TensorRT-RTX records by itself (`CudaGraphStrategy`). For TensorRT it is done here: a step that is met a second time,
    shapes and addresses alike, gets an execution context of its own, runs in it once (TensorRT finishes what changed
    shapes ask of it in that call), and is recorded; from the third time on it is launched as one graph. Its own context,
    because a graph is undefined once its context was given other shapes. A cache that grows by a token a step has other
    shapes at every step of one answer: then only another answer of the same length meets a step again. The first few
    are recorded and none is ever dropped, so that a long answer does not record each step anew.

    Args:
        cuda_graph: whether steps may be recorded.
        path: file of TensorRT-RTX's runtime cache, if one is kept; nothing to TensorRT.

    Raises:
        RunFailed: (all methods) TensorRT refuses; the sentence has its reason.
    """

    def __init__(self, backend: Backend, engine: Any, cuda: Cuda, cuda_graph: bool, path: Path | None) -> None:
        self._backend, self._cuda = backend, cuda
        self._engine: Any = engine
        self._config: Any = None
        self._cache: RuntimeCache | None = None
        self._uncached: set[int] = set()  # profiles whose kernels are compiled, but not yet kept
        if backend.is_rtx:
            self._config, self._cache = _rtx_config(backend, engine, cuda_graph, path)
        self._records = cuda_graph and not backend.is_rtx
        self._by_profile: dict[int, _Context] = {}
        self._graphs: dict[tuple[object, ...], tuple[_Context, Any]] = {}
        self._met: set[tuple[object, ...]] = set()

    def at(self, profile: int) -> _Context:
        """The profile's context."""
        if profile not in self._by_profile:
            self._by_profile[profile] = self._create(profile)
            self._uncached.add(profile)
        return self._by_profile[profile]

    def execute(self, call: Call, step: bool) -> None:
        """Enqueue a call, for which the profile's context was shaped.

        Args:
            step: it may come again with the same shapes and addresses, and nothing else decides what it does.
        """
        key = call.key if step and self._records else None
        if key in self._graphs:
            self._cuda.launch(self._graphs[key][1])
        elif key is None or key not in self._met or len(self._graphs) >= _GRAPHS:
            if key is not None:
                if len(self._met) >= _REMEMBERED:
                    self._met.clear()
                self._met.add(key)
            self.at(call.profile).enqueue(call.addresses)
        else:
            self._record(call, key)
        if call.profile in self._uncached:  # a process that is killed later shall not have compiled in vain
            self._uncached.discard(call.profile)
            self._save()

    def close(self) -> None:
        """Save newly compiled kernels and release everything. No call may be running."""
        self._save()
        for _, graph in self._graphs.values():
            self._cuda.free_graph(graph)
        self._graphs.clear()
        self._by_profile.clear()
        self._config = self._cache = self._engine = None

    def _save(self) -> None:
        if self._cache is not None:
            self._cache.save()

    def _record(self, call: Call, key: tuple[object, ...]) -> None:
        """Run the call, and record it for the next time. Where that fails the answer is there all the same."""
        try:
            context = self._create(call.profile)
            context.shape(call.shapes, {})
        except RunFailed:  # no memory for one more context
            self._records = False
            self.at(call.profile).enqueue(call.addresses)
            return
        context.enqueue(call.addresses)
        try:
            self._graphs[key] = context, self._cuda.capture(lambda: context.enqueue(call.addresses))
        except RunFailed:  # something in this engine cannot be recorded; it will not be at the next step either
            self._records = False
            self._cuda.synchronize()  # before the context goes

    def _create(self, profile: int) -> _Context:
        with self._backend.log.recording() as messages:
            given = () if self._config is None else (self._config,)
            context = self._engine.create_execution_context(*given)
            if context is None or not context.set_optimization_profile_async(profile, self._cuda.stream):
                raise RunFailed(f"{self._backend.name} cannot prepare the engine's profile {profile} ({why(messages)})")
        return _Context(self._backend, self._engine, context, self._cuda)


class _Context:
    """One `IExecutionContext`, and the shapes that it has."""

    def __init__(self, backend: Backend, engine: Any, context: Any, cuda: Cuda) -> None:
        self._backend, self._context, self._cuda = backend, context, cuda
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        modes = backend.module.TensorIOMode
        self._outputs = [name for name in names if engine.get_tensor_mode(name) == modes.OUTPUT]
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._given: dict[str, tuple[int, ...]] = {}

    def shape(self, shapes: Shapes, values: Mapping[str, np.ndarray]) -> Shapes:
        """Set the inputs' shapes, and what shape tensors hold; the outputs' shapes follow."""
        if shapes == self._shapes and not values:
            return self._given
        self._shapes = {}
        with self._backend.log.recording() as messages:
            for name, shape in shapes.items():
                if not self._context.set_input_shape(name, shape):
                    raise self._refusal(f"takes no {name!r} of shape {shape}", messages)
            for name, array in values.items():
                self._context.set_tensor_address(name, array.ctypes.data)
            try:
                missing = self._context.infer_shapes()
            except RuntimeError:
                raise self._refusal("cannot infer the outputs' shapes", messages) from None
        if missing:
            raise self._refusal(f"misses the shape of {missing[0]!r}", messages)
        self._given = {name: tuple(self._context.get_tensor_shape(name)) for name in self._outputs}
        for name, shape in self._given.items():
            if any(size < 0 for size in shape):
                raise RunFailed(
                    f"the shape of the engine's output {name!r} depends on values; export without such an output"
                )
        self._shapes = dict(shapes)
        return self._given

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        with self._backend.log.recording() as messages:
            for name, address in addresses.items():
                if not self._context.set_tensor_address(name, address):
                    raise self._refusal(f"takes no address for {name!r}", messages)
            if not self._context.execute_async_v3(self._cuda.stream):
                raise self._refusal("cannot run the engine on these inputs", messages)

    def _refusal(self, what: str, messages: list[Message]) -> RunFailed:
        return RunFailed(f"{self._backend.name} {what} ({why(messages)})")


def _rtx_config(backend: Backend, engine: Any, cuda_graph: bool, path: Path | None) -> tuple[Any, RuntimeCache]:
    """TensorRT-RTX's settings for contexts: recording, and previously compiled kernels."""
    config = engine.create_runtime_config()
    strategies = backend.module.CudaGraphStrategy
    config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if cuda_graph else strategies.DISABLED
    raw = config.create_runtime_cache()
    cache = RuntimeCache(raw, path)
    config.set_runtime_cache(raw)
    return config, cache
