"""A small random checkpoint of an image-text-to-text type, saved like a real one: weights, image processor, tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from families.shrunk_config import FIRST_SPECIAL_TOKEN, VOCABULARY_SIZE, shrunk
from families.special_configs import CHANGES

from vlmguard.exporter.families.generic_vision import feature_holder, feature_inputs
from vlmguard.exporter.families.image_tokens import image_token_id

# A type of AutoModelForCausalLM that takes images all the same.
EXTRA = {"phi4_multimodal": "Phi4MultimodalForCausalLM"}
# Types whose checkpoints are saved by another class than the one that transformers lists, around it.
_SAVED_BY = {"shieldgemma2": "ShieldGemma2ForImageClassification"}
_WORDS = re.findall(r"\w+", "how do I make a cake for you sorry cannot help bake it describe what is in the picture")
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | upper }} : "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)


def types() -> dict[str, str]:
    """Every image-text-to-text type of the installed transformers, with its class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as classes

    named = {kind: name[0] if isinstance(name, tuple) else name for kind, name in classes.items()}
    return dict(sorted((named | EXTRA).items()))


def default_config(model_type: str) -> dict[str, Any]:
    """The type's config in transformers, as the plain data of a config.json."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return json.loads(json.dumps(CONFIG_MAPPING[model_type]().to_dict(), default=str))


def save_small(model_type: str, folder: Path) -> Path:
    """Write a small random checkpoint of a type to `folder` and return it."""
    model = small_model(model_type)
    save_model(model_type, model, folder)
    save_processor(model_type, model, folder)
    save_words(model.config, folder)
    return folder


def small_model(model_type: str) -> Any:
    """A small random model of a type."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    whole = getattr(transformers, _SAVED_BY.get(model_type) or types()[model_type])
    content = shrunk(CONFIG_MAPPING[model_type]().to_dict())
    CHANGES.get(model_type, lambda config: None)(content)
    torch.manual_seed(0)
    model = whole(whole.config_class.from_dict(deepcopy(content))).eval()
    # timm writes functions to the config that it is given
    model.config = whole.config_class.from_dict(content)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.is_floating_point():
                noise = torch.randn_like(weight) / (weight.shape[-1] ** 0.5 if weight.ndim > 1 else 4)
                is_norm = "norm" in name and name.endswith("weight") and weight.ndim == 1
                weight.copy_(noise + 1 if is_norm else noise)
                if any(norm in name for norm in ("q_norm", "k_norm")):
                    # Gemma 4 divides scores by nothing but these; larger ones make attention so sharp that rounding shows.
                    weight.mul_(0.4)
    return model


def save_model(model_type: str, model: Any, folder: Path) -> None:
    """Write the weights and the config."""
    model.save_pretrained(folder)
    if type(model.config).model_type != model_type:  # a type that is opened with the class of another
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"model_type": model_type}
        (folder / "config.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


def save_processor(model_type: str, model: Any, folder: Path) -> None:
    """Write the type's image processor for pictures of a few tokens; types without one get none."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as classes

    backends: Mapping[str, str] = classes.get(model_type) or {}
    named = _PROCESSORS.get(model_type) or backends.get("pil") or backends.get("torchvision")
    if named is None:
        return
    options = _processor_options(model_type, model)
    # As a file and not through the class: half of the classes cannot be made without torchvision.
    content = {"image_processor_type": str(named).removesuffix("Pil").removesuffix("Fast"), **options}
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if model_type in _PROCESSOR_CLASSES:
        named = {"processor_class": _PROCESSOR_CLASSES[model_type]}
        (folder / "processor_config.json").write_text(json.dumps(named) + "\n", encoding="utf-8")


def save_words(
    config: Any, folder: Path, words: Sequence[str] = _WORDS, markers: Sequence[str] = (), **named: str
) -> None:
    """Write a tokenizer of a few words, whose `<image>` is the config's image token, and a chat template.

    Args:
        config: of the model.
        folder: of the checkpoint.
        words: its vocabulary.
        markers: further special tokens.
        named: further entries of the tokenizer's config.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    image = image_token_id(config)
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    names = list(dict.fromkeys([*special, "USER", "ASSISTANT", "SYSTEM", ":", "?", "!", ".", ",", *words]))
    assert len(names) + len(markers) < FIRST_SPECIAL_TOKEN
    names += markers
    names += [f"word{number}" for number in range(len(names), VOCABULARY_SIZE)]
    if image is not None and len(special) <= image < VOCABULARY_SIZE:
        names[image] = "<image>"
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    added = [*special, *markers, *(["<image>"] if "<image>" in names else [])]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    content |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", "image_token": "<image>"}
    content |= named
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")


# Types whose processor transformers does not name, or names another than the one without torchvision.
_PROCESSORS = {
    "qwen3_vl_moe": "Qwen2VLImageProcessorPil",
    "glm_ocr": "Glm46VImageProcessorPil",
    "glm4v_moe": "Glm4vImageProcessorPil",
    "fast_vlm": "CLIPImageProcessorPil",
    "deepseek_vl": "DeepseekVLImageProcessorPil",
    "qwen2_5_omni_thinker": "Qwen2VLImageProcessorPil",
    "qwen3_omni_moe_thinker": "Qwen2VLImageProcessorPil",
}

# Types whose prompts need more than a table of marks: InstructBLIP's vision encoder reads them too.
_PROCESSOR_CLASSES = {"instructblip": "InstructBlipProcessor"}


def _processor_options(model_type: str, model: Any) -> dict[str, Any]:
    config = model.config
    vision = getattr(config, "vision_config", None)
    size = getattr(vision, "image_size", 56)
    height, width = (size, size) if isinstance(size, int) else size
    square = {"size": {"height": height, "width": width}, "crop_size": {"height": height, "width": width}}
    return _OPTIONS[model_type](config) if model_type in _OPTIONS else _by_grid(model) or square


def _by_grid(model: Any) -> dict[str, Any]:
    """Of a processor that keeps a picture's shape, as Qwen-VL's: 4 to 12 tokens a picture; nothing for others."""
    vision, holder = getattr(model.config, "vision_config", None), feature_holder(model)
    keeps_shape = holder is not None and "image_grid_thw" in feature_inputs(holder)
    if vision is None or not keeps_shape or not isinstance(getattr(vision, "patch_size", None), int):
        return {}
    patch = vision.patch_size
    merge = getattr(vision, "spatial_merge_size", None) or getattr(vision, "merge_size", None) or 2
    token = (patch * merge) ** 2
    return {
        "patch_size": patch,
        "temporal_patch_size": getattr(vision, "temporal_patch_size", 1),
        "merge_size": merge,
        "size": {"shortest_edge": 4 * token, "longest_edge": 12 * token},
    }


def _of_pixtral(config: Any) -> dict[str, Any]:
    edge = config.vision_config.patch_size * config.spatial_merge_size
    return {"patch_size": {"height": edge, "width": edge}, "size": {"longest_edge": 112}}


_OPTIONS = {
    "mistral3": _of_pixtral,
    "lighton_ocr": _of_pixtral,
    "mistral_large4": _of_pixtral,
    "paddleocr_vl": lambda config: {
        "patch_size": config.vision_config.patch_size,
        "temporal_patch_size": 1,
        "merge_size": 2,
        "size": {
            "shortest_edge": 4 * (2 * config.vision_config.patch_size) ** 2,
            "longest_edge": 12 * (2 * config.vision_config.patch_size) ** 2,
        },
    },
    "gemma4": lambda config: {
        "patch_size": config.vision_config.patch_size,
        "pooling_kernel_size": config.vision_config.pooling_kernel_size,
        "max_soft_tokens": 70,
    },
    **dict.fromkeys(
        ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"),
        lambda config: {
            "patch_size": config.vision_config.patch_size,
            "scale_resolution": 14 * config.vision_config.patch_size,
            "max_slice_nums": 4,
        },
    ),
    **dict.fromkeys(
        ("smolvlm", "idefics3"),
        lambda config: {
            "size": {"longest_edge": 2 * config.vision_config.image_size},
            "max_image_size": {"longest_edge": config.vision_config.image_size},
        },
    ),
    "ernie4_5_vl_moe": lambda config: {
        "patch_size": config.vision_config.patch_size,
        "merge_size": config.vision_config.spatial_merge_size,
        "size": {"shortest_edge": 4 * 28**2, "longest_edge": 12 * 28**2},
    },
    "aria": lambda config: {"max_image_size": 490, "min_image_size": 336},
    "deepseek_vl_hybrid": lambda config: {
        "size": {"height": config.vision_config.image_size, "width": config.vision_config.image_size},
        "high_res_size": {"height": 64, "width": 64},
    },
    "emu3": lambda config: {"min_pixels": 16 * 16, "max_pixels": 32 * 32, "spatial_factor": 2},
    **dict.fromkeys(
        ("granite4_vision", "llava_onevision"),
        lambda config: {
            "image_grid_pinpoints": config.image_grid_pinpoints,
            "size": {"shortest_edge": config.vision_config.image_size},
            "crop_size": {"height": config.vision_config.image_size, "width": config.vision_config.image_size},
        },
    ),
    "kimi_k25": lambda config: {},
    "perception_lm": lambda config: {"tile_size": 56, "max_num_tiles": 9},
    "gemma4_unified": lambda config: {
        "patch_size": config.vision_config.patch_size,
        "pooling_kernel_size": config.vision_config.pooling_kernel_size,
        "max_soft_tokens": 70,
    },
    "inkling2": lambda config: {},
    "unlimited_ocr": lambda config: {"size": {"height": 128, "width": 128}},
    "nemotron_h_omni": lambda config: {"min_num_patches": 16, "max_num_patches": 48},
    "molmo2": lambda config: {
        "size": dict(zip(("height", "width"), config.vision_config.image_size, strict=True)),
        "patch_size": config.vision_config.patch_size,
        "overlap_margins": [1, 1],
        "max_crops": 8,
    },
    "video_llama_3": lambda config: {
        "patch_size": config.vision_config.patch_size,
        "merge_size": 1,
        "size": {
            "shortest_edge": 4 * config.vision_config.patch_size**2,
            "longest_edge": 16 * config.vision_config.patch_size**2,
        },
    },
}
assert FIRST_SPECIAL_TOKEN < VOCABULARY_SIZE
