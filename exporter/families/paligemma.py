"""PaliGemma 1 and 2: all tokens of a prompt see one another in both directions, only the answer is causal.

The prompt is one call of the decoder, so the rule needs no further input: tokens of one call see one another and everything
before them. A prompt must therefore run in one call, as in every app.

transformers counts positions from 1 here. Rotary embeddings depend only on differences, so counting from 0, as everywhere else,
gives the same answers.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from .family import Arrays, Decoder, Family, Turn, position_feeds
from .fixed_size import fixed_size_vision, own_image_features

if TYPE_CHECKING:
    import torch


def run(
    model: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    past_key_values: Any,
) -> Any:
    """`PaliGemmaForConditionalGeneration.forward`, which would treat a call with a cache as a part of the answer.

    Args:
        model, inputs_embeds, attention_mask, position_ids, past_key_values: as for transformers' forward.
    """
    import torch

    batch, new, _ = inputs_embeds.shape
    total = attention_mask.shape[1]
    text = model.config.get_text_config()
    allowed = {"full_attention": attention_mask[:, None, None, :].bool().expand(batch, 1, new, total)}
    window = getattr(text, "sliding_window", None)
    if window is not None:
        seen = torch.arange(total)
        looking = (torch.arange(new) + (total - new))[:, None]
        within = (looking - seen < window) | (seen >= total - new)
        allowed["sliding_attention"] = allowed["full_attention"] & within
    masks: dict[str, torch.Tensor] = allowed
    if text._attn_implementation == "eager":  # Gemma 2 caps its scores, which torch's fused attention cannot
        least = torch.finfo(inputs_embeds.dtype).min
        masks = {kind: torch.where(mask, 0.0, least).to(inputs_embeds.dtype) for kind, mask in allowed.items()}
    states = model.model.language_model(
        inputs_embeds=inputs_embeds,
        attention_mask=masks if window is not None else masks["full_attention"],
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=True,
    )
    logits = model.lm_head(states.last_hidden_state)
    cap = getattr(text, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return SimpleNamespace(logits=logits, past_key_values=states.past_key_values)


def reference(config: Any, turn: Turn) -> Arrays:
    """`token_type_ids` of the processor: 0 for the prompt, 1 for the answer."""
    is_prompt = turn.length == turn.ids.shape[1]
    kinds = np.full((len(turn.ids), turn.length), 0 if is_prompt else 1)
    return {**position_feeds(config, turn), "token_type_ids": kinds}


PALIGEMMA = Family(
    model_type="paligemma",
    model_class="PaliGemmaForConditionalGeneration",
    image_towers=("siglip_vision_model",),
    vision=fixed_size_vision(own_image_features),
    decoder=Decoder(run=run, reference=reference),
)
