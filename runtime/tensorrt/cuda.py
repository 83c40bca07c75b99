"""One CUDA device: memory, copies, one stream, recorded graphs. A thin class over `cuda.bindings.runtime`.

Everything is enqueued on one stream of its own, so that a buffer can be used again as soon as the host has enqueued its
last use: the device comes to the next use later. Only copies to the host wait.
"""

from __future__ import annotations

import contextlib
import heapq
import importlib
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from ...graphs.errors import ExtraMissing, GuardError, RunFailed
from ...graphs.extras import install_command
from ..device import DeviceTensor

ALIGNMENT = 256  # bytes: that of cudaMalloc, which TensorRT requires


class Cuda:
    """The first visible device (`CUDA_VISIBLE_DEVICES` chooses it).

    Args:
        api: `cuda.bindings.runtime`, or a module with its functions; default: the installed one.

    Attributes:
        stream: handle of the stream on which everything is enqueued.
        name: such as `NVIDIA GeForce RTX 5090`.
        compute_capability: such as `(12, 0)`.

    Raises:
        ExtraMissing: cuda-bindings is not installed.
        GuardError: there is no driver, or no device.
    """

    def __init__(self, api: Any = None) -> None:
        self._api = import_cudart() if api is None else api
        error, count = self._api.cudaGetDeviceCount()
        if error.value != 0 or not count:
            found = self._describe(error) if error.value != 0 else "the driver lists none"
            raise GuardError(f"no CUDA device ({found}); run it on a machine with an NVIDIA GPU and its driver")
        self._call("cudaSetDevice", 0)
        properties = self._call("cudaGetDeviceProperties", 0)
        self.name: str = properties.name.decode().rstrip("\0")
        self.compute_capability: tuple[int, int] = properties.major, properties.minor
        # Not the default stream: TensorRT adds synchronisations to that one, and it cannot be captured.
        self.stream = int(self._call("cudaStreamCreateWithFlags", self._api.cudaStreamNonBlocking))
        self._sources: list[np.ndarray] = []  # being copied in: must live until the stream has passed them
        # Runners that share a device cannot detect the last one; when no reference is left, nothing is on its stream.
        self._finalizer = weakref.finalize(self, self._api.cudaStreamDestroy, self.stream)
        self._finalizer.atexit = (
            False  # the exit of the process frees everything, and the driver may already be unloaded
        )

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""
        return self._call("cudaMemGetInfo")

    def allocate(self, size: int) -> int:
        """Address of `size` bytes. Plain cudaMalloc: `Pool` calls it rarely, and every driver and every Jetson has it."""
        try:
            return int(self._call("cudaMalloc", max(size, 1)))
        except RunFailed as error:
            free, total = self.memory()
            raise RunFailed(
                f"no {size / 2**20:.0f} MiB on {self.name}, {free / 2**20:.0f} of {total / 2**20:.0f} MiB are free "
                f"({error}); take a smaller batch or shorter prompts"
            ) from None

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def copy_in(self, address: int, array: np.ndarray) -> None:
        """Enqueue a copy of a C-contiguous array to the device; the array must not be changed before `synchronize`."""
        if array.nbytes:
            self._sources.append(array)
            kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
            self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)

    def copy_out(self, array: np.ndarray, address: int) -> None:
        """Enqueue a copy from the device into a C-contiguous array; it is there after `synchronize`."""
        if array.nbytes:
            kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)

    def hold(self, array: np.ndarray) -> None:
        """Keep an array that the stream reads or writes where it is until `synchronize`."""
        self._sources.append(array)

    def synchronize(self) -> None:
        """Wait for everything that was enqueued."""
        if self.stream:
            self._call("cudaStreamSynchronize", self.stream)
        self._sources.clear()

    def capture(self, work: Callable[[], None]) -> Any:
        """Record what `work` enqueues, without running it: an executable graph for `launch`.

        Raises:
            RunFailed: something in it cannot be recorded.
        """
        # thread-local: allocations of other threads are no business of this recording
        self._call(
            "cudaStreamBeginCapture", self.stream, self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )
        try:
            work()
        except BaseException:
            with contextlib.suppress(RunFailed):  # the stream must leave the capture; report the first error
                self._call("cudaGraphDestroy", self._call("cudaStreamEndCapture", self.stream))
            raise
        graph = self._call("cudaStreamEndCapture", self.stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        self._call("cudaGraphLaunch", graph, self.stream)

    def free_graph(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Wait, and give the stream back. Memory and graphs are their owners' to free."""
        if self.stream:
            self.synchronize()
            self._finalizer.detach()
            self._call("cudaStreamDestroy", self.stream)
            self.stream = 0

    def _call(self, function: str, *arguments: Any) -> Any:
        """The result of a runtime function; the bindings give `(error, result, ...)`."""
        error, *results = getattr(self._api, function)(*arguments)
        if error.value != 0:
            self._api.cudaGetLastError()  # a failed capture must not be reported again by the next call
            raise RunFailed(f"{function} failed: {self._describe(error)}")
        return results[0] if len(results) == 1 else tuple(results)

    def _describe(self, error: Any) -> str:
        names = (self._api.cudaGetErrorName(error)[1], self._api.cudaGetErrorString(error)[1])
        return ": ".join(name.decode() for name in names)


def import_cudart() -> Any:
    """The module `cuda.bindings.runtime`.

    Raises:
        ExtraMissing: it is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")  # compiled: a checker finds nothing to import
    except ImportError:
        raise ExtraMissing(
            f"cuda-bindings is not installed; run: {install_command('tensorrt')} (or {install_command('rtx')} for RTX GPUs)"
        ) from None


class Buffer:
    """Memory on the device, returned to the pool when no reference is left."""

    __slots__ = ("_pool", "address", "size")

    def __init__(self, pool: Pool, address: int, size: int) -> None:
        self._pool, self.address, self.size = pool, address, size

    def __del__(self) -> None:
        self._pool._give_back(self.address, self.size)


class BufferPart:
    """Memory inside a buffer, which it keeps."""

    __slots__ = ("_whole", "address")

    def __init__(self, whole: Buffer, offset: int) -> None:
        self._whole, self.address = whole, whole.address + offset


class Pool:
    """Buffers of a few sizes for reuse: a warm decode step allocates nothing.

    There are four sizes per factor of two, so at most a quarter of a buffer is wasted and a cache that grows by a token per
    step stays in its buffers for many steps. A request receives the free buffer with the lowest address: the same sequence of
    requests and releases gives the same addresses, so a recorded CUDA graph can be replayed.

    Args:
        own: whether closing the pool closes the device.
    """

    def __init__(self, cuda: Cuda, own: bool = False) -> None:
        self.cuda = cuda
        self.open = True
        self._own = own
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self._held = 0

    def take(self, size: int) -> Buffer:
        """At least `size` bytes; also for 0 bytes there is an address, because TensorRT takes no null pointer.

        Raises:
            RunFailed: the device has no memory left.
        """
        size = _rounded(size)
        if self._free[size]:
            address = heapq.heappop(self._free[size])
        else:
            address = self._allocate(size)
        self._held += 1
        return Buffer(self, address, size)

    def trim(self) -> None:
        """Free memory without references."""
        self.cuda.synchronize()
        for addresses in self._free.values():
            while addresses:
                self.cuda.free(addresses.pop())

    def close(self) -> None:
        """Free memory without references now, and the rest when its references end: what was computed can still be read."""
        if self.open:
            self.open = False
            self.trim()
            self._end()

    def _allocate(self, size: int) -> int:
        try:
            return self.cuda.allocate(size)
        except RunFailed:
            if not any(self._free.values()):
                raise
            self.trim()
            return self.cuda.allocate(size)

    def _give_back(self, address: int, size: int) -> None:
        self._held -= 1
        heapq.heappush(self._free[size], address)
        if not self.open:
            self.trim()
            self._end()

    def _end(self) -> None:
        if self._own and not self._held:
            self.cuda.close()


def _rounded(size: int) -> int:
    step = max(ALIGNMENT, 1 << max(0, (size - 1).bit_length() - 3))  # an eighth of the power of two that holds it
    return max(ALIGNMENT, -(-size // step) * step)


class CudaTensor(DeviceTensor):
    """A C-contiguous tensor in a pool's buffer."""

    def __init__(self, buffer: Buffer | BufferPart, pool: Pool, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.buffer, self.pool = buffer, pool
        self._shape, self._dtype = shape, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> np.dtype:
        return self._dtype

    def numpy(self) -> np.ndarray:
        return self._copied(self.shape, [self.buffer.address])

    def last(self) -> np.ndarray:
        batch, sequence, *rest = self.shape
        row = int(np.prod(rest)) * self.dtype.itemsize
        ends = [self.buffer.address + ((number + 1) * sequence - 1) * row for number in range(batch)]
        return self._copied((batch, *rest), ends)

    def _copied(self, shape: tuple[int, ...], addresses: list[int]) -> np.ndarray:
        """An array of that shape whose equal parts lie at these addresses."""
        array = np.empty(shape, self.dtype)
        for part, address in zip(array.reshape(len(addresses), -1) if addresses else (), addresses, strict=True):
            self.pool.cuda.copy_out(part, address)
        self.pool.cuda.synchronize()
        return array
