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
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any
from unittest import mock

from ...graphs.errors import ModelUnreadable
from ...runtime.images.deepstack import features_name
from .anyres_packing import pack
from .family import IMAGE_FEATURES, Arrays, Shape, Shapes
from .masked_attention import attention_within
from .picture_geometry import pixel_unshuffle, replacements, temporal_merge
from .sub_pictures import has_sub_pictures, sub_pictures_by_arithmetic

if TYPE_CHECKING:
    import torch

IMAGE_TOKENS = "num_image_tokens"
_SIZES = "image_sizes"  # height and width of each picture, pixels
FIXED = ("image_merge_sizes",)  # what the image processor gives alike with all pictures, and decides shapes
# Names for axes by the input's rank and axis, where its length differs from picture to picture.
_WORDS = {(2, 0): "num_patches", (4, 0): "num_images", (4, 2): "height", (4, 3): "width", (5, 1): "num_images"}


def feature_holder(model: Any) -> Any:
    """The part of a model that has `get_image_features` with named inputs; `None` if there is none."""
    holders = [part for part in (model, getattr(model, "model", None)) if hasattr(part, "get_image_features")]
    # The outer one may hand on what it does not name.
    return max(holders, key=lambda part: len(feature_inputs(part)), default=None)


def feature_inputs(holder: Any) -> tuple[str, ...]:
    """Names of what its `get_image_features` takes, in order."""
    parameters = inspect.signature(holder.get_image_features).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)


def image_features(model: Any, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """`image_features` and those for DeepStack, all pictures in a row, `[image tokens, width]` each.

    Raises:
        ModelUnreadable: transformers returns no features for the image tokens.
    """
    output = feature_holder(model).get_image_features(**inputs, return_dict=True)
    deep = _deepstack(output)
    rows = output.pooler_output if hasattr(output, "pooler_output") else output
    if rows is None:
        rows = _rows_of_embeddings(model, output, deep)
    return {IMAGE_FEATURES: _flat(rows), **{features_name(layer): _flat(part) for layer, part in deep.items()}}


def _deepstack(output: Any) -> dict[int, Any]:
    """The features that the decoder adds to what leaves a layer, by the layer's number; -1: to the embeddings.

    Qwen3-VL returns them for its first layers, Granite 4 Vision with the number of the layer in front of which each goes.
    """
    deep = getattr(output, "deepstack_features", None) or ()
    if all(isinstance(part, tuple) and isinstance(part[0], int) for part in deep):
        return {layer - 1: rows for layer, rows in deep}
    return dict(enumerate(deep))


def _rows_of_embeddings(model: Any, output: Any, deep: dict[int, Any]) -> Any:
    """What goes to the image tokens where `get_image_features` returns the encoder's states, or features for layers alone.

    Args:
        model: whose output it is.
        output: of `get_image_features`, without pooler_output.
        deep: the features for layers; the embeddings' are taken out.
    """
    import torch

    if deep:
        # The decoder scales its embeddings first, and adds to them then.
        scale = getattr(model.config.get_text_config(), "embedding_multiplier", 1.0)
        return _flat(deep.pop(-1)) / scale if -1 in deep else torch.zeros_like(_flat(next(iter(deep.values()))))
    projector = getattr(model, "multi_modal_projector", None)
    states = getattr(output, "last_hidden_state", None)
    if states is not None and getattr(model.config, "vision_config", None) is None:
        return states  # Fuyu has no encoder: its decoder embeds the pixels
    if projector is None or states is None:
        raise ModelUnreadable(
            f"{type(model).__name__}: its get_image_features returns no pooler_output; export the model to ONNX with its own "
            "tools and guard that folder instead"
        )
    return projector(states)


def graph_inputs(model: Any, arrays: Arrays) -> Arrays:
    """The arrays that the graph takes: those of `get_image_features`, but no size that the pixels have, and none of `FIXED`."""
    taken = set(feature_inputs(feature_holder(model))) - set(FIXED)
    return {name: a for name, a in arrays.items() if name in taken and not (name == _SIZES and _has_size(arrays))}


def run_one_picture(
    model: Any, fixed: Mapping[str, Sequence[int]] | None = None, **inputs: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`image_features`, traceable; takes `graph_inputs`.

    Args:
        model: of transformers.
        fixed: what is `FIXED`, as numbers.
        inputs: by name.
    """
    import torch

    inputs |= {name: torch.tensor(numbers) for name, numbers in (fixed or {}).items()}
    with one_picture(model, inputs):
        if _SIZES in feature_inputs(feature_holder(model)) and _SIZES not in inputs:
            inputs[_SIZES] = _Sizes([inputs["pixel_values"].shape[-2:]])  # type: ignore[assignment]
        return image_features(model, **inputs)


@contextmanager
def one_picture(model: Any, inputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within, `get_image_features` computes one picture without loops over pictures."""
    import torch

    pixels, holder = inputs.get("pixel_values"), feature_holder(model)
    with ExitStack() as stack:
        patch = stack.enter_context
        for owner, name in ((torch, "split"), (torch.Tensor, "split")):
            patch(mock.patch.object(owner, name, _uncut(getattr(owner, name))))
        patch(mock.patch.object(torch.Tensor, "squeeze", _kept(torch.Tensor.squeeze)))
        patch(mock.patch.object(torch, "as_tensor", partial(_as_tensor, original=torch.as_tensor)))
        windows: list[torch.Tensor] = []
        if has_sub_pictures(inputs):
            patch(sub_pictures_by_arithmetic(model, inputs))
        for part in model.modules():
            if hasattr(part, "scaling") and _takes_bounds(part) and not has_sub_pictures(inputs):
                patch(mock.patch.object(part, "forward", _within_windows(part.forward, windows)))
            if hasattr(part, "pixel_unshuffle") and FIXED[0] in inputs:
                patch(mock.patch.object(part, "pixel_unshuffle", pixel_unshuffle))
            if hasattr(part, "temporal_merge"):
                patch(mock.patch.object(part, "temporal_merge", temporal_merge))
            if hasattr(part, "_temporal_slicing"):  # of ERNIE: a picture is its own second frame
                patch(
                    mock.patch.object(part, "_temporal_slicing", lambda states, grid: torch.cat([states, states], -1))
                )
        if pixels is not None:
            tiles = {"image_size_to_num_patches": lambda **more: pixels.shape[1]}
            # Elsewhere the pixels are whole pictures, of one size, whose geometry is constant.
            of_patches = any(name.endswith("grid_thw") for name in inputs)
            arithmetic = {**(replacements(pixels.shape[0], windows) if of_patches else {}), **tiles}
            for module in sorted({type(part).__module__ for part in model.modules()}):
                for name in arithmetic.keys() & vars(sys.modules[module]).keys():
                    patch(mock.patch.object(sys.modules[module], name, arithmetic[name]))
        if getattr(model.config, "image_grid_pinpoints", None) and hasattr(holder, "pack_image_features"):
            for part in (holder, getattr(holder, "model", holder)):
                counted = _returns_counts(part.pack_image_features)
                patch(mock.patch.object(part, "pack_image_features", partial(_packed, model.config, counted)))
        yield


class _Sizes(list[Any]):
    """Sizes of pictures that may be symbols of a trace, for models that take a tensor of them apart."""

    def tolist(self) -> list[Any]:
        """The sizes."""
        return list(self)


def _takes_bounds(part: Any) -> bool:
    """Whether a module takes `cu_seqlens`, the bounds of the segments that attend to themselves."""
    return "cu_seqlens" in inspect.signature(part.forward).parameters


def _within_windows(forward: Any, windows: Sequence[torch.Tensor]) -> Any:
    """An attention's `forward` that attends within windows where it is given their three bounds."""

    def masked(*args: Any, **named: Any) -> Any:
        bounds = named.get("cu_seqlens", next((arg for arg in args if getattr(arg, "ndim", 0) == 1), None))
        if bounds is None or bounds.shape[0] != 3:
            return forward(*args, **named)
        whole = {id(bounds): bounds[1:]}
        args = tuple(whole.get(id(arg), arg) for arg in args)
        named = {name: whole.get(id(arg), arg) for name, arg in named.items()}
        with attention_within(windows[-1]):
            return forward(*args, **named)

    return masked


def _uncut(split: Any) -> Any:
    """`torch.split` that returns the whole tensor for a single size: the only picture's, a value of the graph."""

    def whole(tensor: Any, sizes: Any, dim: int = 0) -> Any:
        return [tensor] if isinstance(sizes, list | tuple) and len(sizes) == 1 else split(tensor, sizes, dim)

    return whole


def _kept(squeeze: Any) -> Any:
    """`Tensor.squeeze` that keeps an axis of any length, which torch's ONNX exporter takes away."""

    def kept(tensor: Any, *dims: Any) -> Any:
        import torch

        whole = len(dims) == 1 and isinstance(dims[0], int) and isinstance(tensor.shape[dims[0]], torch.SymInt)
        return tensor if whole else squeeze(tensor, *dims)

    return kept


def _as_tensor(data: Any, *args: Any, original: Any, **more: Any) -> Any:
    """A tensor of sizes that are known while a graph is traced, but not its numbers, which decide nothing with one picture."""
    import torch

    symbolic = isinstance(data, list) and any(isinstance(n, torch.SymInt) for row in data for n in row)
    return torch.ones(len(data), 2, dtype=torch.int64) if symbolic else original(data, *args, **more)


def _packed(
    config: Any, counted: bool, features: Any, image_sizes: Any, *args: Any, image_newline: Any = None, **more: Any
) -> Any:
    tiles = features[0]
    rows = pack(tiles, image_sizes[0], config.image_grid_pinpoints, config.vision_config.image_size, image_newline)
    return ([rows], None) if counted else [rows]


def _returns_counts(pack_image_features: Any) -> bool:
    """Whether it returns the number of each picture's tokens besides the tokens; Granite 4 Vision's does not."""
    import torch

    one_tile = [torch.zeros(1, 1, 1)]
    return isinstance(pack_image_features(one_tile, [(1, 1)], vision_feature_select_strategy="full"), tuple)


def _has_size(arrays: Arrays) -> bool:
    """Whether the pixels are one picture `[1, channels, height, width]`, so that its size is theirs."""
    pixels = arrays.get("pixel_values")
    return pixels is not None and pixels.ndim == 4 and len(pixels) == 1


@contextmanager
def as_written(model: Any) -> Iterator[None]:
    """Within, transformers' exporter traces the model's attention as it is written, on the inputs that it is given.

    The exporter replaces the attention of about thirty towers by one function, which up to 5.24 at least leaves out what some
    of them normalise (GLM-OCR's features then differ by 2 to 4%), and computes some inputs outside the graph.
    """
    from transformers.exporters import exporter_dynamo, utils

    assert exporter_dynamo.DynamoExporter  # its import registers the replacements
    pinned = []
    for part in model.modules():
        if _takes_bounds(part) and "forward" not in vars(part):
            part.forward = MethodType(type(part).forward, part)
            pinned.append(part)
    try:
        with mock.patch.object(utils, "precompute_export_inputs", lambda model, inputs: None):
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
            patches = axis == 0 and name == "pixel_values" and "image_grid_thw" in samples[0]
            word = "num_patches" if patches else _WORDS.get((samples[0][name].ndim, axis), f"{name}_{axis}")
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
