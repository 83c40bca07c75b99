"""Texts for vision encoders that read the prompt besides the picture: InstructBLIP's Q-Former.

The runtime prepares no such texts; callers of the graphs give `qformer_input_ids` of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .family import Arrays
from .generic_vision import feature_holder, feature_inputs

_IDS, _MASK = "_input_ids", "_attention_mask"
_LENGTHS = (5, 8, 6, 7)  # tokens of the text that goes with each picture


def with_texts(model: Any, pictures: Sequence[Arrays]) -> list[Arrays]:
    """The pictures, each with random token ids, and their mask, for every text that the vision encoder takes."""
    names = feature_inputs(feature_holder(model))
    parts = [name.removesuffix(_IDS) for name in names if name.endswith(_IDS)]
    random = np.random.default_rng(0)
    filled = [dict(picture) for picture in pictures]
    for part in parts:
        vocabulary = getattr(model.config, f"{part}_config").vocab_size
        for number, arrays in enumerate(filled):
            length = _LENGTHS[number % len(_LENGTHS)]
            arrays[part + _IDS] = random.integers(0, vocabulary, (1, length))
            if part + _MASK in names:
                arrays[part + _MASK] = np.ones((1, length), np.int64)
    return filled
