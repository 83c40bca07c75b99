"""Stand-in for Triton's `onnxruntime` backend, which no registry package carries: the same name, the same configs, in Python.

Triton takes a folder with a `model.py` for a backend ("Python-based backend"). What differs from NVIDIA's: it is slower, on
the CPU only, and ignores all tuning. It is stricter in one thing: a config that does not say exactly what the graph takes and
gives is refused, and so is any tensor that is not what the config says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.config = json.loads(args["model_config"])
        path = Path(args["model_repository"]) / args["model_version"] / self.config["default_model_filename"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.batched = self.config["max_batch_size"] > 0
        for side, ports in (("input", self.session.get_inputs()), ("output", self.session.get_outputs())):
            said = {one["name"]: self._shape(one) for one in self.config[side]}
            found = {port.name: [size if isinstance(size, int) else -1 for size in port.shape] for port in ports}
            if said != found:
                raise pb_utils.TritonModelException(
                    f"{self.config['name']}: {side}s are {found}, the config says {said}"
                )

    def _shape(self, tensor: dict[str, Any]) -> list[int]:
        dims = tensor["reshape"]["shape"] if "reshape" in tensor else tensor["dims"]
        return [-1] * self.batched + [int(size) for size in dims]

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._run(request) for request in requests]

    def _run(self, request: Any) -> Any:
        feeds = {}
        for one in self.config["input"]:
            array = pb_utils.get_input_tensor_by_name(request, one["name"]).as_numpy()
            shape = self._shape(one)
            array = array.reshape([]) if not shape else array
            right = array.ndim == len(shape) and all(s in (-1, n) for s, n in zip(shape, array.shape, strict=True))
            if not right or array.dtype != pb_utils.triton_string_to_numpy(one["data_type"]):
                return _refused(
                    f"{one['name']} is {array.dtype} {array.shape}, the config says {one['data_type']} {shape}"
                )
            feeds[one["name"]] = array
        wanted = list(request.requested_output_names())
        try:
            outputs = self.session.run(wanted, feeds)
        except Exception as error:
            return _refused(str(error))
        tensors = [
            pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in zip(wanted, outputs, strict=True)
        ]
        return pb_utils.InferenceResponse(output_tensors=tensors)


def _refused(why: str) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(why))
