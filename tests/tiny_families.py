"""Tiny random checkpoints of vision-language families other than LLaVA, saved like real ones.

`save_tiny(family, folder)` is the whole interface; `TINY` says which there are. The weights are random and none is left
at a default, as in `tiny_models`. Every text model is a few tokens wide of window where its family has one, so that a
mask without the window would show.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_models import (
    CHAT_TEMPLATE,
    HEAD_WIDTH,
    HEADS,
    IMAGE_SIZE,
    IMAGE_TOKEN_ID,
    KV_HEADS,
    PATCH_SIZE,
    TEXT_WIDTH,
    VOCABULARY,
    VOCABULARY_SIZE,
    save_tokenizer,
)

LAYERS = 2
WINDOW = 6  # tokens


def save_tiny(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny random checkpoint of `family`, a key of `TINY`, to `folder` and return it."""
    import transformers

    random_model(getattr(transformers, _CLASSES[family]), TINY[family](), seed).save_pretrained(folder)
    save_tokenizer(folder)
    _PROCESSORS[family](folder)
    return folder


_SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
_TILES = [[rows * IMAGE_SIZE, columns * IMAGE_SIZE] for rows in (1, 2, 4) for columns in (1, 2, 4)]


def _gemma3_processor(folder: Path) -> None:
    """A template writes `<start_of_image>`, the processor makes that marker, the image tokens and another marker of it."""
    start, end = "<start_of_image>", "<end_of_image>"
    _add_tokens(folder, start, end)
    extra = {"boi_token": start, "eoi_token": end, "image_token": "<image>"}
    _edit(folder / "tokenizer_config.json", extra_special_tokens=extra, **extra)
    _write(folder / "preprocessor_config.json", {"image_processor_type": "Gemma3ImageProcessor", "size": _SQUARE})
    _write(folder / "processor_config.json", {"processor_class": "Gemma3Processor", "image_seq_length": 4})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("<image>", start), encoding="utf-8")


def _idefics3_processor(folder: Path, kind: str = "Idefics3") -> None:
    """Tiles of the tower's size, up to 2 x 2 of them, and a small copy."""
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    _add_tokens(folder, "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles)
    processor = {
        "image_processor_type": f"{kind}ImageProcessor",
        "size": {"longest_edge": 2 * IMAGE_SIZE},
        "max_image_size": {"longest_edge": IMAGE_SIZE},
    }
    _write(folder / "preprocessor_config.json", processor)
    _write(folder / "processor_config.json", {"processor_class": f"{kind}Processor", "image_seq_len": 4})


def _smolvlm_processor(folder: Path) -> None:
    _idefics3_processor(folder, "SmolVLM")


def _internvl_processor(folder: Path) -> None:
    extra = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<image>"}
    _add_tokens(folder, "<img>", "</img>")
    _edit(folder / "tokenizer_config.json", extra_special_tokens=extra)
    processor = {"image_processor_type": "GotOcr2ImageProcessor", "size": _SQUARE, "max_patches": 4}
    _write(folder / "preprocessor_config.json", processor)
    _write(folder / "processor_config.json", {"processor_class": "InternVLProcessor", "image_seq_length": 4})


def _onevision_processor(folder: Path) -> None:
    processor = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": _SQUARE,
        "image_grid_pinpoints": _TILES,
    }
    _write(folder / "preprocessor_config.json", processor)
    counts = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    _write(folder / "processor_config.json", {"processor_class": "LlavaOnevisionProcessor", **counts})


def _llava_next_processor(folder: Path) -> None:
    processor = {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": IMAGE_SIZE},
        "crop_size": _SQUARE,
        "image_grid_pinpoints": _TILES[1:],
    }
    _write(folder / "preprocessor_config.json", processor)
    counts = {"patch_size": PATCH_SIZE, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    _write(
        folder / "processor_config.json", {"processor_class": "LlavaNextProcessor", "image_token": "<image>", **counts}
    )


def _paligemma_processor(folder: Path) -> None:
    """No chat template: the pictures, `<s>`, the words and a line break."""
    (folder / "chat_template.jinja").unlink()
    processor = {"image_processor_type": "SiglipImageProcessor", "size": _SQUARE, "image_seq_length": 16}
    _write(folder / "preprocessor_config.json", processor)
    _write(folder / "processor_config.json", {"processor_class": "PaliGemmaProcessor"})


def _add_tokens(folder: Path, *tokens: str) -> None:
    """Make special tokens of these."""
    from tokenizers import AddedToken, Tokenizer

    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    tokenizer.save(path)


def _edit(path: Path, **changes: Any) -> None:
    _write(path, json.loads(path.read_text(encoding="utf-8")) | changes)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_tiny_llama(folder: Path, seed: int = 0) -> Path:
    """Write a tiny random text-only Llama of three layers, wide enough for int4 blocks, to `folder` and return it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**text(hidden_size=64, intermediate_size=128, head_dim=16, num_hidden_layers=3, vocab_size=96))
    random_model(LlamaForCausalLM, config, seed).save_pretrained(folder)
    save_tokenizer(folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink()
    return folder


def save_tiny_text(model_type: str, folder: Path, seed: int = 0, **more: Any) -> Path:
    """Write a tiny random text-only checkpoint of a `model_type` that `AutoModelForCausalLM` opens to `folder`; return it.

    `more` are arguments of its config besides those of `text`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **text(**TEXTS.get(model_type, {}), **more))
    random_model(AutoModelForCausalLM._model_mapping[type(config)], config, seed).save_pretrained(folder)
    save_tokenizer(folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink()
    return folder


def with_huge_bos(folder: Path, size: float, channel: int = 3) -> Path:
    """Make the state of `<s>` about `size` in one channel from the first layer on, as attention sinks are in real models."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    table = weights["model.embed_tokens.weight"]
    table[:, channel] = 0
    table[VOCABULARY["<s>"], channel] = size
    save_file(weights, path, {"format": "pt"})
    return folder


def random_model(model_class: Any, config: Any, seed: int) -> Any:
    """A model whose numbers are random, norms near 1."""
    import torch

    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight) / (weight.shape[-1] ** 0.5 if weight.ndim > 1 else 4)
            weight.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return model


def text(**more: Any) -> dict[str, Any]:
    """A decoder of two layers, as keyword arguments."""
    return {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_WIDTH,
        "vocab_size": VOCABULARY_SIZE,
        "max_position_embeddings": 256,
        "pad_token_id": VOCABULARY["<pad>"],
        "bos_token_id": VOCABULARY["<s>"],
        "eos_token_id": VOCABULARY["</s>"],
        **more,
    }


def tower(**more: Any) -> dict[str, Any]:
    """An image tower of two layers, as keyword arguments."""
    return {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        **more,
    }


def llava_onevision() -> Any:
    from transformers import LlavaOnevisionConfig

    return LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text()},
        vision_config={"model_type": "siglip_vision_model", **tower()},
        image_token_id=IMAGE_TOKEN_ID,
        image_grid_pinpoints=_TILES,
        video_token_id=VOCABULARY_SIZE - 1,
    )


def llava_next() -> Any:
    from transformers import LlavaNextConfig

    return LlavaNextConfig(
        text_config={"model_type": "llama", **text()},
        vision_config={"model_type": "clip_vision_model", **tower()},
        image_token_index=IMAGE_TOKEN_ID,
        image_grid_pinpoints=_TILES[1:],
    )


def idefics3() -> Any:
    from transformers import Idefics3Config

    return Idefics3Config(
        text_config={"model_type": "llama", **text()},
        vision_config=tower(),
        image_token_id=IMAGE_TOKEN_ID,
        scale_factor=2,
        pad_token_id=VOCABULARY["<pad>"],
    )


def smolvlm() -> Any:
    from transformers import SmolVLMConfig

    return SmolVLMConfig(
        text_config={"model_type": "llama", **text()},
        vision_config=tower(),
        image_token_id=IMAGE_TOKEN_ID,
        scale_factor=2,
        pad_token_id=VOCABULARY["<pad>"],
    )


def internvl() -> Any:
    from transformers import InternVLConfig

    return InternVLConfig(
        text_config={"model_type": "qwen2", **text()},
        vision_config=tower(image_size=[IMAGE_SIZE, IMAGE_SIZE], patch_size=[PATCH_SIZE, PATCH_SIZE]),
        image_token_id=IMAGE_TOKEN_ID,
        image_seq_length=4,
    )


def gemma3() -> Any:
    from transformers import Gemma3Config

    return Gemma3Config(
        text_config=text(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]),
        vision_config=tower(),
        mm_tokens_per_image=4,
        image_token_id=IMAGE_TOKEN_ID,
        boi_token_id=len(VOCABULARY),
        eoi_token_id=len(VOCABULARY) + 1,
    )


def paligemma() -> Any:
    from transformers import PaliGemmaConfig

    return PaliGemmaConfig(
        text_config={"model_type": "gemma", **text()},
        vision_config={"model_type": "siglip_vision_model", **tower()},
        image_token_id=IMAGE_TOKEN_ID,
        projection_dim=TEXT_WIDTH,
        hidden_size=TEXT_WIDTH,
    )


def paligemma2() -> Any:
    from transformers import PaliGemmaConfig

    window = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    return PaliGemmaConfig(
        text_config={"model_type": "gemma2", **text(query_pre_attn_scalar=8, **window)},
        vision_config={"model_type": "siglip_vision_model", **tower()},
        image_token_id=IMAGE_TOKEN_ID,
        projection_dim=TEXT_WIDTH,
        hidden_size=TEXT_WIDTH,
    )


_WINDOW = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4}
# Text-only families that are converted in tests, and what their configs need besides `text`.
TEXTS: dict[str, dict[str, Any]] = {
    "gemma3_text": _WINDOW,
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "phi3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8, **_WINDOW},
    "gpt2": {},
    "phi": {},
    "gpt_neox": {},
    "granite": {},
    "cohere": {},
    "olmo2": {},
}
TINY: dict[str, Callable[[], Any]] = {
    make.__name__: make
    for make in (llava_onevision, llava_next, idefics3, smolvlm, internvl, gemma3, paligemma, paligemma2)
}
_CLASSES = {
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "paligemma": "PaliGemmaForConditionalGeneration",
    "paligemma2": "PaliGemmaForConditionalGeneration",
}
_PROCESSORS: dict[str, Callable[[Path], None]] = {
    "llava_onevision": _onevision_processor,
    "llava_next": _llava_next_processor,
    "idefics3": _idefics3_processor,
    "smolvlm": _smolvlm_processor,
    "internvl": _internvl_processor,
    "gemma3": _gemma3_processor,
    "paligemma": _paligemma_processor,
    "paligemma2": _paligemma_processor,
}
