"""`config.pbtxt` of each model in a Triton repository, from what its graph takes and gives.

Dimensions are the graph's; open ones are -1. A model whose every input and output has the same open first dimension may be
batched by Triton across requests: then that dimension is Triton's own and is not among the dims. The decoder never is: the
requests that wait have caches of different lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from ...graphs import triton
from ...graphs.errors import GuardError
from ...graphs.whole_numbers import whole_number
from ...runtime.runner_protocol import Port
from ...runtime.triton_runner import Ports
from .prototext import Message, Word, to_prototext

Device = Literal["cpu", "gpu"]

# Triton's Python backend lacks bfloat16: https://github.com/triton-inference-server/python_backend ("TYPE_BF16").
_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
}
_LONGEST_ANSWER = 4096  # tokens; a request may ask for fewer


@dataclass(frozen=True)
class TritonOptions:
    """Options of a Triton repository.

    Attributes:
        device: where the graphs run.
        instances: copies of each graph, per GPU or on the CPU.
        requests: how many answers are made at the same time: processes of the front model.
        max_batch: most requests that Triton may put together for the vision encoder and the embeddings; 0: none.
    """

    device: Device = "cpu"
    instances: int = 1
    requests: int = 4
    max_batch: int = 8

    def __post_init__(self) -> None:
        for name, smallest in (("instances", 1), ("requests", 1), ("max_batch", 0)):
            if getattr(self, name) < smallest:
                raise GuardError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} is out of range; choose {smallest} or more"
                )


@dataclass(frozen=True)
class Part:
    """One graph of the repository.

    Attributes:
        name: the model's.
        ports: inputs and outputs.
        batched: whether Triton may batch requests: all first dimensions are one open one.
    """

    name: str
    ports: Ports
    batched: bool


def part_of(name: str, model: ir.Model) -> Part:
    """Names, types and shapes of a graph in Triton.

    Raises:
        GuardError: a tensor has a type that Triton or its Python backend lacks.
    """
    graph = model.graph
    defaults = set(graph.initializers)  # of old exporters: inputs that have a value and need not be fed
    inputs = [value for value in graph.inputs if value.name not in defaults]
    firsts = {
        str(value.shape[0]) for value in (*inputs, *graph.outputs) if value.shape is not None and len(value.shape)
    }
    open_ranks = all(value.shape is not None and len(value.shape) > 0 for value in (*inputs, *graph.outputs))
    batched = open_ranks and len(firsts) == 1 and whole_number(next(iter(firsts))) is None and firsts != {"None"}
    ports = Ports({str(v.name): _port(name, v) for v in inputs}, {str(v.name): _port(name, v) for v in graph.outputs})
    return Part(name, ports, batched and name != triton.DECODER)


def _port(part: str, value: ir.Value) -> Port:
    dtype = value.dtype.numpy() if value.dtype is not None else None
    if dtype is None or value.shape is None or np.dtype(dtype).name not in _TYPES:
        raise GuardError(
            f"{part}: {value.name!r} is of type {value.dtype} and shape {value.shape}, which Triton's Python processes cannot "
            "pass on; export the model in fp32 or fp16"
        )
    sizes = (size if isinstance(size, int) else None for size in value.shape)
    return Port(str(value.name), np.dtype(dtype), tuple(sizes))


def graph_config(part: Part, options: TritonOptions, parameters: Mapping[str, str]) -> str:
    """The config of a graph.

    Args:
        part: the graph.
        options: options of the repository.
        parameters: shown to users of the running server; Triton itself does not use them.
    """
    batched = part.batched and options.max_batch > 0
    config: dict[str, Any] = {
        "name": part.name,
        "backend": "onnxruntime",
        "default_model_filename": triton.GRAPH,
        "max_batch_size": options.max_batch if batched else 0,
        "version_policy": {"specific": {"versions": [int(triton.VERSION)]}},
        "input": [_tensor(port, batched) for port in part.ports.inputs.values()],
        "output": [_tensor(port, batched) for port in part.ports.outputs.values()],
        "instance_group": [{"count": options.instances, "kind": Word(f"KIND_{options.device.upper()}")}],
    }
    if batched:
        config["dynamic_batching"] = {}
    return to_prototext(config | _parameters(parameters))


def _tensor(port: Port, batched: bool) -> Message:
    dims = [-1 if size is None else size for size in (port.shape[1:] if batched else port.shape)]
    tensor = {"name": port.name, "data_type": Word(_TYPES[port.dtype.name]), "dims": dims or [1]}
    return tensor if dims else tensor | {"reshape": {"shape": []}}  # Triton has no tensors without dimensions


def front_config(options: TritonOptions, parameters: Mapping[str, str]) -> str:
    """The config of the model that clients ask."""

    def tensor(name: str, kind: str, size: int = 1, optional: bool = False) -> Message:
        port: dict[str, Any] = {"name": name, "data_type": Word(kind), "dims": [size]}
        return port | {"optional": True} if optional else port

    config: dict[str, Any] = {
        "name": triton.FRONT,
        "backend": "python",
        "max_batch_size": 0,
        "version_policy": {"specific": {"versions": [int(triton.VERSION)]}},
        "model_transaction_policy": {"decoupled": True},
        "input": [
            tensor("text_input", "TYPE_STRING"),
            tensor("image", "TYPE_STRING", optional=True),
            tensor("stream", "TYPE_BOOL", optional=True),
            tensor("max_tokens", "TYPE_INT32", optional=True),
            tensor("temperature", "TYPE_FP32", optional=True),
            tensor("top_p", "TYPE_FP32", optional=True),
            tensor("seed", "TYPE_INT64", optional=True),
        ],
        "output": [
            tensor("text_output", "TYPE_STRING"),
            tensor("token_ids", "TYPE_INT64", -1),
            tensor("finish_reason", "TYPE_STRING"),
        ],
        "instance_group": [{"count": options.requests, "kind": Word("KIND_CPU")}],
    }
    return to_prototext(config | _parameters({**parameters, "max_tokens": str(_LONGEST_ANSWER)}))


def _parameters(parameters: Mapping[str, str]) -> dict[str, Any]:
    if not parameters:
        return {}
    return {"parameters": [{"key": key, "value": {"string_value": value}} for key, value in parameters.items()]}
