"""Graphs of the zoo after onnxruntime's own tools: its transformer optimizer, its float16 converter, its quantizers.

A maker takes a graph of another module, which is exported into `sources/` for all of them, and runs one tool on it.
Optimized and converted graphs still are what torch computes; of quantized ones torch has no truth, so `torch_model` is None.

    optimize     SkipLayerNormalization, with a bias of its own (B'')
    convert      float16, written unsorted where inputs stay float32
    dynamic      MatMulInteger over DynamicQuantizeLinear
    nbits        MatMulNBits, or MatMul over DequantizeLinear
    static       QuantizeLinear and DequantizeLinear (K); with Add among the operators the stream itself is rounded
    qlinear      QLinearAdd: the stream is int8 and no float sum is left, so the graph must be refused
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnx
from zoo import families, makers
from zoo.exporting import export_once, release
from zoo.model import ZooModel

Tool = Callable[[ZooModel, Path], None]


def make(name: str, folder: Path, source: str, tool: Tool, **changed: Any) -> ZooModel:
    """`source`'s graph after `tool`; `changed` are the fields of the source's `ZooModel` that this changes."""
    from filelock import FileLock  # torch depends on it

    sources, path = folder.parent / "sources", folder / "model.onnx"
    sources.mkdir(parents=True, exist_ok=True)
    with FileLock(sources / f"{source}.lock"):  # meanwhile nobody else's: the quantizers write beside what they read
        original = {**makers.MAKERS, **families.MAKERS}[source](sources / source)
        export_once(folder, lambda target: tool(original, target / "model.onnx"))
    graph = onnx.load(path, load_external_data=False).graph
    dtypes = {v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in graph.input}
    # GroupQueryAttention or not, the optimizer keeps what a graph says of padding.
    exporter = f"{release('onnxruntime')} on {original.exporter}"
    return replace(
        original, **{"name": name, "folder": folder, "path": path, "inputs": dtypes, "exporter": exporter, **changed}
    )


# The tools


def optimize(source: ZooModel, target: Path, model_type: str) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    heads = source.width // source.head_width
    made = optimize_model(str(source.path), model_type, num_heads=heads, hidden_size=source.width, opt_level=0)
    if not any(node.op_type.startswith("Skip") for node in made.model.graph.node):
        raise AssertionError(f"the optimizer fused nothing in {source.name}")
    made.save_model_to_file(str(target))


def convert(source: ZooModel, target: Path, keep_io_types: bool) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source.path), keep_io_types=keep_io_types), target)


def dynamic(source: ZooModel, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source.path, target, weight_type=QuantType.QInt8)


def nbits(source: ZooModel, target: Path, style: Literal["QOperator", "QDQ"]) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.quant_utils import QuantFormat

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    quantizer = MatMulNBitsQuantizer(
        onnx.load(source.path), bits=4, block_size=32, is_symmetric=True, quant_format=QuantFormat[style]
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=True)


def static(
    source: ZooModel,
    target: Path,
    style: Literal["QOperator", "QDQ"],
    only: list[str] | None = None,
    symmetric: bool = False,
) -> None:
    """Activations as uint8 with zero points, or `symmetric`: as int8 without, which is what TensorRT reads."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Prompts(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([source.make_feeds(2, sequence) for sequence in (5, 6, 7, 8)])

        def get_next(self) -> dict | None:  # type: ignore[override]
            return next(self.left, None)

    quantize_static(
        source.path,
        target,
        Prompts(),
        quant_format=QuantFormat[style],
        op_types_to_quantize=only,
        activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": True},
    )


# The table

NO_TORCH: dict[str, Any] = {"torch_model": None, "torch_decoder": None}

LLAVA_TRANSFORMERS = "llava-transformers-fp32"
LLAVA_TORCHSCRIPT = "llava-torchscript-fp32"
LLAMA_DYNAMO = "llama-dynamo-cache-fp32-opset20"


def make_optimized(name: str, folder: Path, source: str, model_type: str, pattern: str) -> ZooModel:
    return make(name, folder, source, partial(optimize, model_type=model_type), patterns=(pattern,))


def make_converted(name: str, folder: Path, source: str, keep_io_types: bool) -> ZooModel:
    """Torch's side with the same half-rounded weights."""
    made = make(
        name,
        folder,
        source,
        partial(convert, keep_io_types=keep_io_types),
        dtype="float16",
        stream_dtype="float16",
        patterns=("A3",),
        tolerance=makers.TOLERANCES["fp16"],
    )
    assert made.torch_model is not None
    made.torch_model.half()  # in place: the decoder is a part of it
    return made


QLINEAR_REFUSAL = (
    "layer 0: the residual sum 'add_407_quantized' is computed and kept in int8 (QLinearAdd), so there is no float sum to "
    "guard; quantize with QuantFormat.QDQ, or leave Add out of the operators to quantize"
)

_SOURCES = {
    "llava-transformers": LLAVA_TRANSFORMERS,
    "llava-torchscript": LLAVA_TORCHSCRIPT,
    "llama-dynamo": LLAMA_DYNAMO,
}
_TABLE: dict[str, Callable[[str, Path], ZooModel]] = {
    "gpt2-optimized-fp32": partial(make_optimized, source="gpt2-fp32", model_type="gpt2", pattern="B''"),
    "phi-optimized-fp32": partial(make_optimized, source="phi-fp32", model_type="bert", pattern="B''"),
    "llama-dynamo-optimized-fp32": partial(make_optimized, source=LLAMA_DYNAMO, model_type="bert", pattern="B"),
    "llava-torchscript-optimized-fp32": partial(
        make_optimized, source=LLAVA_TORCHSCRIPT, model_type="bert", pattern="B"
    ),
    "llava-transformers-converted-fp16": partial(make_converted, source=LLAVA_TRANSFORMERS, keep_io_types=False),
    "llava-transformers-converted-io-fp16": partial(make_converted, source=LLAVA_TRANSFORMERS, keep_io_types=True),
    **{
        f"{name}-dynamic-int8": partial(make, source=source, tool=dynamic, **NO_TORCH)
        for name, source in _SOURCES.items()
    },
    **{
        f"{name}-nbits-int4": partial(make, source=source, tool=partial(nbits, style="QOperator"), **NO_TORCH)
        for name, source in _SOURCES.items()
    },
    # int4 DequantizeLinear is of opset 21: on the opset 17 of TorchScript the tool writes a file that cannot be opened.
    "llava-transformers-nbits-qdq-int4": partial(
        make, source=LLAVA_TRANSFORMERS, tool=partial(nbits, style="QDQ"), **NO_TORCH
    ),
    "llama-dynamo-static-matmul-int8": partial(
        make, source=LLAMA_DYNAMO, tool=partial(static, style="QDQ", only=["MatMul"]), patterns=("K",), **NO_TORCH
    ),
    "llama-dynamo-static-int8": partial(
        make, source=LLAMA_DYNAMO, tool=partial(static, style="QDQ"), patterns=("K",), **NO_TORCH
    ),
    "llava-transformers-static-int8": partial(
        make, source=LLAVA_TRANSFORMERS, tool=partial(static, style="QDQ"), patterns=("K",), **NO_TORCH
    ),
    "llama-dynamo-qlinear-int8": partial(
        make,
        source=LLAMA_DYNAMO,
        tool=partial(static, style="QOperator"),
        patterns=("K",),
        refusal=QLINEAR_REFUSAL,
        **NO_TORCH,
    ),
}
MAKERS: dict[str, Callable[[Path], ZooModel]] = {name: partial(maker, name) for name, maker in _TABLE.items()}
