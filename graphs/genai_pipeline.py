"""onnxruntime-genai's `decoder.pipeline`: a decoder in several graphs, each fed by the one before.

A guard goes into a stage that holds the whole residual stream. Such folders come from Olive's SplitModel and from recipes for
NPUs: embeddings, transformer and head as three graphs; some hold the transformer twice, for prompts and for single tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from .anatomy import dissect
from .errors import AnatomyNotFound, ModelUnreadable
from .roles import input_roles


@dataclass(frozen=True)
class Pipeline:
    """The stages of one decoder.

    Attributes:
        decoders: the graphs that hold the decoder's layers, each all of them.
        embed_tokens: the graph that makes embeddings of tokens, if it is one of its own.
        head: the graph that makes logits of the last states, if it is one of its own.
    """

    decoders: tuple[Path, ...]
    embed_tokens: Path | None
    head: Path | None


def stage_files(config: Mapping[str, Any]) -> list[str]:
    """The graph files of `model.decoder.pipeline`, in order, each once; empty where there is no pipeline."""
    model = config.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    stages = decoder.get("pipeline") if isinstance(decoder, dict) else None
    entries = stages if isinstance(stages, list) else [stages] if isinstance(stages, dict) else []
    parts = [part for entry in entries if isinstance(entry, dict) for part in entry.values() if isinstance(part, dict)]
    return list(dict.fromkeys(part["filename"] for part in parts if isinstance(part.get("filename"), str)))


def read_pipeline(config: Path, graphs: Mapping[Path, ir.Model], layers: int | None) -> Pipeline:
    """Find the stages' parts.

    Args:
        config: the `genai_config.json`, for errors.
        graphs: path and graph of each stage, in order; they are dissected.
        layers: number of layers in the config.

    Raises:
        ModelUnreadable: no stage holds layers, or none holds all of them.
    """
    layers_of: dict[Path, int] = {}
    for path, model in graphs.items():
        try:
            layers_of[path] = dissect(model).layer_count
        except AnatomyNotFound:
            continue  # embeddings, head, rotary tables
    if not layers_of:
        raise ModelUnreadable(
            f"{config}: no stage of decoder.pipeline ({_names(graphs)}) holds decoder layers; is it a decoder?"
        )
    whole = layers if layers is not None else max(layers_of.values())
    if any(count != whole for count in layers_of.values()) or (layers is None and len(layers_of) > 1):
        shares = ", ".join(f"{path.name} {count}" for path, count in layers_of.items())
        raise ModelUnreadable(
            f"{config}: decoder.pipeline spreads the layers over several graphs ({shares}), and a guard needs the whole "
            "residual stream in one; export the model without splitting its layers"
        )
    decoders = tuple(layers_of)
    entering = input_roles(graphs[decoders[0]].graph).embeds
    leaving = input_roles(graphs[decoders[0]].graph).logits
    others = {path: model.graph for path, model in graphs.items() if path not in layers_of}
    makes = (path for path, graph in others.items() if entering in _only(graph.inputs, graph.outputs))
    takes = (path for path, graph in others.items() if leaving in _only(graph.outputs, graph.inputs))
    return Pipeline(decoders, next(makes, None) if entering else None, next(takes, None))


def _only(one: Sequence[ir.Value], others: Sequence[ir.Value]) -> set[str | None]:
    """Names of `others` in a graph that has one value on the other side; else nothing."""
    return {value.name for value in others} if len(one) == 1 else set()


def _names(paths: Mapping[Path, object]) -> str:
    return ", ".join(path.name for path in paths)
