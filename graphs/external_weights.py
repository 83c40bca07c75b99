"""Weights in external data: a reference as in the file, read from wherever the reference leads.

`external_data` checks the place of every weight before a graph is opened: which files may be read is decided there, once.
onnx_ir checks again when numbers are read, by other rules (seen on 1.1.0): it refuses a file with two names, though exports
hard-link large files (`staging.bring`), and every link, though the Hugging Face cache is made of links (`links`).
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx_ir as ir


class CheckedWeight(ir.ExternalTensor):
    """An external tensor of a file that `require_external_data` accepted; its numbers are read without another check.

    Attributes:
        file: where the numbers are, absolute; `location` is what the graph calls it.
    """

    file: Path

    @classmethod
    def of(cls, tensor: ir.ExternalTensor, location: str | None = None) -> CheckedWeight:
        """The same reference; with a `location`, the same numbers under another name."""
        weight = cls(
            tensor.location if location is None else location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape),
            name=tensor.name or "",
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
            base_dir=tensor.base_dir,
        )
        weight.file = tensor.file if isinstance(tensor, cls) else Path(tensor.path)
        return weight

    def _from_anywhere(self) -> ir.ExternalTensor:
        """The numbers alone: without a base folder nothing is checked."""
        return ir.ExternalTensor(
            str(self.file),
            self.offset,
            self.length,
            self.dtype,
            shape=ir.Shape(self.shape),
            name=self.name,
            base_dir="",
        )

    def numpy(self) -> np.ndarray:
        """The numbers, mapped from the file."""
        return self._from_anywhere().numpy()

    def tobytes(self) -> bytes:
        """The bytes, read into memory."""
        return self._from_anywhere().tobytes()

    def tofile(self, file: IO[bytes]) -> None:
        """Copy the bytes to a file."""
        self._from_anywhere().tofile(file)

    def __array__(self, dtype: Any = None) -> np.ndarray:
        return self.numpy().__array__(dtype)


def trust_places(model: ir.Model) -> None:
    """Make every external tensor of a model, whose places are checked, a `CheckedWeight`: of initializers, and of what nodes
    hold themselves."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = CheckedWeight.of(value.const_value)
    for node in model.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                tensor = attribute.as_tensor()
                if isinstance(tensor, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, CheckedWeight.of(tensor))
