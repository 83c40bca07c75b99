"""A tiny random LFM2-VL that onnxruntime-genai runs: short convolutions beside attention, pictures as one list of patches.

A token is 8 x 8 pixels, a picture has 4 to 16 of them and is not cut into tiles. genai finds the image token and the marks
around it by their names in the tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from byte_tokenizer import save_processor
from tiny_families import random_model

WIDTH, HEADS = 64, 4  # genai: heads of 16 numbers
LAYER_TYPES = ("conv", "full_attention", "conv", "full_attention")
LAYERS = len(LAYER_TYPES)
PATCH, FACTOR, TOKENS = 4, 2, (4, 16)
SPECIAL_TOKENS = (
    "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<|image_start|>", "<|image_end|>",
    "<|img_thumbnail|>",
)  # fmt: skip
PAD, BOS, _, _, EOS, IMAGE, *_ = range(len(SPECIAL_TOKENS))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_lfm2_vl(folder: Path, seed: int = 0) -> Path:
    """Write a tiny random checkpoint to `folder` and return it."""
    tiny_lfm2_vl(seed).save_pretrained(folder)
    picture = {
        "image_processor_type": "Lfm2VlImageProcessor",
        "encoder_patch_size": PATCH,
        "downsample_factor": FACTOR,
        "min_image_tokens": TOKENS[0],
        "max_image_tokens": TOKENS[1],
        "do_image_splitting": False,
    }
    files = {
        "tokenizer_config.json": {
            "bos_token": "<|startoftext|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|pad|>",
            "image_token": "<image>",
        },
        "preprocessor_config.json": picture,
        "processor_config.json": {"processor_class": "Lfm2VlProcessor"},
        "generation_config.json": {"eos_token_id": EOS, "do_sample": False},
    }
    save_processor(folder, files, SPECIAL_TOKENS, "Qwen2Tokenizer", CHAT_TEMPLATE)
    return folder


def tiny_lfm2_vl(seed: int = 0) -> Any:
    """The model; no weight of it is left at a default."""
    from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

    config = Lfm2VlConfig(
        text_config={
            "model_type": "lfm2",
            "vocab_size": len(SPECIAL_TOKENS) + 256,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": LAYERS,
            "layer_types": list(LAYER_TYPES),
            "num_attention_heads": HEADS,
            "num_key_value_heads": 2,
            "block_auto_adjust_ff_dim": False,
            "max_position_embeddings": 512,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        },
        vision_config={
            "model_type": "siglip2_vision_model",
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "num_patches": 64,
            "vision_use_head": False,
        },
        projector_hidden_size=40,
        downsample_factor=FACTOR,
        image_token_id=IMAGE,
    )
    return random_model(Lfm2VlForConditionalGeneration, config, seed)
