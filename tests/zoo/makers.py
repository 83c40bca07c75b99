"""Tiny decoders written by real exporters, each with torch's own truth beside its graph.

`MAKERS` is the table: a name, and a function from a folder to a `ZooModel`. A folder that is there already is not
exported again; torch's side is seeded and rebuilt, so a folder can be shared between processes. Torch is imported
inside the makers: a test module may be parametrised over `MAKERS` without paying for it.

    1  transformers' `OnnxExporter`: LLaVA's text decoder, `inputs_embeds` and a cache
    2  the same, then fused for ONNX Runtime
    3  `torch.onnx.export(dynamo=True)`
    4  `torch.onnx.export(dynamo=False)`: TorchScript, what optimum wrote the onnx-community models with
    5  onnxruntime-genai's model builder
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from zoo.exporting import export_once, release
from zoo.genai_builder import build
from zoo.model import SHORT_DTYPES, TOLERANCES, Feeds, Padding, ZooModel, present_name, zoo_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["MAKERS", "Feeds", "ZooModel"]

# Batch 2, one padded row and a filled past: a batch of one, or an unpadded one, is baked into the graph as a constant.
TRACE_BATCH, TRACE_SEQUENCE, TRACE_PAST, TRACE_PAD = 2, 5, 3, 2


# Case 1 and 2: transformers' own exporter, and what it makes for ONNX Runtime


def make_llava_transformers(
    folder: Path, dtype: str = "float32", opset: int = 18, ort_fusions: Literal["cpu"] | None = None
) -> ZooModel:
    """The text decoder of a tiny LLaVA: ONE graph for prefill and decoding, `inputs_embeds` in."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    from zoo.truth import empty_past, filled_cache, tiny_llava

    model = tiny_llava(dtype)

    def export(target: Path) -> None:
        text, mask, positions = _trace_inputs("inputs_embeds", TRACE_PAST, dtype)
        inputs = {
            "inputs_embeds": text,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": filled_cache(empty_past(TRACE_BATCH, TRACE_PAST, dtype)),
        }
        config = OnnxConfig(dynamic=True, opset_version=opset, ort_fusions=ort_fusions)
        OnnxExporter().export(model, inputs, config).save_pretrained(target)

    family = "llava-transformers-ort" if ort_fusions else "llava-transformers"
    export_once(folder, export)
    patterns = ("B'",) if ort_fusions else ("A",) if dtype == "float32" else ("A", "A3")
    return _zoo_model(_name(family, dtype, opset, usual_opset=18), folder, model, dtype, "transformers", patterns)


make_llava_transformers_ort = partial(make_llava_transformers, ort_fusions="cpu")


# Case 3: torch's exporter over `torch.export`


def make_llama_dynamo(folder: Path, dtype: str = "float32", opset: int = 18, cache: bool = False) -> ZooModel:
    """A tiny Llama, `input_ids` in; without a cache unless asked."""
    import torch
    from zoo.truth import FlatDecoder, tiny_llama

    model = tiny_llama(dtype)
    names = _flat_names("input_ids", cache)

    def export(target: Path) -> None:
        batch, sequence, past = (torch.export.Dim(name) for name in ("batch", "sequence", "past"))
        total = torch.export.Dim.DYNAMIC if cache else sequence
        dynamic_shapes = ({0: batch, 1: sequence}, {0: batch, 1: total}, {0: batch, 1: sequence})
        if cache:
            dynamic_shapes = (*dynamic_shapes, tuple({0: batch, 2: past} for _ in names.past))
        torch.onnx.export(
            FlatDecoder(model, "input_ids"),
            _flat_trace_inputs("input_ids", cache, dtype),
            target / "model.onnx",
            dynamo=True,
            opset_version=opset,
            input_names=names.inputs,
            output_names=names.outputs,
            dynamic_shapes=dynamic_shapes,
            external_data=True,
        )

    export_once(folder, export)
    name = _name("llama-dynamo-cache" if cache else "llama-dynamo", dtype, opset, usual_opset=18)
    return _zoo_model(name, folder, model, dtype, "torch", ("A",))


# Case 4: torch's exporter over TorchScript


def make_llama_torchscript(folder: Path, dtype: str = "float32", opset: int = 17) -> ZooModel:
    """A tiny Llama, `input_ids` in, no cache: a file without any value types."""
    from zoo.truth import tiny_llama

    return _make_torchscript("llama-torchscript", folder, tiny_llama(dtype), "input_ids", False, dtype, opset)


def make_llava_torchscript(folder: Path, dtype: str = "float32", opset: int = 17) -> ZooModel:
    """LLaVA's text decoder with the inputs and outputs of an onnx-community decoder."""
    from zoo.truth import tiny_llava

    return _make_torchscript("llava-torchscript", folder, tiny_llava(dtype), "inputs_embeds", True, dtype, opset)


def _make_torchscript(
    family: str, folder: Path, model: PreTrainedModel, text_name: str, cache: bool, dtype: str, opset: int
) -> ZooModel:
    import torch
    from zoo.truth import FlatDecoder

    names = _flat_names(text_name, cache)
    axes = {text_name: {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "total"}}
    axes |= {"position_ids": {0: "batch", 1: "sequence"}, "logits": {0: "batch", 1: "sequence"}}
    axes |= {name: {0: "batch", 2: "past"} for name in names.past}
    axes |= {name: {0: "batch", 2: "total"} for name in names.outputs[1:]}

    def export(target: Path) -> None:
        torch.onnx.export(
            FlatDecoder(model, text_name),
            _flat_trace_inputs(text_name, cache, dtype),
            target / "model.onnx",
            dynamo=False,
            opset_version=opset,
            input_names=names.inputs,
            output_names=names.outputs,
            dynamic_axes=axes,
        )

    export_once(folder, export)
    name = _name(family, dtype, opset, usual_opset=17)
    patterns = ("A''",) if dtype == "float32" else ("A''", "A4")
    return _zoo_model(name, folder, model, dtype, "torch", patterns, stream_dtype="float32")


# Case 5: onnxruntime-genai's builder


def make_llama_genai(
    folder: Path, precision: Literal["fp32", "fp16", "int4"] = "fp32", embeds: bool = False
) -> ZooModel:
    """A tiny Llama through the builder's command line; fp16 is the graph it writes for CUDA, which a CPU runs too.

    The builder chooses the opset itself. With `embeds` the graph takes `inputs_embeds`, as for a VLM's decoder. For
    int4 torch gets the rounded weights back; what is left is the int8 rounding of activations in `MatMulNBits`.
    """
    from zoo.truth import take_quantized_weights, tiny_llama

    dtype = "float16" if precision == "fp16" else "float32"

    def export(target: Path) -> None:
        provider = "cuda" if precision == "fp16" else "cpu"
        build(tiny_llama("float32"), target, precision, provider, exclude_embeds=embeds)

    export_once(folder, export)
    name = f"llama-genai-embeds-{precision}" if embeds else f"llama-genai-{precision}"
    model = tiny_llama(dtype)
    if precision == "int4":
        take_quantized_weights(model, folder / "model.onnx")
    tolerance = TOLERANCES[precision]
    return _zoo_model(name, folder, model, dtype, "onnxruntime-genai", ("B",), padding="right", tolerance=tolerance)


MAKERS: dict[str, Callable[[Path], ZooModel]] = {
    "llava-transformers-fp32": make_llava_transformers,  # A: plain Add, RMSNorm spelled out
    "llava-transformers-fp16": partial(make_llava_transformers, dtype="float16"),  # A3: the norm path cast to fp32
    "llava-transformers-fp32-opset23": partial(make_llava_transformers, opset=23),  # RMSNormalization, Attention
    "llava-transformers-ort-fp32": make_llava_transformers_ort,  # B': Skip nodes with inputs swapped, one Add left
    "llava-transformers-ort-fp16": partial(make_llava_transformers_ort, dtype="float16"),
    "llama-dynamo-fp32": make_llama_dynamo,
    "llama-dynamo-cache-fp32-opset20": partial(make_llama_dynamo, opset=20, cache=True),
    "llama-dynamo-fp32-opset23": partial(make_llama_dynamo, opset=23),
    "llama-torchscript-fp32": make_llama_torchscript,  # A'': Add -> Cast, no value types
    # A4: fp16 weights, fp32 sums
    "llama-torchscript-fp16": partial(make_llama_torchscript, dtype="float16"),
    "llava-torchscript-fp32": make_llava_torchscript,  # the inputs and outputs of an onnx-community decoder
    "llava-torchscript-fp16": partial(make_llava_torchscript, dtype="float16"),
    "llama-genai-fp32": make_llama_genai,  # B: Skip nodes, the last layer's sum not a value in the file
    "llama-genai-fp16": partial(make_llama_genai, precision="fp16"),
    "llama-genai-int4": partial(make_llama_genai, precision="int4"),
    "llama-genai-embeds-fp32": partial(make_llama_genai, embeds=True),
}


def _zoo_model(
    name: str,
    folder: Path,
    model: PreTrainedModel,
    dtype: str,
    exporter: str,
    patterns: tuple[str, ...],
    padding: Padding = "left",
    tolerance: float | None = None,
    stream_dtype: str | None = None,
) -> ZooModel:
    from zoo.truth import HEAD_WIDTH, KV_HEADS, LAYERS, VOCABULARY, WIDTH, decoder_of

    return zoo_model(
        name,
        folder / "model.onnx",
        dtype=dtype,
        layers=LAYERS,
        width=WIDTH,
        kv_heads=KV_HEADS,
        head_width=HEAD_WIDTH,
        vocabulary=VOCABULARY,
        patterns=patterns,
        exporter=release(exporter),
        family=model.config.model_type,
        torch_model=model,
        torch_decoder=decoder_of(model),
        stream_dtype=stream_dtype,
        padding=padding,
        tolerance=tolerance,
    )


def _name(family: str, dtype: str, opset: int, usual_opset: int) -> str:
    name = f"{family}-{SHORT_DTYPES[dtype]}"
    return name if opset == usual_opset else f"{name}-opset{opset}"


@dataclass(frozen=True)
class _FlatNames:
    inputs: list[str]
    outputs: list[str]
    past: list[str]


def _flat_names(text_name: str, cache: bool) -> _FlatNames:
    from zoo.truth import LAYERS

    past = [f"past_key_values.{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")] if cache else []
    inputs = [text_name, "attention_mask", "position_ids", *past]
    return _FlatNames(inputs, ["logits", *map(present_name, past)], past)


def _flat_trace_inputs(text_name: str, cache: bool, dtype: str) -> tuple[Tensor, ...]:
    from zoo.truth import empty_past

    past = [tensor for pair in empty_past(TRACE_BATCH, TRACE_PAST, dtype) for tensor in pair] if cache else []
    return (*_trace_inputs(text_name, TRACE_PAST if cache else 0, dtype), *past)


def _trace_inputs(text_name: str, past: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Text, mask and positions of a step after `past` tokens, its first row padded on the left."""
    import torch
    from zoo.truth import BOS_ID, TORCH_DTYPES, WIDTH, positions_of

    mask = torch.ones(TRACE_BATCH, past + TRACE_SEQUENCE, dtype=torch.int64)
    mask[0, :TRACE_PAD] = 0
    if text_name == "input_ids":
        text = torch.full((TRACE_BATCH, TRACE_SEQUENCE), BOS_ID, dtype=torch.int64)
    else:
        text = torch.ones(TRACE_BATCH, TRACE_SEQUENCE, WIDTH, dtype=TORCH_DTYPES[dtype])
    return text, mask, positions_of(mask)[:, past:]
