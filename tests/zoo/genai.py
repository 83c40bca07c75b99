"""What onnxruntime-genai's builder writes, beyond the plain Llamas of `makers.py`: families, flavours and options.

Its graphs have `Skip*LayerNormalization` (pattern B). Qwen2.5-VL in float16 keeps the sums in float32 and rounds them
between its sub-layers (F); Qwen3.5 has linear attention with states of fixed size (I). int4 graphs have no torch truth
here: their weights, and for MatMulNBits their activations, are rounded.

Left out: int4 in the CUDA flavour. On the CPU provider onnxruntime runs a float16 MatMulNBits in float32 once all its
readers are cast, at any level of optimisation, so that any float16 Add put behind it changes the rounding before it: a closed
gate with positions `all` is then not the identity bit for bit, and the proof refuses to write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from zoo.exporting import export_once, release
from zoo.families import FAMILIES, TEXT, Family, three_positions, tiny
from zoo.genai_builder import Precision, Provider, build
from zoo.model import TOLERANCES, Feeds, RunTorch, SpecialFeeds, ZooModel, zoo_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CONV_KERNEL, LINEAR_KEY_HEADS, LINEAR_VALUE_HEADS, LINEAR_HEAD_WIDTH = 4, 2, 4, 16


def linear_attention_states(random: np.random.Generator, mask: np.ndarray, fresh: np.ndarray, feeds: Feeds) -> Feeds:
    """Three equal rows of positions (text only), and zeros for the states of the linear layers before a prompt."""
    channels = (2 * LINEAR_KEY_HEADS + LINEAR_VALUE_HEADS) * LINEAR_HEAD_WIDTH
    sizes = {
        "conv": (channels, CONV_KERNEL - 1),
        "recurrent": (LINEAR_VALUE_HEADS, LINEAR_HEAD_WIDTH, LINEAR_HEAD_WIDTH),
    }
    empty = [name for name in feeds if name.startswith("past.") and not feeds[name].size]
    zeros = {name: np.zeros((len(mask), *sizes[name.rpartition(".")[2]])) for name in empty}
    return {"position_ids": np.stack([feeds["position_ids"]] * 3), **zeros}


def run_whole(model: PreTrainedModel, feeds: Mapping[str, np.ndarray]) -> Tensor:
    """Logits of whole sequences: torch keeps the states of linear layers in a form of its own."""
    import torch

    if any(array.shape[2] for name, array in feeds.items() if name.startswith("past_key_values")):
        raise ValueError("torch is run on whole sequences here, not on a filled cache")
    inputs = {name: torch.from_numpy(array) for name, array in feeds.items() if not name.startswith("past")}
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


@dataclass(frozen=True)
class Subject:
    """A family as the builder knows it: it looks at `architectures`, so some rows need another class than `families`."""

    family: Family
    patterns: tuple[str, ...] = ("B",)
    special: SpecialFeeds | None = None
    torch_runner: RunTorch | None = None
    options: Mapping[str, bool] = field(default_factory=dict)


def text(**more: Any) -> dict[str, Any]:
    return {**TEXT, **more}


def _qwen3_5() -> dict[str, Any]:
    layer_types = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    linear = {"linear_conv_kernel_dim": CONV_KERNEL, "linear_key_head_dim": LINEAR_HEAD_WIDTH}
    linear |= {"linear_value_head_dim": LINEAR_HEAD_WIDTH, "linear_num_key_heads": LINEAR_KEY_HEADS}
    linear |= {"linear_num_value_heads": LINEAR_VALUE_HEADS, "head_dim": 16}
    # Without sections the builder writes a rotary embedding that takes no positions of three axes.
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    linear |= {"rope_parameters": {**rope, "partial_rotary_factor": 0.5}}
    towers = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14}
    return {
        "text_config": text(layer_types=layer_types, **linear),
        "vision_config": {**towers, "out_hidden_size": 64, "num_position_embeddings": 16},
        "tie_word_embeddings": False,
    }


SUBJECTS: dict[str, Subject] = {
    "llama": Subject(Family("llama", "LlamaForCausalLM", ("B",), text, "input_ids")),
    "llama-tied": Subject(
        Family("llama", "LlamaForCausalLM", ("B",), lambda: text(tie_word_embeddings=True), "input_ids"), ("B", "L")
    ),
    "phi3": Subject(
        Family("phi3", "Phi3ForCausalLM", ("B",), lambda: text(original_max_position_embeddings=128), "input_ids")
    ),
    "qwen2-5-vl": Subject(FAMILIES["qwen2_5_vl"], ("B", "F"), three_positions, options={"exclude_embeds": True}),
    "qwen3-5": Subject(
        Family("qwen3_5", "Qwen3_5ForConditionalGeneration", ("B", "I"), _qwen3_5, "input_ids"),
        ("B", "I"),
        linear_attention_states,
        run_whole,
    ),
}


def make(
    subject: str,
    folder: Path,
    precision: Precision = "fp32",
    provider: Provider | None = None,
    flavour: str = "",
    **options: bool,
) -> ZooModel:
    """One graph of one row; float16 in the CUDA flavour, as the builder has no other for it.

    Args:
        flavour: what the options are called in the graph's name.
        options: the builder's own.
    """
    row = SUBJECTS[subject]
    provider = provider or ("cuda" if precision == "fp16" else "cpu")
    dtype = "float16" if provider == "cuda" else "float32"

    def export(target: Path) -> None:
        build(tiny(row.family), target, precision, provider, **{**row.options, **options})

    export_once(folder, export)
    model = tiny(row.family, dtype) if precision != "int4" and not options.get("exclude_lm_head") else None
    name = f"{subject}-genai-{flavour}-{precision}" if flavour else f"{subject}-genai-{precision}"
    return zoo_model(
        name,
        folder / "model.onnx",
        dtype=dtype,
        # Where the builder asks for norms in float32, it casts around each SkipNorm: the sum is float32.
        stream_dtype="float32" if "F" in row.patterns else dtype,
        layers=row.family.layers,
        width=64,
        kv_heads=row.family.kv_heads,
        head_width=row.family.head_width,
        vocabulary=300,
        patterns=row.patterns,
        exporter=release("onnxruntime-genai"),
        family=row.family.model_type,
        torch_model=model,
        torch_decoder=row.family.decoder(model) if model is not None else None,
        padding="right",
        tolerance=TOLERANCES[precision],
        special_feeds=row.special,
        torch_runner=row.torch_runner,
    )


MAKERS: dict[str, Callable[[Path], ZooModel]] = {
    "llama-genai-qdq-int4": partial(make, "llama", precision="int4", flavour="qdq", use_qdq=True),
    "llama-tied-genai-fp32": partial(make, "llama-tied"),  # the head is a Transpose of the table
    "llama-tied-genai-int4": partial(make, "llama-tied", precision="int4"),  # GatherBlockQuantized
    "llama-genai-embeds-fp16": partial(make, "llama", precision="fp16", flavour="embeds", exclude_embeds=True),
    "llama-genai-embeds-int4": partial(make, "llama", precision="int4", flavour="embeds", exclude_embeds=True),
    "llama-genai-hidden-fp32": partial(make, "llama", flavour="hidden", include_hidden_states=True),
    "llama-genai-headless-fp32": partial(make, "llama", flavour="headless", exclude_lm_head=True),
    **{
        f"{subject}-genai-{precision}": partial(make, subject, precision=precision)
        for subject in ("phi3", "qwen2-5-vl", "qwen3-5")
        for precision in ("fp32", "fp16", "int4")
    },
}
