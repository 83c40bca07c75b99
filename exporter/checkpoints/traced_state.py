"""The state that a decoder hands from call to call, found by running the model: `find_state`.

A transformers cache is an object of many kinds of layers: keys and values of one or of several widths, the window of a
    convolution, the matrix of a linear attention, the keys of an indexer. The state is found by running the model twice,
    with other numbers of
prompts and tokens: an axis that follows the prompts is the batch, one that follows the tokens grows, all others are fixed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...graphs.decoder_state import COMMUNITY_PAST, COMMUNITY_PRESENT
from ...graphs.errors import ModelUnreadable
from ..families.family import BATCH, PAST, TOTAL, Shape

# Prompts and tokens of the two runs. More tokens than most convolutions are wide: the window of one is of its full size then.
_FIRST, _SECOND = (2, 9), (3, 11)
_ENTRY = re.compile(r"layers\.(\d+)\.(.+)")
_WHOLE = {"keys": "key", "values": "value"}


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a cache, as the graph's input and output.

    Attributes:
        leaf: its path within the cache object, `layers.3.keys`.
        past, present: names of the input and of the output.
        shape: of the input; `PAST` is the axis that grows.
    """

    leaf: str
    past: str
    present: str
    shape: Shape

    @property
    def shape_after(self) -> Shape:
        """The shape of the output."""
        return tuple(TOTAL if size == PAST else size for size in self.shape)


def find_state(prefill: Callable[[int, int], Any], model: Any) -> tuple[StateTensor, ...]:
    """The tensors of a model's cache, in the order in which a tracer flattens it.

    Args:
        prefill: `prefill(batch, tokens)`, the cache after one call on that many tokens.
        model: whose cache it is, for the message.

    Raises:
        ModelUnreadable: the model keeps no state, or one that follows neither prompts nor tokens.
    """
    first, second = (_sizes(prefill(*run)) for run in (_FIRST, _SECOND))
    if not first or first.keys() != second.keys():
        raise ModelUnreadable(
            f"{_whose(model)} keeps no state from call to call; only decoders with a cache are exported"
        )
    return tuple(StateTensor(leaf, *names_of(leaf), _shape(leaf, first[leaf], second[leaf], model)) for leaf in first)


def fresh_cache(model: Any) -> Any:
    """An empty cache of the model's own layout that forgets nothing.

    A caller's cache is as long as its mask in every layer, and the attention mask hides what is outside a sliding window.

    Raises:
        ModelUnreadable: the model has a window of another kind.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = DynamicLayer()
        elif isinstance(layer, DynamicSlidingWindowLayer):  # a convolution beside sliding attention
            cache.layers[index] = _without_window(layer, model)
    return cache


def leaves(cache: Any) -> Mapping[str, Any]:
    """The tensors of a cache by their path, in the order in which a tracer flattens it; scalars are none."""
    from transformers.exporters.utils import get_leaf_tensors

    return {path: tensor for path, tensor in get_leaf_tensors(cache).items() if tensor.ndim}


def names_of(leaf: str) -> tuple[str, str]:
    """The input and the output for a tensor of a cache, named as onnx-community and transformers.js do.

    >>> names_of("layers.3.keys")
    ('past_key_values.3.key', 'present.3.key')
    >>> names_of("layers.0.conv_states.0")
    ('past_conv.0', 'present_conv.0')
    """
    entry = _ENTRY.fullmatch(leaf)
    if entry is None:
        return f"{COMMUNITY_PAST}.{leaf}", f"{COMMUNITY_PRESENT}.{leaf}"
    layer, what = entry.groups()
    states = re.fullmatch(r"(conv|recurrent)_states\.(\d+)", what)
    if states is not None:
        kind, number = states.groups()
        which = layer if number == "0" else f"{layer}.{number}"
        return f"past_{kind}.{which}", f"{COMMUNITY_PRESENT}_{kind}.{which}"
    return tuple(f"{side}.{layer}.{_WHOLE.get(what, what)}" for side in (COMMUNITY_PAST, COMMUNITY_PRESENT))  # type: ignore[return-value]


def present_of(past: str) -> str:
    """The output that refills an input named by `names_of`.

    >>> present_of("past_key_values.3.key"), present_of("past_conv.0")
    ('present.3.key', 'present_conv.0')
    """
    behind = past.removeprefix(COMMUNITY_PAST)
    return COMMUNITY_PRESENT + (behind if behind != past else past.removeprefix("past"))


def is_past(name: str) -> bool:
    """Whether an input is named by `names_of`."""
    return name.startswith((f"{COMMUNITY_PAST}.", "past_conv.", "past_recurrent."))


def _without_window(layer: Any, model: Any) -> Any:
    """The same kind of layer with whole attention in place of its window."""
    from transformers.cache_utils import LinearAttentionAndFullAttentionLayer

    if not hasattr(layer, "number_of_states"):  # Unlimited-OCR: tokens of the prompt are never outside
        raise ModelUnreadable(
            f"{_whose(model)} keeps a window of its own kind ({type(layer).__name__}), which an attention mask over all tokens "
            "does not describe; only caches with whole or sliding windows are exported"
        )
    return LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)


def _sizes(cache: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(tensor.shape) for path, tensor in leaves(cache).items()}


def _shape(leaf: str, first: tuple[int, ...], second: tuple[int, ...], model: Any) -> Shape:
    """The shape with words for the axes that differ between the two runs."""
    words = {(_FIRST[0], _SECOND[0]): BATCH, (_FIRST[1], _SECOND[1]): PAST}
    shape = [a if a == b else words.get((a, b)) for a, b in zip(first, second, strict=True)]
    if len(first) != len(second) or None in shape or shape.count(PAST) > 1 or BATCH not in shape:
        raise ModelUnreadable(
            f"{_whose(model)} keeps a state that follows neither its prompts nor their tokens ({leaf}: {first} for {_FIRST[1]} "
            f"tokens, {second} for {_SECOND[1]}); only caches that grow by one entry a token, or not at all, are exported"
        )
    return tuple(axis for axis in shape if axis is not None)


def _whose(model: Any) -> str:
    return f"{model.name_or_path}: {model.config.model_type}"
