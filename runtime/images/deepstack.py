"""DeepStack (arXiv 2406.04334), as Qwen3-VL and Granite 4 Vision have it: image features that go in between decoder layers.

The vision encoder gives `deepstack_features_{i}`, one row per image token. The decoder takes `deepstack_embeds_{i}`, one
row per token of the sequence, and adds it to what leaves its layer `i`. Rows that belong to no image token are zero, so
text needs zeros, and so does every token after the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

_FEATURES, _EMBEDS = "deepstack_features_", "deepstack_embeds_"


def features_name(number: int) -> str:
    """Name of the vision encoder's output with the features for the decoder's layer `number`."""
    return f"{_FEATURES}{number}"


def embeds_name(number: int) -> str:
    """Name of the decoder's input that is added after its layer `number`."""
    return f"{_EMBEDS}{number}"


def is_embeds(name: str) -> bool:
    """Whether an input of a decoder is one that DeepStack fills."""
    return name.startswith(_EMBEDS)


def is_features(name: str) -> bool:
    """Whether an output of a vision encoder is for DeepStack."""
    return name.startswith(_FEATURES)


def layer_number(name: str) -> int:
    """The decoder's layer that such an output is for.

    >>> layer_number("deepstack_features_11")
    11
    """
    return int(name.removeprefix(_FEATURES))


def side_by_side(embeds: np.ndarray, rows: Sequence[np.ndarray | None], width: int | None) -> np.ndarray:
    """Embeddings with the rows of all layers beside them, for a decoder that takes one wide tensor (onnxruntime-genai).

    Args:
        embeds: `[batch, sequence, d]`.
        rows: as large, in the order of the layers; `None` is zeros.
        width: of the decoder's input; embeddings as wide as that, or any where it is `None`, are returned as they are.
    """
    if width is None or embeds.shape[-1] == width:
        return embeds
    beside = np.concatenate([embeds, *(np.zeros_like(embeds) if row is None else row for row in rows)], axis=-1)
    return np.pad(beside, ((0, 0), (0, 0), (0, max(width - beside.shape[-1], 0))))


def scatter(seen: Mapping[str, np.ndarray], is_image: np.ndarray) -> dict[str, np.ndarray]:
    """The vision encoder's rows at their image tokens, zeros elsewhere.

    Args:
        seen: outputs of the vision encoder; `[image tokens, width]` each. Those that are not for DeepStack are skipped.
        is_image: where the image tokens are, `[batch, sequence]` bool.

    Returns:
        By the decoder's names, `[batch, sequence, width]` in the features' dtype.
    """
    dense = {}
    for name, rows in seen.items():
        if is_features(name):
            spread = dense[_EMBEDS + name.removeprefix(_FEATURES)] = np.zeros(
                (*is_image.shape, rows.shape[-1]), rows.dtype
            )
            spread[is_image] = rows
    return dense
