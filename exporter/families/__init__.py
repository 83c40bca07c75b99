"""Supported checkpoints: one row per multimodal family, `FAMILIES`, and one for all text decoders (`text`).

    vision inputs ─► vision_encoder ─► image_features ─► (place) ┐
                                                                 ├─► (caller puts the rows at the image tokens)
    input_ids ─────► embed_tokens ───► inputs_embeds ────────────┘                      │
                           (feeds) ─► position_ids, ... ─► decoder_model_merged ◄───────┘ ─► logits, present.*

Embeddings, head and cache are found the same way in every transformers model; a row has the rest:

- `model_type`, `model_class`, `image_towers`: which checkpoints it is for; `refuse`: which of them it is not for, and why
- `vision`: inputs and outputs of the vision encoder with a word for every axis of any length, how it runs, a sample of
  two images, and (numpy) which rows of its outputs go to the image tokens
- `decoder`: inputs besides `inputs_embeds`, `attention_mask` and the cache (default: `position_ids [batch, sequence]`),
  and (numpy) the rule that gives their values from token ids, mask and images, at the prompt and at every later step

Signatures follow what onnx-community publishes for the family, so that transformers.js loads the result. To support
another family: write its row in a module of its own, add it to `FAMILIES`, and a tiny checkpoint of it to the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...graphs.errors import GuardError
from .family import Family
from .gemma3 import GEMMA3
from .generic import generic_family
from .idefics3 import IDEFICS3, SMOLVLM
from .internvl import INTERNVL
from .llava import LLAVA
from .llava_next import LLAVA_NEXT
from .llava_onevision import LLAVA_ONEVISION
from .paligemma import PALIGEMMA
from .qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from .text import text_family

FAMILIES: tuple[Family, ...] = (
    LLAVA,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    IDEFICS3,
    SMOLVLM,
    INTERNVL,
    GEMMA3,
    PALIGEMMA,
    QWEN2_VL,
    QWEN2_5_VL,
    QWEN3_VL,
)

_OTHERWISE = "Export it to ONNX with its own tools and guard that folder instead"


def find_family(config: Mapping[str, Any], checkpoint: str) -> Family:
    """The one row for this `config.json`; refuses what no row was written for."""
    model_type = config.get("model_type")
    family = next(
        (row for row in FAMILIES if row.model_type == model_type and _tower(config) in (None, *row.image_towers)), None
    )
    generic = generic_family(config)
    if family is None and (generic is None or generic.refuse(config) is not None):
        family = text_family(config)  # a decoder that transformers lists with the models that see
    family = family or generic
    if family is None:
        raise GuardError(
            f"{checkpoint}: its config.json has model_type {model_type!r}, which this transformers opens neither with "
            f"AutoModelForImageTextToText nor with AutoModelForCausalLM. {_OTHERWISE}"
        )
    reason = family.refuse(config)
    if reason is not None:
        raise GuardError(f"{checkpoint}: {reason}. {_OTHERWISE}")
    return family


def _tower(config: Mapping[str, Any]) -> str | None:
    """The image tower named in a config; `None` if it names none, and transformers uses the type's default."""
    return (config.get("vision_config") or {}).get("model_type")
