"""Gemma 3: the tokens of one image see one another in both directions, text sees what came before.

Embeddings do not show which tokens are an image's, so the decoder takes `token_type_ids [batch_size, sequence_length]`, as in
transformers: 1 for image tokens, 0 for all others and for text-only prompts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .family import BATCH, SEQUENCE, Arrays, Decoder, Family, Shapes, Turn, position_feeds, position_inputs
from .fixed_size import fixed_size_vision, own_image_features


def inputs(model: Any) -> Shapes:
    return {**position_inputs(model), "token_type_ids": (BATCH, SEQUENCE)}


def feeds(config: Any, turn: Turn) -> Arrays:
    of_image = turn.ids[:, -turn.length :] == config.image_token_id
    return {**position_feeds(config, turn), "token_type_ids": of_image.astype(np.int64)}


GEMMA3 = Family(
    model_type="gemma3",
    model_class="Gemma3ForConditionalGeneration",
    image_towers=("siglip_vision_model",),
    vision=fixed_size_vision(own_image_features),
    decoder=Decoder(inputs=inputs, feeds=feeds),
)
