"""Tiny random Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5 checkpoints, saved like real ones.

`save_tiny_qwen(kind, folder)` is the whole interface; `KINDS` says which there are. Images keep their shape and become
patches of 4 x 4 pixels, four to a token, between `PIXELS` in all; a window of Qwen2.5-VL is 4 x 4 patches.
`save_byte_qwen` writes the same with a byte-level tokenizer, which onnxruntime-genai reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from byte_tokenizer import save_byte_tokenizer

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
LAYERS = 2
HEAD_WIDTH, HEADS, KV_HEADS = 8, 4, 2
TEXT_WIDTH = HEAD_WIDTH * HEADS
PATCH, TEMPORAL, MERGE, EDGE = 4, 2, 2, 8
PATCH_WIDTH = 3 * TEMPORAL * PATCH**2
PIXELS = (4 * EDGE**2, 24 * EDGE**2)
DEEPSTACK = (0, 1)  # layers of the tower

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>", "<unk>",
)  # fmt: skip
WORDS = ("user", "assistant", "how", "do", "I", "make", "a", "cake", "bomb", "sorry", "sure", "cannot", "help", ":")
VOCABULARY_SIZE = 64
# Nearly every token is a word that can be read; a few are none, as in padded embedding tables.
MORE_WORDS = tuple(f"word{number}" for number in range(VOCABULARY_SIZE - len(SPECIAL_TOKENS + WORDS) - 4))
VOCABULARY = {token: number for number, token in enumerate(SPECIAL_TOKENS + WORDS + MORE_WORDS)}
IMAGE_TOKEN_ID = VOCABULARY["<|image_pad|>"]
PICTURE_MARKER = "<|vision_start|><|image_pad|><|vision_end|>"  # what stands for a picture in a prompt

# That of the Qwen family, with `user` and `assistant` as words of their own.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + PICTURE_MARKER + "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
DEEP_KINDS = ("qwen3_vl", "qwen3_vl_moe")  # with DeepStack
LINEAR_KINDS = ("qwen3_5", "qwen3_5_moe")  # whose first layer has linear attention
_PROCESSORS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}  # the newer ones: Qwen3VLProcessor
_CLASSES = {
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "qwen3_vl_moe": "Qwen3VLMoe",
    "qwen3_5": "Qwen3_5",
    "qwen3_5_moe": "Qwen3_5Moe",
}


def save_tiny_qwen(kind: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny random checkpoint to `folder` and return it."""
    tiny_qwen(kind, seed).save_pretrained(folder)
    save_tokenizer(kind, folder)
    return folder


def save_byte_qwen(kind: str, folder: Path, seed: int = 0) -> Path:
    """The same with a token for each byte; the special tokens have the same ids."""
    tiny_qwen(kind, seed, len(SPECIAL_TOKENS) + 256).save_pretrained(folder)
    save_tokenizer(kind, folder)
    save_byte_tokenizer(folder, SPECIAL_TOKENS, "Qwen2Tokenizer")
    (folder / "chat_template.jinja").write_text(
        CHAT_TEMPLATE.replace("> {{", ">{{").replace("> a", ">a"), encoding="utf-8"
    )
    return folder


def tiny_qwen(kind: str, seed: int = 0, vocabulary_size: int | None = None) -> Any:
    """The model; no weight of it is left at a default."""
    import torch
    import transformers

    text = _text(kind, vocabulary_size or VOCABULARY_SIZE)
    config = getattr(transformers, f"{_CLASSES[kind]}Config")(
        text_config=text, vision_config=_VISION[kind], tie_word_embeddings=False, **_TOKENS
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{_CLASSES[kind]}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight) / (weight.shape[-1] ** 0.5 if weight.ndim > 1 else 4)
            weight.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return model


_TOKENS = {
    "image_token_id": IMAGE_TOKEN_ID,
    "video_token_id": VOCABULARY["<|video_pad|>"],
    "vision_start_token_id": VOCABULARY["<|vision_start|>"],
    "vision_end_token_id": VOCABULARY["<|vision_end|>"],
}
_TOWER = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": PATCH,
    "temporal_patch_size": TEMPORAL,
    "spatial_merge_size": MERGE,
}
_NEWER_TOWER = (
    _TOWER
    | {"hidden_size": 24, "intermediate_size": 40, "out_hidden_size": TEXT_WIDTH}
    | {"num_position_embeddings": 5 * 5}
)
_VISION = {
    "qwen2_vl": _TOWER | {"embed_dim": 24, "mlp_ratio": 2, "hidden_size": TEXT_WIDTH},
    "qwen2_5_vl": _TOWER
    | {"hidden_size": 24, "intermediate_size": 40, "out_hidden_size": TEXT_WIDTH}
    | {"window_size": 4 * PATCH, "fullatt_block_indexes": [1]},
    **dict.fromkeys(DEEP_KINDS, _NEWER_TOWER | {"deepstack_visual_indexes": list(DEEPSTACK)}),
    **dict.fromkeys(LINEAR_KINDS, _NEWER_TOWER),
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": HEAD_WIDTH,
    "linear_value_head_dim": HEAD_WIDTH,
    "linear_num_key_heads": KV_HEADS,
    "linear_num_value_heads": HEADS,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": TEXT_WIDTH,
    "shared_expert_intermediate_size": TEXT_WIDTH,
}


def _text(kind: str, vocabulary_size: int) -> dict[str, Any]:
    whole = {"mrope_interleaved": True, "partial_rotary_factor": 1.0} if kind in LINEAR_KINDS else {}
    return {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": vocabulary_size,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], **whole},
        "bos_token_id": None,
        "eos_token_id": VOCABULARY["<|im_end|>"],
        "pad_token_id": VOCABULARY["<|endoftext|>"],
        **({} if kind in _PROCESSORS else {"head_dim": HEAD_WIDTH}),
        **(_LINEAR if kind in LINEAR_KINDS else {}),
        **(_EXPERTS if kind.endswith("_moe") else {}),
    }


def save_tokenizer(kind: str, folder: Path) -> None:
    """Write the tokenizer, chat template and processor files that a Qwen repository has."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    image_processor = {
        "image_processor_type": "Qwen2VLImageProcessor" if kind in _PROCESSORS else "Qwen2VLImageProcessorFast",
        "processor_class": _PROCESSORS.get(kind, "Qwen3VLProcessor"),
        "patch_size": PATCH,
        "temporal_patch_size": TEMPORAL,
        "merge_size": MERGE,
        **_limits(kind),
    }
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    files = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", **named},
        "preprocessor_config.json": image_processor,
        "generation_config.json": {"eos_token_id": VOCABULARY["<|im_end|>"], "do_sample": False},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _limits(kind: str) -> dict[str, Any]:
    """As the older and the newer repositories write them."""
    least, most = PIXELS
    if kind not in _PROCESSORS:
        return {"size": {"shortest_edge": least, "longest_edge": most}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return {"min_pixels": least, "max_pixels": most}
