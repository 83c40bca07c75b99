"""Torch's side of the zoo: tiny seeded Llama and LLaVA models, and running one on a graph's own feeds.

Everything that needs torch at import time is here, so that `makers.py` (the table of names) stays light.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer

LAYERS = 4
WIDTH = 64
HEADS = 4
KV_HEADS = 2
HEAD_WIDTH = WIDTH // HEADS
VOCABULARY = 300
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID = 0, 1, 2, 299

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16}

# "past_key_values.2.key" (optimum, genai), "input.past_key_values.layers.2.keys" (transformers' exporter) and
# "input.cache.layers.2.keys" (the same from 5.24 on)
CACHE_NAME = re.compile(r"(?:past_key_values|cache)\.(?:layers\.)?(\d+)\.(key|value)s?$")


def tiny_llama(dtype: str) -> LlamaForCausalLM:
    model = LlamaForCausalLM(_text_config())
    return with_lively_weights(model).to(TORCH_DTYPES[dtype])


def tiny_llava(dtype: str) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision, text_config=_text_config(), image_token_index=IMAGE_ID)
    return with_lively_weights(LlavaForConditionalGeneration(config)).to(TORCH_DTYPES[dtype])


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module with `.layers`, one per decoder layer."""
    return model.model.language_model if isinstance(model, LlavaForConditionalGeneration) else model.model


def run_torch(
    model: PreTrainedModel, feeds: Mapping[str, np.ndarray], run: Callable[..., Mapping[str, Any]] | None = None
) -> Tensor:
    """The model's logits for a graph's feeds, with whatever cache they carry; every feed goes in under its own name.

    `run(model, **feeds)` stands for the model's own call where that hides what the decoder takes.
    """
    inputs = {name: torch.from_numpy(array) for name, array in feeds.items() if not CACHE_NAME.search(name)}
    if "position_ids" not in inputs:
        text = inputs["inputs_embeds" if "inputs_embeds" in inputs else "input_ids"]
        inputs["position_ids"] = positions_of(inputs["attention_mask"])[:, -text.shape[1] :]
    with torch.no_grad():
        inputs |= {"past_key_values": filled_cache(past_of(feeds)), "use_cache": True}
        return (run(model, **inputs) if run else model(**inputs))["logits"]


@contextmanager
def recorded_layers(decoder: nn.Module) -> Iterator[list[np.ndarray]]:
    """Within the block, every decoder layer appends its output (before the final norm) to the list."""
    recorded: list[np.ndarray] = []

    def record(_layer: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        state = output[0] if isinstance(output, tuple) else output
        recorded.append(state.detach().to(torch.float32).numpy().copy())

    hooks = [layer.register_forward_hook(record) for layer in decoder.layers]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def positions_of(attention_mask: Tensor) -> Tensor:
    """Each token's own count of real tokens before it, wherever the padding is."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def filled_cache(past: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache holding exactly these tensors; an empty list is an empty cache."""
    cache = DynamicCache()
    for keys, values in past:
        # Not `update()`: it concatenates with an empty constant, and a tracer would write that into the graph.
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def empty_past(
    batch: int, length: int, dtype: str, layers: int = LAYERS, kv_heads: int = KV_HEADS, head_width: int = HEAD_WIDTH
) -> list[tuple[Tensor, Tensor]]:
    """A past of zeros, `length` tokens long, for tracing."""

    def zeros() -> Tensor:
        return torch.zeros((batch, kv_heads, length, head_width), dtype=TORCH_DTYPES[dtype])

    # A tensor of its own for each: given one tensor twice, torch.export without a word wires every layer to the first.
    return [(zeros(), zeros()) for _ in range(layers)]


def take_quantized_weights(model: LlamaForCausalLM, path: Path) -> None:
    """Give torch the weights that genai's int4 graph really multiplies by, so that the two can be compared at all."""
    arrays = {i.name: onnx.numpy_helper.to_array(i, str(path.parent)) for i in onnx.load(path).graph.initializer}
    weights: dict[str, Tensor] = {}
    for quantized in [name for name in arrays if name.endswith(".MatMul.weight_Q4")]:
        linear = quantized.removesuffix(".MatMul.weight_Q4").replace(".attn.", ".self_attn.")
        scales = arrays[quantized.replace("_Q4", "_scales")]
        weight = torch.from_numpy(_dequantized(arrays[quantized], scales))
        if linear.endswith("qkv_proj"):
            parts = weight.split([WIDTH, KV_HEADS * HEAD_WIDTH, KV_HEADS * HEAD_WIDTH])
            weights |= {linear.replace("qkv", kind) + ".weight": part for kind, part in zip("qkv", parts, strict=True)}
        else:
            weights[linear + ".weight"] = weight
    expected = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if weights.keys() != {name + ".weight" for name in expected}:
        raise AssertionError(f"{path}: int4 weights {sorted(weights)}, expected {sorted(expected)}")
    model.load_state_dict(weights, strict=False)


def _dequantized(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MatMulNBits' symmetric int4: `packed` [out, blocks, bytes], two values a byte, the low half first, zero at 8."""
    values = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1).astype(np.float32) - 8
    return (values * scales.reshape(*packed.shape[:2], 1)).reshape(len(packed), -1)


class FlatDecoder(nn.Module):
    """The model with tensors in and tensors out, as torch's own exporters want it.

    Without `past` it exports a graph without a cache; with it, the layout that optimum and onnx-community use.
    """

    def __init__(self, model: PreTrainedModel, text_name: str) -> None:
        super().__init__()
        self.model = model
        self.text_name = text_name

    def forward(
        self, text: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        cache = filled_cache(list(zip(past[::2], past[1::2], strict=True))) if past else None
        answer = self.model(
            **{self.text_name: text},
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        if cache is None:
            return answer.logits
        present = [tensor for layer in answer.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (answer.logits, *present)


def past_of(feeds: Mapping[str, np.ndarray]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer, in order; nothing where all of them are empty."""
    found: dict[tuple[int, str], Tensor] = {}
    for name, array in feeds.items():
        if matched := CACHE_NAME.search(name):
            found[int(matched[1]), matched[2]] = torch.from_numpy(array)
    if not any(tensor.shape[2] for tensor in found.values()):
        return []
    return [(found[layer, "key"], found[layer, "value"]) for layer in sorted({layer for layer, _ in found})]


def _text_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )


def with_lively_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Seeded weights under which every branch matters.

    Transformers starts with std 0.02 and norms of ones: the branches are then lost in the residual, a wrong layer
    passes a tolerance test, and exporters merge the nine equal norm weights into one initializer, as in no real model.
    """
    generator = torch.Generator().manual_seed(20240717)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("weight") and parameter.dim() == 1:  # a norm's
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("embed_tokens.weight"):
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model.eval()
