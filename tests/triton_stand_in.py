"""A stand-in for `triton_python_backend_utils`, the module of Triton's Python processes: a front model runs in this process.

Requests to other models go to onnxruntime, and only as their `config.pbtxt` allows, read with Triton's own schema. The real
server is `make integration NAME=triton`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

FINAL = 1
_NUMPY = {"BOOL": np.bool_, "INT32": np.int32, "INT64": np.int64, "FP16": np.float16, "FP32": np.float32}
_NUMPY |= {"STRING": np.object_, "UINT8": np.uint8, "INT8": np.int8, "FP64": np.float64}


def read_config(path: Path) -> Any:
    """A `config.pbtxt` as Triton reads it: an unknown field, a wrong type or a wrong enumeration raises."""
    return text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())


def numpy_type(data_type: int) -> type:
    return _NUMPY[model_config_pb2.DataType.Name(data_type).removeprefix("TYPE_")]


def full_shape(config: Any, tensor: Any) -> list[int]:
    """What a model takes or gives, its batch dimension included."""
    dims = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)
    return ([-1] if config.max_batch_size > 0 else []) + dims


def allows(shape: list[int], array: np.ndarray) -> bool:
    return len(shape) == array.ndim and all(size in (-1, found) for size, found in zip(shape, array.shape, strict=True))


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert array.ndim > 0  # Triton has no tensors without dimensions
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    INVALID_ARG = 3

    def __init__(self, message: str, code: int = 0) -> None:
        self.text, self.code = message, code

    def __str__(self) -> str:
        return self.text


class TritonModelException(Exception):
    pass


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors, error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class Sender:
    """Where a front model sends its responses; `listens` says after how many nobody does any more."""

    def __init__(self, listens: int) -> None:
        self.responses: list[InferenceResponse] = []
        self.ended, self._listens = 0, listens

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.ended, "a response after the last one"
        self.responses += [response] if response is not None else []
        self.ended += flags == FINAL

    def is_cancelled(self) -> bool:
        return len(self.responses) >= self._listens


class Request:
    """What a client sends to the front model; each input must be one that its config names."""

    def __init__(self, config: Any, inputs: Mapping[str, np.ndarray], listens: int = 1 << 30) -> None:
        known = {tensor.name: tensor for tensor in config.input}
        for name, array in inputs.items():
            assert allows(list(known[name].dims), array) and numpy_type(known[name].data_type) == array.dtype.type, name
        assert all(tensor.optional or name in inputs for name, tensor in known.items())
        self.inputs, self.sender = inputs, Sender(listens)

    def get_response_sender(self) -> Sender:
        return self.sender


class Repository:
    """A repository whose front model runs here.

    Attributes:
        asked: names of the models that were asked, in order.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configs = {path.parent.name: read_config(path) for path in folder.glob("*/config.pbtxt")}
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}
        self.asked: list[str] = []
        self.front = self._open_front()

    def ask(self, listens: int = 1 << 30, **inputs: Any) -> Sender:
        """One request; text and bytes become strings, the rest arrays of one element."""
        arrays = {
            name: np.array(
                [v.encode() if isinstance(v, str) else v], np.object_ if isinstance(v, str | bytes) else None
            )
            for name, v in inputs.items()
        }
        request = Request(self.configs["vlmguard"], arrays, listens)
        self.front.execute([request])
        assert request.sender.ended == 1
        for response in request.sender.responses:
            self._require_as_configured("vlmguard", response)
        return request.sender

    def _open_front(self) -> Any:
        name = "vlmguard"
        utils = self._utils()
        sys.modules[utils.__name__] = utils
        try:
            spec = importlib.util.spec_from_file_location("front_model", self.folder / name / "1" / "model.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
            try:
                spec.loader.exec_module(module)
            finally:
                sys.dont_write_bytecode = before
        finally:
            del sys.modules[utils.__name__]
        front = module.TritonPythonModel()
        config = json_format.MessageToDict(self.configs[name], preserving_proto_field_name=True)
        front.initialize({"model_config": json.dumps(config), "model_repository": str(self.folder / name)})
        return front

    def _utils(self) -> Any:
        utils: Any = ModuleType("triton_python_backend_utils")
        for one in (Tensor, TritonError, TritonModelException, InferenceResponse):
            setattr(utils, one.__name__, one)
        repository = self

        class InferenceRequest:
            def __init__(
                self, model_name: str, requested_output_names: list[str], inputs: list[Tensor], preferred_memory: Any
            ) -> None:
                self.asked = model_name, requested_output_names, {one.name(): one.as_numpy() for one in inputs}

            def exec(self) -> InferenceResponse:
                return repository._run(*self.asked)

        utils.InferenceRequest = InferenceRequest
        utils.PreferredMemory = lambda kind, device: (kind, device)
        utils.TRITONSERVER_MEMORY_CPU = 0
        utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
        utils.get_input_tensor_by_name = lambda request, name: (
            Tensor(name, request.inputs[name]) if name in request.inputs else None
        )
        return utils

    def _run(self, model: str, wanted: list[str], feeds: Mapping[str, np.ndarray]) -> InferenceResponse:
        self.asked.append(model)
        config = self.configs[model]
        expected = {tensor.name: tensor for tensor in config.input}
        if feeds.keys() != expected.keys():
            return InferenceResponse([], TritonError(f"{model} takes {sorted(expected)}, got {sorted(feeds)}"))
        given = {}
        for name, array in feeds.items():
            tensor = expected[name]
            array = array.reshape(()) if tensor.HasField("reshape") else array
            right = allows(full_shape(config, tensor), array) and array.dtype.type == numpy_type(tensor.data_type)
            if not right or (config.max_batch_size and len(array) > config.max_batch_size):
                return InferenceResponse([], TritonError(f"{model}: {name} is {array.dtype} {array.shape}"))
            given[name] = array
        if model not in self.sessions:
            path = self.folder / model / "1" / config.default_model_filename
            self.sessions[model] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        outputs = self.sessions[model].run(wanted, given)
        response = InferenceResponse([Tensor(*pair) for pair in zip(wanted, outputs, strict=True)])
        self._require_as_configured(model, response)
        return response

    def _require_as_configured(self, model: str, response: InferenceResponse) -> None:
        config = self.configs[model]
        outputs = {tensor.name: tensor for tensor in config.output}
        for tensor in response.output_tensors():
            said, array = outputs[tensor.name()], tensor.as_numpy()
            assert allows(full_shape(config, said), array), (model, tensor.name(), array.shape)
            assert numpy_type(said.data_type) == array.dtype.type, (model, tensor.name(), array.dtype)
