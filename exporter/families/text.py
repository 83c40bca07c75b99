"""Text-only language models: one row for every decoder that transformers opens with `AutoModelForCausalLM`.

    input_ids, attention_mask, position_ids, past_key_values.* ─► model.onnx ─► logits, present.*

This is the signature of onnx-community's text models. There is no list of supported decoders: transformers lists its own,
and torch and `dissect` report decoders that they cannot trace or guard. Rejected here are models that no tracing can
support: encoders, encoder-decoders, and models that take images or sound.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from .family import Decoder, Family
from .transformers_class import transformers_class

_OTHER_TOWERS = ("vision_config", "audio_config", "speech_config")


def text_family(config: Mapping[str, Any]) -> Family | None:
    """The row for a checkpoint with this `config.json`; `None` where transformers opens no causal language model of it."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    listed_elsewhere = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type)
    if model_class is None and isinstance(listed_elsewhere, str) and listed_elsewhere.endswith("ForCausalLM"):
        model_class = listed_elsewhere  # Mistral 4's decoder, which transformers lists with the models that see
    if not isinstance(model_class, str):
        return None
    # Models with ALiBi, like Bloom and MPT, read positions from the mask.
    takes_positions = "position_ids" in inspect.signature(transformers_class(model_class).forward).parameters
    return Family(
        model_type=model_type,
        model_class=model_class,
        image_towers=(),
        vision=None,
        decoder=Decoder() if takes_positions else Decoder(inputs=lambda model: {}, feeds=lambda config, turn: {}),
        refuse=why_no_text_decoder,
    )


def why_no_text_decoder(config: Mapping[str, Any]) -> str | None:
    """Why this causal language model is no text-only decoder; `None` where it is one."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    model_type = config["model_type"]
    if config.get("is_encoder_decoder") or model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return f"{model_type} is an encoder-decoder; only decoder-only language models can be guarded"
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder"):
        return f"{model_type} is an encoder; only decoder-only language models can be guarded"
    tower = next((name for name in _OTHER_TOWERS if config.get(name)), None)
    if tower is not None:
        return (
            f"{model_type} is multimodal (its config.json has a {tower}), and this multimodal family is not supported"
        )
    return None
