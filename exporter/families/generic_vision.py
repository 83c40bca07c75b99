"""The vision encoder of any type: `get_image_features` for ONE picture per call.

Loops over pictures, and cuts between them, vanish with one picture: `one_picture` takes them out while a graph is traced, and
    while the model is compared with itself.

    pixel_values, ... as the type's image processor gives them for one picture
    -> image_features [image tokens, width], deepstack_features_i [image tokens, width]
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any
from unittest import mock

from ...runtime.images.deepstack import features_name
from .family import IMAGE_FEATURES, Arrays, Shape, Shapes
from .picture_geometry import replacements

if TYPE_CHECKING:
    import torch

IMAGE_TOKENS = "num_image_tokens"
# Names for axes by the input's rank and axis, where its length differs from picture to picture.
_WORDS = {(2, 0): "num_patches", (4, 0): "num_images", (4, 2): "height", (4, 3): "width", (5, 1): "num_images"}


def feature_holder(model: Any) -> Any:
    """The part of a model that has `get_image_features` with named inputs; `None` if there is none."""
    holders = [part for part in (model, getattr(model, "model", None)) if hasattr(part, "get_image_features")]
    return next((part for part in holders if next(iter(feature_inputs(part)), "kwargs") != "kwargs"), None)


def feature_inputs(holder: Any) -> tuple[str, ...]:
    """Names of what its `get_image_features` takes, in order."""
    parameters = inspect.signature(holder.get_image_features).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)


def image_features(model: Any, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """`image_features` and those for DeepStack, all pictures in a row, `[image tokens, width]` each."""
    output = feature_holder(model).get_image_features(**inputs, return_dict=True)
    rows = output.pooler_output if hasattr(output, "pooler_output") else output
    deep = getattr(output, "deepstack_features", None) or ()
    return {IMAGE_FEATURES: _flat(rows), **{features_name(number): _flat(part) for number, part in enumerate(deep)}}


def run_one_picture(model: Any, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """`image_features`, traceable."""
    with one_picture(model, inputs):
        return image_features(model, **inputs)


@contextmanager
def one_picture(model: Any, inputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within, `get_image_features` computes one picture without loops over pictures."""
    import torch

    split, cut = torch.split, torch.Tensor.split

    def whole(tensor: torch.Tensor, sizes: Any, dim: int = 0) -> Any:
        return [tensor] if isinstance(sizes, list | tuple) and not sizes else split(tensor, sizes, dim)

    def whole_method(tensor: torch.Tensor, sizes: Any, dim: int = 0) -> Any:
        return [tensor] if isinstance(sizes, list | tuple) and not sizes else cut(tensor, sizes, dim)

    arithmetic = replacements(inputs["pixel_values"].shape[0]) if "pixel_values" in inputs else {}
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.split", whole))
        stack.enter_context(mock.patch("torch.Tensor.split", whole_method))
        if "image_grid_thw" in inputs:  # its numbers are the sizes of the cuts
            stack.enter_context(mock.patch("torch.Tensor.tolist", lambda tensor: []))
            for module in sorted({type(part).__module__ for part in model.modules()}):
                for name, function in arithmetic.items():
                    if hasattr(sys.modules[module], name):
                        stack.enter_context(mock.patch.object(sys.modules[module], name, function))
        yield


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """Within, no patch of the exporter's takes the place of the model's own modules' `forward`.

    transformers' exporter replaces the attention of about thirty towers by one function for all; up to 5.24 at least it
    leaves out what some of them normalise (GLM-OCR's towers then differ by 2 to 4%).
    """
    from transformers.exporters import exporter_dynamo

    assert exporter_dynamo.DynamoExporter  # its import registers the patches
    pinned = []
    for part in model.modules():
        source = type(part).forward
        if "cu_seqlens" in inspect.signature(source).parameters and "forward" not in vars(part):
            part.forward = MethodType(source, part)
            pinned.append(part)
    try:
        yield
    finally:
        for part in pinned:
            del part.forward


def traced_shapes(samples: Sequence[Arrays]) -> dict[str, Shape]:
    """The shape of each input with words for the axes that differ between pictures; axes that always agree share a word."""
    words: dict[tuple[int, ...], str] = {}
    shapes: dict[str, Shape] = {}
    for name in samples[0]:
        shape: list[str | int] = []
        for axis, sizes in enumerate(zip(*(sample[name].shape for sample in samples), strict=True)):
            if len(set(sizes)) == 1:
                shape.append(int(sizes[0]))
                continue
            word = _WORDS.get((samples[0][name].ndim, axis), f"{name}_{axis}")
            taken = word in words.values() and words.get(sizes) != word
            shape.append(words.setdefault(sizes, f"{name}_{axis}" if taken else word))
        shapes[name] = tuple(shape)
    return shapes


def feature_shapes(samples: Sequence[Mapping[str, Any]]) -> Shapes:
    """The shape of each output: as many rows as the picture has tokens."""
    shapes = {}
    for name, first in samples[0].items():
        rows = {len(sample[name]) for sample in samples}
        shapes[name] = (rows.pop() if len(rows) == 1 else IMAGE_TOKENS, first.shape[-1])
    return shapes


def _flat(rows: Any) -> torch.Tensor:
    import torch

    parts = rows if isinstance(rows, list | tuple) else [rows]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
