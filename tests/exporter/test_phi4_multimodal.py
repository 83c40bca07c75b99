"""Phi-4 Multimodal's rows for a picture, against those that transformers' embedding puts at the image tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families.shrunk_config import shrunk
from families.special_configs import CHANGES
from transformers.models.phi4_multimodal.configuration_phi4_multimodal import Phi4MultimodalConfig
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalImageEmbedding

from vlmguard.exporter.families import find_family
from vlmguard.exporter.families.generic_vision import feature_inputs
from vlmguard.exporter.families.image_tokens import image_token_id
from vlmguard.exporter.families.phi4_multimodal import MODEL_CLASS, MODEL_TYPE, get_image_features, with_image_features
from vlmguard.exporter.families.random_pixels import random_pixels


def _config() -> Any:
    content = shrunk(Phi4MultimodalConfig().to_dict())
    CHANGES[MODEL_TYPE](content)
    return Phi4MultimodalConfig(**content)


@pytest.mark.parametrize("number", range(4))
def test_the_rows_of_a_picture_are_those_that_transformers_embeds(number: int) -> None:
    """Tiles in a row, in a column and in a square, of which the last rows or columns are no picture; and one tile."""
    torch.manual_seed(0)
    config = _config()
    embed = Phi4MultimodalImageEmbedding(config).eval()
    with torch.no_grad():
        for weight in embed.parameters():
            weight.copy_(torch.randn_like(weight) / 4)
        model = SimpleNamespace(
            config=config, model=SimpleNamespace(embed_tokens_extend=SimpleNamespace(image_embed=embed))
        )
        model.get_image_features = lambda image_pixel_values, image_sizes, image_attention_mask: None
        pictures = random_pixels(model, lambda arrays: None)
        assert pictures is not None
        picture = {name: torch.from_numpy(array) for name, array in pictures[number].items()}
        (rows,) = get_image_features(model, **picture).pooler_output
        ids = torch.full((1, len(rows)), image_token_id(config))
        expected = embed(ids, torch.zeros(1, len(rows), config.hidden_size), **picture)
    torch.testing.assert_close(rows, expected[0], rtol=0, atol=1e-6)


def test_a_model_of_this_class_gets_the_function_that_the_generic_row_calls() -> None:
    assert find_family({"model_type": MODEL_TYPE}, "here").model_class == MODEL_CLASS
    model = with_image_features(type(MODEL_CLASS, (), {})())
    assert feature_inputs(model) == ("image_pixel_values", "image_sizes", "image_attention_mask")
    assert not hasattr(with_image_features(SimpleNamespace()), "get_image_features")
