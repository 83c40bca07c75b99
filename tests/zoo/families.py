"""Tiny decoders of many families through transformers' own exporter: one row per family, and one maker for all rows.

A row says how the family's config is made small and what its decoder takes beside text, mask, positions and cache. What
the maker does is the same for all: the text decoder as ONE graph for prefill and decoding, traced on a batch of two with
a filled cache and a padded row (see `makers.make_llava_transformers`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
from zoo.exporting import export_once, release
from zoo.makers import TRACE_BATCH, TRACE_PAD, TRACE_PAST, TRACE_SEQUENCE
from zoo.model import SHORT_DTYPES, Feeds, SpecialFeeds, ZooModel, zoo_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Fusions = Literal["cpu", "cuda"]
Maker = Callable[[Path], ZooModel]

FUSED = {"SkipSimplifiedLayerNormalization": "B'", "SkipLayerNormalization": "B''"}

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_WIDTH = 4, 64, 4, 2, 16
VOCABULARY = 300
IMAGE_ID, VIDEO_ID = 299, 298
DEEPSTACK_LAYERS = 2
MLLAMA_CROSS_LAYER, MLLAMA_TILES = 2, 2
MLLAMA_IMAGE_TOKENS = MLLAMA_TILES * 5  # four patches and a class token each

TEXT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

SEVERAL_STREAMS = (
    "layer 0: the residual sum 'add_1440' has 4 axes and not [batch, sequence, width] (several streams side by side), so a "
    "layer has no single hidden state; such decoders cannot be guarded"
)


@dataclass(frozen=True)
class Family:
    """One row: a `model_type` of transformers, and what is special about its decoder."""

    model_type: str
    model_class: str
    patterns: tuple[str, ...]
    config: Callable[[], Mapping[str, Any]]
    """Arguments of the model's config class; sub-configs as plain data."""
    text_name: str = "inputs_embeds"
    special: SpecialFeeds | None = None
    run: Callable[..., Any] | None = None
    """What is traced in place of the model's forward, where that hides what the decoder takes."""
    layers: int = LAYERS
    kv_heads: int = KV_HEADS
    head_width: int = HEAD_WIDTH
    decoder: Callable[[Any], Any] = lambda model: decoder_of(model)
    """The module with `.layers`."""
    cache: bool = True
    refusal: str = ""
    """What the anatomy says, where it is right to refuse."""


# What only some families take


def three_positions(random: np.random.Generator, mask: np.ndarray, fresh: np.ndarray, feeds: Feeds) -> Feeds:
    """Qwen's positions in time, height and width, [3, batch, sequence]: those of a picture differ from each other."""
    time = feeds["position_ids"]
    return {"position_ids": np.stack([time, time // 2, (time + 1) // 2])}


def deepstack(random: np.random.Generator, mask: np.ndarray, fresh: np.ndarray, feeds: Feeds) -> Feeds:
    """Qwen3-VL's features of the image tower's lower layers, [2, image tokens, width], added after the first two layers.

    The second and third token of every row of a prompt are an image's. The exported graph cannot gather from no features
    at all, so where there is no image (later steps) zeros are added to the last row's last token: nothing, as in torch.
    """
    number = fresh.cumsum(axis=1)
    prompt = mask.shape[1] == fresh.shape[1]
    places = (fresh == 1) & (number >= 2) & (number <= 3) & prompt
    if image_tokens := int(places.sum()):
        states = random.standard_normal((DEEPSTACK_LAYERS, image_tokens, WIDTH))
    else:
        states = np.zeros((DEEPSTACK_LAYERS, 1, WIDTH))
        # the last row's: the features of several steps in a row are then in the order of the mask
        places[-1, -1] = True
    return {
        **three_positions(random, mask, fresh, feeds),
        "visual_pos_masks": places,
        "deepstack_visual_embeds": states,
    }


def run_with_deepstack(
    model: Any, visual_pos_masks: Tensor, deepstack_visual_embeds: Tensor, **inputs: Any
) -> dict[str, Any]:
    """Qwen3-VL's decoder and head; `forward` takes these features from the image tower alone."""
    states = model.model.language_model(
        visual_pos_masks=visual_pos_masks, deepstack_visual_embeds=list(deepstack_visual_embeds), **inputs
    )
    return {"logits": model.lm_head(states.last_hidden_state), "past_key_values": states.past_key_values}


def image_cache(random: np.random.Generator, mask: np.ndarray, fresh: np.ndarray, feeds: Feeds) -> Feeds:
    """Mllama's cross attention reads the image from the cache of its own layer, which no step changes.

    The first token of a prompt stands before the image and sees none of it; the second sees one of the two tiles.
    """
    names = [name for name in feeds if f"layers.{MLLAMA_CROSS_LAYER}." in name]
    shape = (len(mask), KV_HEADS, MLLAMA_IMAGE_TOKENS, HEAD_WIDTH)
    cache = {name: feeds[name] if feeds[name].shape[2] else random.standard_normal(shape) for name in names}
    number = mask.cumsum(axis=1)[:, -fresh.shape[1] :]
    seen = np.stack([number >= 2, number >= 3], axis=-1)
    return {**cache, "cross_attention_mask": seen[:, :, None, :]}


def gpt2_decoder(model: Any) -> Any:
    """GPT-2 calls its layers `h`."""
    decoder = model.transformer
    decoder.layers = decoder.h
    return decoder


def decoder_of(model: Any) -> Any:
    """The module with `.layers`, where most families keep it."""
    return getattr(model.model, "language_model", model.model)


def text_model_of(model: Any) -> Any:
    """The same in SmolVLM and Idefics3."""
    return model.model.text_model


# The configs


def two_towers(vision_type: str, text_type: str, image: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """An image tower of one family and a text decoder of another."""
    return {
        "vision_config": {**VISION, "model_type": vision_type, **(image or {})},
        "text_config": {**TEXT, "model_type": text_type, **more},
        "image_token_index": IMAGE_ID,
        "tie_word_embeddings": False,
    }


def idefics() -> dict[str, Any]:
    towers = {"vision_config": VISION, "text_config": {**TEXT, "model_type": "llama"}}
    return {**towers, "image_token_id": IMAGE_ID, "tie_word_embeddings": False}


def qwen_vl(image: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    tower = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": WIDTH, "patch_size": 14, **image}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    return {
        "vision_config": tower,
        "text_config": {**TEXT, "rope_parameters": rope, **more},
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "tie_word_embeddings": False,
    }


def gemma3() -> dict[str, Any]:
    # A window shorter than the tests' prompts, so that it matters.
    more = {"head_dim": HEAD_WIDTH, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
    return {**two_towers("siglip_vision_model", "gemma3_text", **more), "mm_tokens_per_image": 4}


def paligemma() -> dict[str, Any]:
    towers = two_towers(
        "siglip_vision_model", "gemma2", {"projection_dim": WIDTH}, head_dim=HEAD_WIDTH, sliding_window=6
    )
    return {**towers, "projection_dim": WIDTH, "hidden_size": WIDTH}


def mllama() -> dict[str, Any]:
    tower = {
        **VISION,
        "num_global_layers": 1,
        "attention_heads": 2,
        "max_num_tiles": MLLAMA_TILES,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 64,
        "supported_aspect_ratios": [[1, 1], [1, 2]],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {**TEXT, "cross_attention_layers": [MLLAMA_CROSS_LAYER], "rope_parameters": rope}
    return {"vision_config": tower, "text_config": text, "image_token_index": VOCABULARY}


def gpt2() -> dict[str, Any]:
    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128}
    return {**sizes, "bos_token_id": 1, "eos_token_id": 2}


def granite() -> dict[str, Any]:
    scales = {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0}
    return {**TEXT, **scales, "attention_multiplier": 0.25}


def qwen3_moe() -> dict[str, Any]:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return {**TEXT, **experts, "num_hidden_layers": 2, "head_dim": HEAD_WIDTH}


def gemma3n() -> dict[str, Any]:
    return {
        **TEXT,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
        "sliding_window": 6,
        "head_dim": HEAD_WIDTH,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    }


_ROWS = (
    Family(
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        ("A",),
        lambda: {**two_towers("siglip_vision_model", "qwen2"), "video_token_index": VIDEO_ID},
    ),
    Family(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        ("A",),
        lambda: qwen_vl({"embed_dim": 32, "hidden_size": WIDTH}),
        special=three_positions,
    ),
    Family(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        ("A",),
        lambda: qwen_vl({"intermediate_size": 64}),
        special=three_positions,
    ),
    Family(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        ("G",),
        lambda: qwen_vl({"intermediate_size": 64, "depth": 3, "deepstack_visual_indexes": [0, 1]}, head_dim=HEAD_WIDTH),
        special=deepstack,
        run=run_with_deepstack,
    ),
    Family("smolvlm", "SmolVLMForConditionalGeneration", ("A",), idefics, decoder=text_model_of),
    Family("idefics3", "Idefics3ForConditionalGeneration", ("A",), idefics, decoder=text_model_of),
    Family(
        "internvl",
        "InternVLForConditionalGeneration",
        ("A",),
        lambda: {
            **two_towers("internvl_vision", "qwen2", {"image_size": [28, 28], "patch_size": [14, 14]}),
            "image_token_id": IMAGE_ID,
        },
    ),
    Family("gemma3", "Gemma3ForConditionalGeneration", ("C",), gemma3),
    Family("paligemma", "PaliGemmaForConditionalGeneration", ("C",), paligemma),
    Family("mllama", "MllamaForConditionalGeneration", ("H",), mllama, special=image_cache),
    Family("phi", "PhiForCausalLM", ("D",), lambda: TEXT, "input_ids"),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        ("D",),
        lambda: TEXT,
        "input_ids",
        kv_heads=HEADS,
        decoder=lambda model: model.gpt_neox,
    ),
    Family("cohere", "CohereForCausalLM", ("D",), lambda: {**TEXT, "logit_scale": 1.0}, "input_ids"),
    Family("granite", "GraniteForCausalLM", ("E",), granite, "input_ids"),
    Family("gpt2", "GPT2LMHeadModel", ("A",), gpt2, "input_ids", kv_heads=HEADS, decoder=gpt2_decoder),
    Family("olmo2", "Olmo2ForCausalLM", ("C",), lambda: TEXT, "input_ids"),  # norms behind the branches alone
    Family("qwen3_moe", "Qwen3MoeForCausalLM", ("A",), qwen3_moe, "input_ids", layers=2),
    Family("gemma3n_text", "Gemma3nForCausalLM", (), gemma3n, "input_ids", layers=2, refusal=SEVERAL_STREAMS),
)
FAMILIES: Mapping[str, Family] = {row.model_type: row for row in _ROWS}


def tiny(family: Family, dtype: str = "float32") -> PreTrainedModel:
    """The family's model with seeded weights."""
    import transformers
    from zoo.truth import TORCH_DTYPES, with_lively_weights

    model_class = getattr(transformers, family.model_class)
    config = model_class.config_class(**family.config())
    return with_lively_weights(model_class(config)).to(TORCH_DTYPES[dtype])


def make(model_type: str, folder: Path, dtype: str = "float32", ort_fusions: Fusions | None = None) -> ZooModel:
    """One row's decoder, exported by `OnnxExporter().export(...)`."""
    from zoo.truth import run_torch

    family = FAMILIES[model_type]
    model = tiny(family, dtype)

    def export(target: Path) -> None:
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        config = OnnxConfig(dynamic=True, opset_version=18, ort_fusions=ort_fusions)
        if family.run is not None:
            model.forward = lambda **inputs: family.run(model, **inputs)
        try:
            OnnxExporter().export(model, trace_inputs(family, dtype), config).save_pretrained(target)
        finally:
            if family.run is not None:
                del model.forward  # uncovers the class's own

    export_once(folder, export)
    return zoo_model(
        _name(model_type, dtype, ort_fusions),
        folder / "model.onnx",
        dtype=dtype,
        layers=family.layers,
        width=WIDTH,
        kv_heads=family.kv_heads,
        head_width=family.head_width,
        vocabulary=VOCABULARY,
        patterns=_patterns(family, folder / "model.onnx", dtype),
        exporter=release("transformers"),
        family=model_type,
        torch_model=model,
        torch_decoder=family.decoder(model),
        refusal=family.refusal,
        special_feeds=family.special,
        torch_runner=run_torch if family.run is None else partial(run_torch, run=family.run),
    )


def _patterns(family: Family, path: Path, dtype: str) -> tuple[str, ...]:
    """The family's own, and what the exporter's fusions and half precision made of it."""
    ops = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    fused = [letter for op_type, letter in FUSED.items() if op_type in ops]
    own = [letter for letter in family.patterns if not (fused and letter == "A")]
    half = ["A3"] if dtype == "float16" and not fused else []
    return (*own, *fused, *half)


def trace_inputs(family: Family, dtype: str) -> dict[str, Any]:
    """A step after `TRACE_PAST` tokens, its first row padded on the left."""
    import torch
    from zoo.truth import TORCH_DTYPES, empty_past, filled_cache, positions_of

    past = TRACE_PAST if family.cache else 0
    mask = torch.ones(TRACE_BATCH, past + TRACE_SEQUENCE, dtype=torch.int64)
    mask[0, :TRACE_PAD] = 0
    inputs: dict[str, Any] = {
        "attention_mask": mask,
        "position_ids": positions_of(mask)[:, past:],
    }
    if family.text_name == "input_ids":
        inputs["input_ids"] = torch.full((TRACE_BATCH, TRACE_SEQUENCE), 3, dtype=torch.int64)
    else:
        inputs["inputs_embeds"] = torch.ones(TRACE_BATCH, TRACE_SEQUENCE, WIDTH, dtype=TORCH_DTYPES[dtype])
    if family.special in (three_positions, deepstack):
        inputs["position_ids"] = inputs["position_ids"].expand(3, -1, -1).clone()
    if family.special is deepstack:
        places = torch.zeros(TRACE_BATCH, TRACE_SEQUENCE, dtype=torch.bool)
        places[:, 1:3] = True
        inputs["visual_pos_masks"] = places
        inputs["deepstack_visual_embeds"] = torch.ones(
            DEEPSTACK_LAYERS, 2 * TRACE_BATCH, WIDTH, dtype=TORCH_DTYPES[dtype]
        )
    if family.special is image_cache:
        inputs["cross_attention_mask"] = torch.ones(TRACE_BATCH, TRACE_SEQUENCE, 1, MLLAMA_TILES, dtype=torch.int64)
    if family.cache:
        pairs = empty_past(TRACE_BATCH, past, dtype, family.layers, family.kv_heads, family.head_width)
        if family.special is image_cache:
            pairs[MLLAMA_CROSS_LAYER] = tuple(
                torch.zeros(TRACE_BATCH, KV_HEADS, MLLAMA_IMAGE_TOKENS, HEAD_WIDTH, dtype=TORCH_DTYPES[dtype])
                for _ in "kv"
            )
        inputs["past_key_values"] = filled_cache(pairs)
    return inputs


def _row(model_type: str, dtype: str = "float32", ort_fusions: Fusions | None = None) -> tuple[str, Maker]:
    return _name(model_type, dtype, ort_fusions), partial(make, model_type, dtype=dtype, ort_fusions=ort_fusions)


def _name(model_type: str, dtype: str, ort_fusions: Fusions | None) -> str:
    name = f"{model_type.replace('_', '-')}-{SHORT_DTYPES[dtype]}"
    return f"{name}-ort-{ort_fusions}" if ort_fusions else name


MAKERS: dict[str, Maker] = dict(
    [
        *(_row(model_type) for model_type in FAMILIES),
        *(_row(model_type, "float16") for model_type in ("qwen2_5_vl", "gemma3", "mllama")),
        *(_row(model_type, ort_fusions="cpu") for model_type in ("gpt2", "phi", "qwen2_5_vl", "gemma3")),
        _row("qwen2_5_vl", "float16", "cuda"),
    ]
)

# What the exporter writes and onnxruntime cannot load or run on a CPU: name -> (how it is made, onnxruntime's words).
NOT_EXPORTED: dict[str, tuple[Maker, str]] = {
    "gemma3-fp16-ort-cuda": (
        partial(make, "gemma3", dtype="float16", ort_fusions="cuda"),
        # The fusion takes the norm's sum in float32 and its weight in float16.
        "Type parameter (T) of Optype (SkipSimplifiedLayerNormalization) bound to different types "
        "(tensor(float16) and tensor(float)",
    ),
    "qwen3-moe-fp32-ort-cuda": (
        partial(make, "qwen3_moe", ort_fusions="cuda"),
        "Non-zero status code returned while running MoE node",  # the fused experts: for CUDA alone
    ),
}
