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

import contextlib
import io
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Feeds = dict[str, np.ndarray]
Padding = Literal["left", "right"]

SHORT_DTYPES = {"float32": "fp32", "float16": "fp16"}
# Seen at most, on logits of size 4: 3e-6, 7e-3, 8e-2.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int4": 0.2}
# Batch 2, one padded row and a filled past: a batch of one, or an unpadded one, is baked into the graph as a constant.
TRACE_BATCH, TRACE_SEQUENCE, TRACE_PAST, TRACE_PAD = 2, 5, 3, 2


@dataclass(frozen=True, eq=False)
class ZooModel:
    """One exported decoder, and the torch model it was exported from."""

    name: str
    folder: Path
    path: Path
    layers: int
    width: int
    dtype: str
    """Of the weights and of the graph's inputs and outputs: "float32" or "float16"."""
    stream_dtype: str
    """What the graph keeps the residual stream in. TorchScript's float16 graphs keep it in float32."""
    padding: Padding
    """Where `make_feeds` puts the padding. "right" for GroupQueryAttention, which is given only each row's LENGTH (the
    sum of its attention mask) and reads the first that many tokens: left padding would be read as text."""
    tolerance: float
    """How far the graph's logits may be from torch's."""
    inputs: Mapping[str, np.dtype]
    torch_model: PreTrainedModel
    torch_decoder: nn.Module
    """The module whose `.layers` can be hooked; `run_torch` runs it."""

    def make_feeds(self, batch: int, sequence: int, pad: int = 0) -> Feeds:
        """Feeds for a prefill on an empty cache, exactly the graph's inputs.

        Row `i` has `pad - i` padding tokens (never fewer than none), so that rows differ.
        """
        if not 0 <= pad < sequence:
            raise ValueError(f"{pad} padding tokens in a sequence of {sequence}: a row needs a token of its own")
        rows = np.maximum(pad - np.arange(batch), 0)[:, None]
        places = np.arange(sequence)[None, :]
        mask = (places >= rows if self.padding == "left" else places < sequence - rows).astype(np.int64)
        return self._feeds(mask, mask, past=None, seed=batch * 10_000 + sequence * 100 + pad)

    def next_feeds(self, feeds: Feeds, outputs: Mapping[str, np.ndarray], sequence: int = 1) -> Feeds:
        """Feeds for `sequence` more tokens after a run that had `feeds` and gave `outputs` (with its cache).

        GroupQueryAttention takes several tokens on a filled cache only for a batch of one.
        """
        if not self.cache:
            raise ValueError(f"{self.name} was exported without a cache")
        if self.padding == "right" and not feeds["attention_mask"].all():
            # The new token would sit behind the padding in torch's cache, and before it in GroupQueryAttention's.
            raise ValueError(f"{self.name} pads on the right: torch has no truth for a step after a padded prefill")
        batch = len(feeds["attention_mask"])
        fresh = np.ones((batch, sequence), dtype=np.int64)
        mask = np.concatenate([feeds["attention_mask"], fresh], axis=1)
        past = {before: outputs[after] for before, after in self.cache.items()}
        return self._feeds(mask, fresh, past, seed=mask.shape[1])

    def counted(self, feeds: Feeds) -> np.ndarray:
        """[batch, sequence] bool: the positions that hold a token. What a model says of padding means nothing."""
        sequence = feeds[self._text_name].shape[1]
        return feeds["attention_mask"][:, -sequence:].astype(bool)

    def hidden_states(self, feeds: Feeds) -> list[np.ndarray]:
        """Torch's output of every decoder layer, before the final norm: `layers` arrays [batch, sequence, width]."""
        from zoo.truth import recorded_layers

        with recorded_layers(self.torch_decoder) as states:
            self.run_torch(feeds)
        if len(states) != self.layers:
            raise AssertionError(f"{len(states)} layers ran, {self.layers} expected")
        return states

    def logits(self, feeds: Feeds) -> np.ndarray:
        """Torch's logits, float32: [batch, sequence, vocabulary]."""
        return self.run_torch(feeds).float().numpy()

    def run_torch(self, feeds: Feeds) -> Tensor:
        """Run torch's model on the graph's feeds; its logits."""
        from zoo.truth import run_torch

        return run_torch(self.torch_model, feeds)

    @property
    def cache(self) -> dict[str, str]:
        """The graph's cache: name of the past input -> name of the present output."""
        pasts = [name for name in self.inputs if "past_key_values" in name]
        return {name: _present_name(name) for name in pasts}

    @property
    def _text_name(self) -> str:
        return "inputs_embeds" if "inputs_embeds" in self.inputs else "input_ids"

    def _feeds(self, mask: np.ndarray, fresh: np.ndarray, past: Feeds | None, seed: int) -> Feeds:
        """`mask` covers past and new tokens, `fresh` the new ones alone."""
        from zoo.truth import EOS_ID, HEAD_WIDTH, IMAGE_ID, KV_HEADS, PAD_ID

        random = np.random.default_rng(seed)
        batch, sequence = fresh.shape
        ids = np.where(fresh == 1, random.integers(EOS_ID + 1, IMAGE_ID, fresh.shape), PAD_ID)
        feeds = {
            "input_ids": ids,
            "inputs_embeds": random.standard_normal((batch, sequence, self.width)),
            "attention_mask": mask,
            "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -sequence:],
            **(past or {name: np.zeros((batch, KV_HEADS, 0, HEAD_WIDTH)) for name in self.cache}),
        }
        return {name: np.ascontiguousarray(feeds[name], dtype=dtype) for name, dtype in self.inputs.items()}


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
    _export_once(folder, export)
    return _zoo_model(_name(family, dtype, opset, usual_opset=18), folder, model, dtype)


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

    _export_once(folder, export)
    return _zoo_model(_name("llama-dynamo-cache" if cache else "llama-dynamo", dtype, opset, 18), folder, model, dtype)


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

    _export_once(folder, export)
    return _zoo_model(_name(family, dtype, opset, usual_opset=17), folder, model, dtype, stream_dtype="float32")


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
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = Path(scratch, "checkpoint")
            tiny_llama("float32").save_pretrained(checkpoint)
            _write_tokenizer(checkpoint)
            # A process of its own: the builder puts modules named `builders` and `quantization` on sys.path.
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
            command += ["-i", str(checkpoint), "-o", str(target), "-c", str(Path(scratch, "cache"))]
            command += ["-p", precision, "-e", "cuda" if precision == "fp16" else "cpu"]
            command += ["--extra_options", f"exclude_embeds={str(embeds).lower()}"]
            offline = os.environ | {"HF_HUB_OFFLINE": "1"}
            built = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
        if built.returncode:
            raise RuntimeError(f"the genai builder failed for {precision}:\n{built.stderr[-4000:]}")

    _export_once(folder, export)
    name = f"llama-genai-embeds-{precision}" if embeds else f"llama-genai-{precision}"
    model = tiny_llama(dtype)
    if precision == "int4":
        take_quantized_weights(model, folder / "model.onnx")
    return _zoo_model(name, folder, model, dtype, padding="right", tolerance=TOLERANCES[precision])


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
    padding: Padding = "left",
    tolerance: float | None = None,
    stream_dtype: str | None = None,
) -> ZooModel:
    from zoo.truth import LAYERS, WIDTH, decoder_of

    path = folder / "model.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    dtypes = {v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in graph.input}
    return ZooModel(
        name=name,
        folder=folder,
        path=path,
        layers=LAYERS,
        width=WIDTH,
        dtype=dtype,
        stream_dtype=stream_dtype or dtype,
        padding=padding,
        tolerance=tolerance or TOLERANCES[SHORT_DTYPES[dtype]],
        inputs=dtypes,
        torch_model=model,
        torch_decoder=decoder_of(model),
    )


def _name(family: str, dtype: str, opset: int, usual_opset: int) -> str:
    name = f"{family}-{SHORT_DTYPES[dtype]}"
    return name if opset == usual_opset else f"{name}-opset{opset}"


def _present_name(past_name: str) -> str:
    if past_name.startswith("input."):
        return past_name.replace("input.", "output.", 1)
    return past_name.replace("past_key_values", "present", 1)


@dataclass(frozen=True)
class _FlatNames:
    inputs: list[str]
    outputs: list[str]
    past: list[str]


def _flat_names(text_name: str, cache: bool) -> _FlatNames:
    from zoo.truth import LAYERS

    past = [f"past_key_values.{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")] if cache else []
    inputs = [text_name, "attention_mask", "position_ids", *past]
    return _FlatNames(inputs, ["logits", *map(_present_name, past)], past)


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


def _export_once(folder: Path, export: Callable[[Path], None]) -> None:
    """Fill `folder` with `export`, unless it is there: whole or not at all, so a failed export is not found later."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="exporting-") as staging:
        target = Path(staging, "whole")
        target.mkdir()
        with _quiet():
            export(target)
        target.rename(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters talk on stdout, stderr, in logs and warnings. What they said is told only when they fail."""
    said = io.StringIO()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    except Exception as failure:
        failure.add_note(said.getvalue()[-4000:])
        raise
    finally:
        logging.disable(disabled)


def _write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: 256 bytes and the special tokens, each where the config says."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from zoo.truth import BOS_ID, EOS_ID, IMAGE_ID, PAD_ID

    vocabulary = {"<pad>": PAD_ID, "<s>": BOS_ID, "</s>": EOS_ID, "<image>": IMAGE_ID}
    for place, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())):
        vocabulary[symbol] = EOS_ID + 1 + place
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<image>"],
    ).save_pretrained(folder)
