"""A guarded model inside Triton Inference Server: every graph is a model of the repository, and each call a request to it.

The repository's front model opens it so (`exporter/packaging/front_model.py`). Tokenizer, pictures, the text-only pass of
`supervise`, held gates and the KV cache are then handled as everywhere else; only who runs the graphs is another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..graphs import triton
from ..graphs.errors import ManifestMismatch, RunFailed, first_line
from ..graphs.json_files import read_json
from ..graphs.manifest import MANIFEST_NAME
from .guarded import GuardedVLM, open_manifest, package_of, require_guard
from .runner_protocol import Port, Runner

# Python writes it when Triton imports the front model, where it may. Whoever runs by then cannot be checked by itself any
# more; `vlmguard verify` refuses such a file.
_OWN_BYTECODE = f"{triton.FRONT}/{triton.VERSION}/__pycache__/model.*.pyc"


@dataclass(frozen=True)
class Ports:
    """Inputs and outputs of one model of the repository, as its graph has them."""

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]

    def to_json(self) -> dict[str, Any]:
        sides = {"inputs": self.inputs, "outputs": self.outputs}
        return {side: {p.name: [p.dtype.name, list(p.shape)] for p in ports.values()} for side, ports in sides.items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Ports:
        def read(side: str) -> dict[str, Port]:
            return {name: Port(name, np.dtype(of), tuple(shape)) for name, (of, shape) in content[side].items()}

        return cls(read("inputs"), read("outputs"))


class TritonRunner:
    """One model of the repository, run by requests of the front model ("business logic scripting").

    Args:
        model: its name.
        ports: its inputs and outputs.
        backend_utils: the module `triton_python_backend_utils`, which exists in Triton's Python processes only.
    """

    def __init__(self, model: str, ports: Ports, backend_utils: Any) -> None:
        self.model = model
        self.inputs, self.outputs = ports.inputs, ports.outputs
        self._triton = backend_utils

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name, copied out of the shared memory, which the next request reuses.

        Raises:
            RunFailed: Triton or the model's backend refused.
        """
        triton_api = self._triton
        request = triton_api.InferenceRequest(
            model_name=self.model,
            requested_output_names=list(self.outputs),
            inputs=[triton_api.Tensor(name, _at_least_1d(array)) for name, array in feeds.items()],
            preferred_memory=triton_api.PreferredMemory(triton_api.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise RunFailed(f"Triton cannot run {self.model} on these inputs ({first_line(response.error())})")
        found = {tensor.name(): np.array(tensor.as_numpy()) for tensor in response.output_tensors()}
        missing = sorted(self.outputs.keys() - found.keys())
        if missing:
            raise RunFailed(f"Triton's {self.model} gave no {missing[0]}; package the folder again")
        return found


def _at_least_1d(array: np.ndarray) -> np.ndarray:
    """Triton has no tensors without dimensions; the model's config turns `[1]` back into a scalar."""
    return np.ascontiguousarray(array.reshape(1) if array.ndim == 0 else array)


def open_in_triton(repository: Path, backend_utils: Any) -> GuardedVLM:
    """Open the repository that a front model belongs to; its graphs are run by Triton.

    Raises:
        ManifestMismatch: the repository is not the one that was packaged, file by file, or its decoder is not guarded.
    """
    if not (repository / MANIFEST_NAME).is_file():
        raise ManifestMismatch(
            f"{repository}: has no {MANIFEST_NAME} beside the models, so no file records a guard; give Triton the "
            "whole folder that `vlmguard package --triton` wrote, on a local disk"
        )
    manifest = open_manifest(repository, besides=_OWN_BYTECODE)
    package = package_of(repository, manifest)
    if not manifest.engines:
        require_guard(package, manifest)
    described = read_json(repository / triton.PORTS)

    def open_part(path: Path) -> Runner:
        part = path.relative_to(repository).parts[0]
        return TritonRunner(part, Ports.from_json(described["models"][part]), backend_utils)

    return GuardedVLM(package, manifest, "triton", open_part, bool(described["pads"]))
