"""A tiny random Phi-4 Multimodal that onnxruntime-genai runs: tiles of 448 pixels, 256 tokens a tile, the real token ids.

genai has the ids of its image and audio tokens and the sizes of tiles in its code, so only widths and depths are tiny here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from byte_tokenizer import save_processor
from tiny_families import random_model

LAYERS, WIDTH, HEAD_WIDTH = 2, 32, 8
VOCABULARY_SIZE = 200_064
END_OF_TEXT, IMAGE, AUDIO, ASSISTANT, END, USER = 199_999, 200_010, 200_011, 200_019, 200_020, 200_021
SPECIAL_TOKENS = {
    "<|endoftext|>": END_OF_TEXT,
    "<|endoftext10|>": IMAGE,
    "<|endoftext11|>": AUDIO,
    "<|assistant|>": ASSISTANT,
    "<|end|>": END,
    "<|user|>": USER,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|endoftext10|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tiny_phi4(folder: Path, seed: int = 0) -> Path:
    """Write a tiny random checkpoint to `folder` and return it."""
    tiny_phi4(seed).save_pretrained(folder)
    named = {"image_token": "<|endoftext10|>"} | dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    files = {
        "tokenizer_config.json": named,
        "preprocessor_config.json": {"image_processor_type": "Phi4MultimodalImageProcessor", "dynamic_hd": 4},
        "processor_config.json": {"processor_class": "Phi4MultimodalProcessor"},
        "generation_config.json": {"eos_token_id": [END, END_OF_TEXT], "pad_token_id": END_OF_TEXT, "do_sample": False},
    }
    save_processor(folder, files, SPECIAL_TOKENS, "GPT2Tokenizer", CHAT_TEMPLATE)
    return folder


def tiny_phi4(seed: int = 0) -> Any:
    """The model; no weight of it is left at a default."""
    from transformers import Phi4MultimodalForCausalLM
    from transformers.models.phi4_multimodal.configuration_phi4_multimodal import Phi4MultimodalConfig

    config = Phi4MultimodalConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // HEAD_WIDTH,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=END_OF_TEXT,
        eos_token_id=[END_OF_TEXT, END],
        pad_token_id=END_OF_TEXT,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 448,
            "crop_size": 448,
            "patch_size": 14,
            "image_token_id": IMAGE,
        },
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 16,
            "audio_token_id": AUDIO,
        },
    )
    return random_model(Phi4MultimodalForCausalLM, config, seed)
