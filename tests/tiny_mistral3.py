"""A tiny random Mistral 3 that onnxruntime-genai runs: pictures of their own shape, a tokenizer that it can read.

A token is 8 x 8 pixels and a side has at most 96. genai finds the marks of a picture's rows by their names in the tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from byte_tokenizer import save_processor
from tiny_families import random_model

LAYERS, WIDTH, HEADS, HEAD_WIDTH = 2, 32, 4, 16
PATCH, MERGE, LONGEST = 4, 2, 96
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
_, BOS, EOS, _, _, PAD, IMAGE, _, _ = range(len(SPECIAL_TOKENS))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[INST]{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}[IMG]{% else %}{{ part['text'] }}{% endif %}{% endfor %}[/INST]{% endfor %}"
)


def save_tiny_mistral3(folder: Path, seed: int = 0) -> Path:
    """Write a tiny random checkpoint to `folder` and return it."""
    tiny_mistral3(seed).save_pretrained(folder)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    edge = PATCH * MERGE
    picture = {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": LONGEST}}
    processor = {"processor_class": "PixtralProcessor", "patch_size": PATCH, "spatial_merge_size": MERGE}
    files = {
        "tokenizer_config.json": names | {"image_token": "[IMG]"},
        "preprocessor_config.json": picture | {"patch_size": {"height": edge, "width": edge}},
        "processor_config.json": processor,
        "generation_config.json": {"eos_token_id": EOS, "do_sample": False},
    }
    save_processor(folder, files, SPECIAL_TOKENS, "Qwen2Tokenizer", CHAT_TEMPLATE)
    return folder


def tiny_mistral3(seed: int = 0) -> Any:
    """The model; no weight of it is left at a default."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": len(SPECIAL_TOKENS) + 256,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 2,
            "head_dim": HEAD_WIDTH,
            "max_position_embeddings": 512,
            "sliding_window": None,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 16,
            "image_size": LONGEST,
            "patch_size": PATCH,
        },
        spatial_merge_size=MERGE,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return random_model(Mistral3ForConditionalGeneration, config, seed)
