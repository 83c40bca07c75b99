"""A traced graph as one file with its weights inside, written without holding them in memory several times: `save_inline`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir

from ...graphs.graph_io import save_graph
from ...graphs.inline_weights import LARGE_FILE, InFile
from .tidy import weight_bytes


def save_inline(graph: ir.Model, path: Path) -> None:
    """Write the graph; large weights, which protobuf would hold six times, are copied from a file of their own."""
    if weight_bytes(graph) < LARGE_FILE:
        ir.save(graph, path)
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".weights-") as place:
        refers, weights = Path(place) / path.name, Path(place) / "weights"
        ir.save(graph, refers, external_data=weights.name)  # one weight after the other
        written = ir.load(refers)
        for value in written.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                where = tensor.offset or 0, tensor.length or 0
                value.const_value = InFile(weights, *where, tensor.dtype, tensor.shape.numpy(), tensor.name or "")
        save_graph(written, path)
