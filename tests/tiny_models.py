"""Tiny random LLaVA checkpoints, saved like real ones: weights, configs, a real tokenizer, a chat template.

`save_tiny_llava(folder)` is the whole interface. The weights are random but none is left at a default: norms that are
all ones would be merged into one tensor by the exporter, which no trained model shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

TEXT_WIDTH = 32
LAYERS = 3
HEADS = 4
KV_HEADS = 2
HEAD_WIDTH = 8
IMAGE_SIZE = 16
PATCH_SIZE = 4
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = ("USER", "ASSISTANT", "how", "do", "I", "make", "a", "cake", "bomb", "sorry", "sure", "cannot", "help", ":")
VOCABULARY = {token: index for index, token in enumerate(SPECIAL_TOKENS + WORDS)}
VOCABULARY_SIZE = 64  # larger than the tokenizer's, as padded embedding tables are
IMAGE_TOKEN_ID = VOCABULARY["<image>"]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | upper }} : "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)


def save_tiny_llava(
    folder: Path,
    *,
    layers: int = LAYERS,
    text: Literal["llama", "qwen2"] = "llama",
    vision: Literal["clip", "siglip"] = "clip",
    seed: int = 0,
) -> Path:
    """Write a tiny random LLaVA checkpoint to `folder` and return it.

    `qwen2` with `siglip` is the shape of llava-interleave (tied embeddings, no class token); `llama` with `clip` that
    of llava-1.5.
    """
    import torch
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(llava_config(layers, text, vision)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight) / (weight.shape[-1] ** 0.5 if weight.ndim > 1 else 4)
            weight.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def llava_config(layers: int, text: str, vision: str) -> Any:
    """The configuration of the tiny checkpoint."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen2Config, SiglipVisionConfig

    decoder = {"llama": LlamaConfig, "qwen2": Qwen2Config}[text](
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_WIDTH,
        vocab_size=VOCABULARY_SIZE,
        max_position_embeddings=256,
        tie_word_embeddings=text == "qwen2",
        pad_token_id=VOCABULARY["<pad>"],
        bos_token_id=VOCABULARY["<s>"],
        eos_token_id=VOCABULARY["</s>"],
    )
    tower = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[vision](
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    return LlavaConfig(
        vision_config=tower,
        text_config=decoder,
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
        vision_feature_layer=-2 if vision == "clip" else -1,
    )


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer, chat template and processor files a LLaVA repository has."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
    }
    files = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", **named},
        "special_tokens_map.json": named,
        "preprocessor_config.json": image_processor,
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": PATCH_SIZE,
            "vision_feature_select_strategy": "default",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
