"""A fake device with a fake TensorRT on it, for tests of what runs engines."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from fake_cudart import FakeCudart
from fake_tensorrt import FakeTensorRT, Profile, fake_engine
from tiny_vlm_paths import DECODER, SOURCE

from vlmguard.graphs.layouts import open_package
from vlmguard.runtime.decoder import DecoderSession
from vlmguard.runtime.tensorrt.backend import Backend, BackendName, Log
from vlmguard.runtime.tensorrt.cuda import Cuda
from vlmguard.runtime.tensorrt.engine_runner import TensorRTRunner
from vlmguard.runtime.vlm import VisionLanguageModel


class Rig:
    """A fake device with a fake TensorRT on it, and what opens engines there."""

    def __init__(self, name: BackendName = "tensorrt", cache: Path | None = None, **of_device: Any) -> None:
        self.cudart = FakeCudart(**of_device)
        self.trt = FakeTensorRT(self.cudart)
        self.backend = Backend(name, self.trt, Log(self.trt))
        self.cuda = Cuda(self.cudart)
        self._cache = cache

    def open(self, content: bytes, **options: Any) -> TensorRTRunner:
        digest = hashlib.sha256(content).hexdigest()
        options = {"cuda": self.cuda, "runtime_cache": self._cache} | options
        return TensorRTRunner(content, digest, self.backend, **options)

    def decoder(self, *profiles: Profile, graph: Path = SOURCE / DECODER, **options: Any) -> DecoderSession:
        return DecoderSession(self.open(fake_engine(graph, profiles or ({},)), **options))

    def model(self, folder: Path) -> VisionLanguageModel:
        package = open_package(folder)
        return VisionLanguageModel(package, open_part=lambda path: self.open(fake_engine(path)), pads=True)
