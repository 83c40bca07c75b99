"""A tiny random Gemma 3 that onnxruntime-genai runs: 256 image tokens per picture, a tokenizer that it can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from byte_tokenizer import save_processor

LAYERS, WIDTH, IMAGE_SIZE, PATCH = 3, 64, 32, 2
WINDOW = 64  # tokens, less than a picture has
SPECIAL_TOKENS = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>",
    "<image_soft_token>",
)  # fmt: skip
PAD, EOS, BOS, UNKNOWN, _, TURN_END, IMAGE_START, IMAGE_END, IMAGE = range(len(SPECIAL_TOKENS))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def save_tiny_gemma3(folder: Path, seed: int = 0, window: int = WINDOW) -> Path:
    """Write a tiny random checkpoint to `folder` and return it."""
    tiny_gemma3(seed, window).save_pretrained(folder)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    images = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    processor = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    files = {
        "tokenizer_config.json": names | images,
        "preprocessor_config.json": processor,
        "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 256},
        "generation_config.json": {"eos_token_id": [EOS, TURN_END], "do_sample": False},
    }
    save_processor(folder, files, SPECIAL_TOKENS, "Qwen2Tokenizer", CHAT_TEMPLATE)
    return folder


def tiny_gemma3(seed: int = 0, window: int = WINDOW) -> Any:
    """The model. Small embeddings and sharp attention, so that answers depend on the whole prompt."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(
        text_config={
            "vocab_size": len(SPECIAL_TOKENS) + 256,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": window,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "max_position_embeddings": 1024,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        },
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
        },
        mm_tokens_per_image=256,
        image_token_id=IMAGE,
        boi_token_id=IMAGE_START,
        eoi_token_id=IMAGE_END,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=[EOS, TURN_END],
    )
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.05 if "embed_tokens" in name else 0.3 if weight.ndim > 1 else 0.1
            weight.normal_(1.5 if name.endswith(("q_norm.weight", "k_norm.weight")) else 0, scale)
    return model
