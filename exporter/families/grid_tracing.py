"""Tracing a tower that reads a picture's grid as Python numbers: the grid comes from the shape of its pixels.

A graph takes `pixel_values [num_patches, width]` and `image_grid_thw [1, 3]`. What a tower computes with
`image_grid_thw.tolist()` is then unknown to the tracer, which refuses loops and shapes made of it. So the tower is traced on
`pixel_values [rows, columns, width]`, whose axes are the numbers (`run_on_grid`), and a Reshape in front of the graph makes
that of what callers give (`take_patches`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import onnx_ir as ir

from .family import Arrays
from .generic_vision import image_features, one_picture

if TYPE_CHECKING:
    import torch

PIXELS, GRID = "pixel_values", "image_grid_thw"


def has_grid(arrays: Arrays) -> bool:
    """Whether these are the patches of one picture with its grid, `[rows * columns, ...]` and `[1, 3]`."""
    return GRID in arrays and arrays[GRID].shape == (1, 3) and len(arrays[PIXELS]) == arrays[GRID].prod()


def on_grid(arrays: Arrays) -> Arrays:
    """The same picture with its patches as `[rows, columns, ...]`."""
    return {**arrays, PIXELS: arrays[PIXELS].reshape(*arrays[GRID][0, 1:], *arrays[PIXELS].shape[1:])}


def run_on_grid(model: Any, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """`image_features` of one picture, whose grid is the first two axes of its pixels."""
    rows, columns, *_ = inputs[PIXELS].shape
    inputs = {**inputs, PIXELS: inputs[PIXELS].flatten(0, 1)}
    with one_picture(model, inputs), _known_grid(rows, columns):
        return image_features(model, **inputs)


def take_patches(graph: ir.Graph) -> None:
    """Let callers give `[num_patches, ...]` where the graph was traced on `[rows, columns, ...]`."""
    traced = next(value for value in graph.inputs if value.name == PIXELS)
    grid = next(value for value in graph.inputs if value.name == GRID)
    assert traced.shape is not None and traced.dtype is not None
    patch = list(traced.shape)[2:]
    given = ir.Value(name=PIXELS, shape=ir.Shape(["num_patches", *patch]), type=ir.TensorType(traced.dtype))
    numbers = {"start": [1], "end": [3], "axis": [1], "flat": [2], "patch": patch}
    constants = {
        name: ir.node("Constant", [], {"value": ir.tensor(np.array(content, np.int64))})
        for name, content in numbers.items()
    }
    of = {name: node.outputs[0] for name, node in constants.items()}
    edges = ir.node("Slice", [grid, of["start"], of["end"], of["axis"]])
    flat = ir.node("Reshape", [edges.outputs[0], of["flat"]])
    shape = ir.node("Concat", [flat.outputs[0], of["patch"]], {"axis": 0})
    reshaped = ir.node("Reshape", [given, shape.outputs[0]])
    reshaped.outputs[0].shape, reshaped.outputs[0].type = traced.shape, traced.type
    traced.replace_all_uses_with(reshaped.outputs[0])
    graph.inputs[list(graph.inputs).index(traced)] = given
    graph.insert_before(graph[0], [*constants.values(), edges, flat, shape, reshaped])


@contextmanager
def _known_grid(rows: int, columns: int) -> Iterator[None]:
    """Within, the numbers of a `[1, 3]` tensor of integers are those of this grid, also while they are symbols of a trace."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    def known(tolist: Any) -> Any:
        def numbers(tensor: Any) -> Any:
            is_grid = tuple(tensor.shape) == (1, 3) and not tensor.is_floating_point()
            return [[1, rows, columns]] if is_grid else tolist(tensor)

        return numbers

    with ExitStack() as stack:
        for kind in (torch.Tensor, FakeTensor, FunctionalTensor):
            stack.enter_context(mock.patch.object(kind, "tolist", known(kind.tolist)))
        yield
