"""Text-only language models: one row for every decoder that transformers opens with `AutoModelForCausalLM`.

    input_ids, attention_mask, position_ids, past_key_values.* ─► model.onnx ─► logits, present.*

That is the signature of onnx-community's text models. No table says which decoders can be exported: transformers lists
them, torch traces them or says why not, and `dissect` finds the residual stream or says why not. What is refused here is what
no tracing can change: encoders, encoder-decoders, models that take images or sound, and states that are no KV cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ...graphs.errors import ModelUnreadable
from .family import Decoder, Family

# Layer types of transformers' configs whose state is a KV cache; all others are recurrences or convolutions.
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention", "attention", "hybrid")
_OTHER_TOWERS = ("vision_config", "audio_config", "speech_config")


def text_family(config: Mapping[str, Any]) -> Family | None:
    """The row for a checkpoint with this `config.json`; `None` where transformers opens no causal language model of it."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) if isinstance(model_type, str) else None
    if model_type is None or not isinstance(model_class, str):
        return None
    # Models with ALiBi, like Bloom and MPT, read positions from the mask.
    takes_positions = "position_ids" in inspect.signature(getattr(transformers, model_class).forward).parameters
    return Family(
        model_type=model_type,
        model_class=model_class,
        image_towers=(),
        vision=None,
        decoder=Decoder() if takes_positions else Decoder(inputs=lambda model: {}, feeds=lambda config, turn: {}),
        refuse=why_no_text_decoder,
    )


def why_no_text_decoder(config: Mapping[str, Any]) -> str | None:
    """Why this causal language model is no text-only decoder with a KV cache; `None` where it is one."""
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
    types = config.get("layer_types") or config.get("layers_block_type") or ()
    other = next((kind for kind in types if kind not in _ATTENTION), None)
    if other is not None:
        return (
            f"its config.json has {other} layers, whose state is no KV cache; only decoders with attention in every layer are "
            "exported"
        )
    return None


def cached_shapes(model: Any) -> list[tuple[int, int, int]]:
    """Heads, width of a key and width of a value, for every layer of the KV cache: read from a run of three tokens.

    Configs have many words for them, and with latent attention keys and values differ.

    Raises:
        ModelUnreadable: a layer's state is no KV cache.
    """
    import torch
    from transformers import DynamicCache

    with torch.no_grad():
        outputs = model(input_ids=torch.zeros(1, 3, dtype=torch.int64), use_cache=True)
    cache = getattr(outputs, "past_key_values", None)
    layers = cache.layers if isinstance(cache, DynamicCache) else ()
    shapes: list[tuple[int, int, int]] = []
    for layer in layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.ndim != 4 or keys.shape[2] != 3:
            shapes.clear()
            break
        shapes.append((keys.shape[1], keys.shape[3], values.shape[3]))
    if not shapes:
        kind = model.config.model_type
        raise ModelUnreadable(
            f"{model.name_or_path}: {kind} keeps a state that is no KV cache (recurrent, as Mamba's); only decoders with "
            "attention in every layer are exported"
        )
    return shapes
