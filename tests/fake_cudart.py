"""`cuda.bindings.runtime` on host memory, as strict as a device: what the tests of the TensorRT runner run on.

Work is queued and done only when the host waits for it, so that whoever reads too early, or frees too early, reads
garbage. Every address is checked against what was allocated; memory is garbage when it comes and when it goes.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

Work = Callable[[], None]


class Error(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class FakeCudart:
    """The module. Where a real device would be undefined, it is an AssertionError.

    Args:
        devices: how many there are.
        total: bytes of memory.

    Attributes:
        calls: how often each function was called.
        to_host, to_device: bytes of each copy.
        blocks: what is allocated, by address.
        forbids_capture: a capture fails at its end.
    """

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = IntEnum("cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2})
    cudaStreamCaptureMode = IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})

    def __init__(self, devices: int = 1, total: int = 2**30) -> None:
        self.devices, self.total = devices, total
        self.calls: Counter[str] = Counter()
        self.to_host: list[int] = []
        self.to_device: list[int] = []
        self.blocks: dict[int, np.ndarray] = {}
        self.streams: set[int] = set()
        self.graphs: set[int] = set()
        self.forbids_capture = False
        self._kept: list[Any] = []
        self._queue: list[Work] = []
        self._recording: list[Work] | None = None
        self._spoiled = False
        self._works: dict[int, list[Work]] = {}
        self._made = 0

    # Memory

    def cudaMalloc(self, size: int) -> tuple[Error, int]:
        self.calls["cudaMalloc"] += 1
        if size > self._free_bytes():
            return Error.cudaErrorMemoryAllocation, 0
        raw = np.full(size + 256, 0xCD, np.uint8)
        start = -raw.ctypes.data % 256
        self.blocks[raw.ctypes.data + start] = raw[start : start + size]
        return Error.cudaSuccess, raw.ctypes.data + start

    def cudaFree(self, address: int) -> tuple[Error]:
        self._do()
        block = self.blocks.pop(address)
        block[:] = 0xDD
        self._kept.append(block)  # never the host's again: who reads it after all reads garbage, and does not crash
        return (Error.cudaSuccess,)

    def cudaMemGetInfo(self) -> tuple[Error, int, int]:
        return Error.cudaSuccess, self._free_bytes(), self.total

    def memory(self, address: int, size: int) -> np.ndarray:
        """Bytes of the device, `[size]`; a view."""
        for start, block in self.blocks.items():
            if start <= address and address + size <= start + len(block):
                return block[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address:#x} lie in nothing that is allocated")

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[Error]:
        assert stream in self.streams and size > 0
        if self._recording is not None:  # of memory that is not pinned
            self._spoiled = True
            return (Error.cudaErrorStreamCaptureUnsupported,)
        if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice:
            self.to_device.append(size)
            self.enqueue(lambda: self.memory(target, size).__setitem__(slice(None), host_memory(source, size)))
        else:
            self.to_host.append(size)
            self.enqueue(lambda: host_memory(target, size).__setitem__(slice(None), self.memory(source, size)))
        return (Error.cudaSuccess,)

    # Streams

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Error, int]:
        assert flags == self.cudaStreamNonBlocking
        self.streams.add(handle := 77 + len(self.streams))
        return Error.cudaSuccess, handle

    def cudaStreamDestroy(self, stream: int) -> tuple[Error]:
        self.streams.remove(stream)
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:
        assert stream in self.streams
        if self._recording is not None:
            self._spoiled = True
            return (Error.cudaErrorStreamCaptureUnsupported,)
        self._do()
        return (Error.cudaSuccess,)

    def enqueue(self, work: Work) -> None:
        """Do it later: at the next wait, or, while recording, at each launch."""
        (self._queue if self._recording is None else self._recording).append(work)

    # Graphs

    @property
    def recording(self) -> bool:
        return self._recording is not None

    def spoil(self) -> None:
        """Something was enqueued that cannot be recorded."""
        self._spoiled = True

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Error]:
        assert stream in self.streams and not self.recording
        self.calls["cudaStreamBeginCapture"] += 1
        self._recording, self._spoiled = [], self.forbids_capture
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Error, Any]:
        assert self._recording is not None
        works, self._recording = self._recording, None
        return (Error.cudaErrorStreamCaptureInvalidated, None) if self._spoiled else (Error.cudaSuccess, works)

    def cudaGraphInstantiate(self, graph: list[Work], flags: int) -> tuple[Error, int]:
        self._made += 1
        handle = 1000 + self._made
        self._works[handle] = list(graph)
        self.graphs.add(handle)
        return Error.cudaSuccess, handle

    def cudaGraphDestroy(self, graph: list[Work]) -> tuple[Error]:
        graph.clear()
        return (Error.cudaSuccess,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Error]:
        assert graph in self.graphs and stream in self.streams
        self.calls["cudaGraphLaunch"] += 1
        for work in self._works[graph]:
            self.enqueue(work)
        return (Error.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Error]:
        self._do()  # a graph that still runs would be destroyed under the device's hands; here it runs to its end
        self.graphs.remove(graph)
        del self._works[graph]
        return (Error.cudaSuccess,)

    # The device

    def cudaGetDeviceCount(self) -> tuple[Error, int]:
        return (Error.cudaSuccess, self.devices) if self.devices else (Error.cudaErrorNoDevice, 0)

    def cudaSetDevice(self, device: int) -> tuple[Error]:
        assert 0 <= device < self.devices
        return (Error.cudaSuccess,)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Error, Any]:
        return Error.cudaSuccess, SimpleNamespace(name=b"Fake GPU\0", major=12, minor=0)

    def cudaGetLastError(self) -> tuple[Error]:
        return (Error.cudaSuccess,)

    def cudaGetErrorName(self, error: Error) -> tuple[Error, bytes]:
        return Error.cudaSuccess, error.name.encode()

    def cudaGetErrorString(self, error: Error) -> tuple[Error, bytes]:
        return Error.cudaSuccess, b"as it says"

    @property
    def nothing_left(self) -> bool:
        """Whether everything was given back."""
        return not (self.blocks or self.streams or self.graphs)

    def _free_bytes(self) -> int:
        return self.total - sum(map(len, self.blocks.values()))

    def _do(self) -> None:
        queue, self._queue = self._queue, []
        for work in queue:
            work()


def host_memory(address: int, size: int) -> np.ndarray:
    """Bytes of the host, `[size]`; a view."""
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (size,))
