"""Graphs that optimum-onnx wrote, from the folder in which `make_optimum.py` keeps them.

optimum needs an older transformers than the zoo, so these graphs cannot be made here: a maker takes them from
`VLMGUARD_OPTIMUM`, and skips its test where that is not set. A merged decoder is one `If` on `use_cache_branch` with the
whole decoder in either branch, once without and once with a past (pattern J).

`llava-merged-fp32` needs no optimum. It is NOT optimum's: one TorchScript graph, which takes an empty past too, is put into
both branches of an `If` in the shape that `optimum.onnx.merge_decoders` gives its graphs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from zoo.exporting import export_once, release
from zoo.families import FAMILIES, TEXT, Family, tiny
from zoo.model import Feeds, ZooModel, zoo_model
from zoo.quantized import LLAVA_TORCHSCRIPT
from zoo.quantized import make as make_with

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

FOLDER_VARIABLE = "VLMGUARD_OPTIMUM"
BRANCH = "use_cache_branch"


@dataclass(frozen=True)
class Graph:
    """One export: of which checkpoint, and what `optimum_export.py` is told."""

    family: str
    patterns: tuple[str, ...]
    dtype: str = "float32"
    merged: bool = False
    stream_dtype: str | None = None

    @property
    def arguments(self) -> tuple[str, ...]:
        dtype = ("--dtype", "fp16" if self.dtype == "float16" else "fp32")
        return (*dtype, "--merged") if self.merged else dtype


GRAPHS: Mapping[str, Graph] = {
    "llama-optimum-fp32": Graph("llama", ("A''",)),
    "llama-optimum-fp16": Graph("llama", ("A4",), "float16", stream_dtype="float32"),
    "llama-optimum-merged-fp32": Graph("llama", ("J",), merged=True),
    "llama-optimum-merged-fp16": Graph("llama", ("J",), "float16", merged=True, stream_dtype="float32"),
    "gpt2-optimum-merged-fp32": Graph("gpt2", ("J",), merged=True),
    "granite-optimum-fp32": Graph("granite", ("E",)),
}
_ROWS = {**FAMILIES, "llama": Family("llama", "LlamaForCausalLM", ("A",), lambda: TEXT, "input_ids")}


def checkpoint_model(family: str) -> PreTrainedModel:
    """What the checkpoint of a family holds, float32."""
    return tiny(_ROWS[family])


def cache_branch(random: np.random.Generator, mask: np.ndarray, fresh: np.ndarray, feeds: Feeds) -> Feeds:
    """The branch without a past for a prompt, the one with a past for what follows."""
    return {BRANCH: np.array([mask.shape[1] > fresh.shape[1]])}


def run_without_branch(model: PreTrainedModel, feeds: Mapping[str, np.ndarray]) -> Tensor:
    from zoo.truth import run_torch

    return run_torch(model, {name: array for name, array in feeds.items() if name != BRANCH})


def make(name: str, folder: Path) -> ZooModel:
    """A kept graph, with torch's side loaded from the checkpoint that optimum exported."""
    from transformers import AutoModelForCausalLM
    from zoo.truth import TORCH_DTYPES

    kept = os.environ.get(FOLDER_VARIABLE)
    if not kept:
        pytest.skip(
            f"{name} is made in optimum's own environment: run `python tests/zoo/make_optimum.py FOLDER`, then set "
            f"{FOLDER_VARIABLE}=FOLDER"
        )
    graph, made = GRAPHS[name], Path(kept, "graphs", name)
    if not made.is_dir():
        pytest.skip(f"{made} is not there: run `python tests/zoo/make_optimum.py {kept}` again")
    export_once(folder, lambda target: shutil.copytree(made, target, dirs_exist_ok=True) and None)
    row, dtype = _ROWS[graph.family], TORCH_DTYPES[graph.dtype]
    model = AutoModelForCausalLM.from_pretrained(Path(kept, "checkpoints", graph.family), dtype=dtype).eval()
    versions = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
    return zoo_model(
        name,
        folder / ("decoder_model_merged.onnx" if graph.merged else "model.onnx"),
        dtype=graph.dtype,
        stream_dtype=graph.stream_dtype,
        layers=row.layers,
        width=64,
        kv_heads=row.kv_heads,
        head_width=row.head_width,
        vocabulary=300,
        patterns=graph.patterns,
        exporter=f"optimum-onnx {versions['optimum-onnx']} (transformers {versions['transformers']})",
        family=row.model_type,
        torch_model=model,
        torch_decoder=row.decoder(model),
        special_feeds=cache_branch if graph.merged else None,
        torch_runner=run_without_branch if graph.merged else None,
    )


def merge(source: ZooModel, target: Path) -> None:
    """The source's graph in both branches; weights stay outside and are shared, the branches' outputs are the graph's."""
    model = onnx.load(source.path)
    graph = model.graph
    branches = {
        f"{branch}_branch": onnx.helper.make_graph(graph.node, name, [], graph.output)
        for branch, name in (("then", "with_past"), ("else", "no_past"))
    }
    switch = onnx.helper.make_tensor_value_info(BRANCH, onnx.TensorProto.BOOL, [1])
    node = onnx.helper.make_node("If", [BRANCH], [output.name for output in graph.output], "optimum::if", **branches)
    merged = onnx.helper.make_graph([node], "merged", [*graph.input, switch], graph.output, graph.initializer)
    onnx.save(onnx.helper.make_model(merged, opset_imports=model.opset_import, ir_version=model.ir_version), target)


def make_merged_llava(folder: Path) -> ZooModel:
    return make_with(
        "llava-merged-fp32",
        folder,
        LLAVA_TORCHSCRIPT,
        merge,
        patterns=("J",),
        exporter=f"{release('torch')}, merged here",
        special_feeds=cache_branch,
        torch_runner=run_without_branch,
    )


MAKERS: dict[str, Callable[[Path], ZooModel]] = {
    "llava-merged-fp32": make_merged_llava,
    **{name: partial(make, name) for name in GRAPHS},
}
