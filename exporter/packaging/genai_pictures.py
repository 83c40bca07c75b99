"""onnxruntime-genai's picture pipelines: `vision` and `embedding` of `genai_config.json`, and the graphs that they name.

    vision.onnx      the vision encoder, unchanged
    embedding.onnx   the embedding graph, with image features at the image tokens (`genai_embedding`)
    model.onnx       the guarded decoder, unchanged but for token types (`genai_token_types`)

What each type of model needs is in `genai_pipelines`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...graphs.errors import GuardError
from ...graphs.genai_embedding import FEATURES, insert_image_features
from ...graphs.genai_token_types import insert_token_types
from ...graphs.graph_io import graph_bytes, load_graph
from ...graphs.package import ModelPackage
from ...graphs.proof.strip import strip_guard
from ...graphs.roles import EMBEDS, MASK, POSITIONS, TOKEN_TYPES, TOKENS
from ...graphs.runtime_controls import take_back_inputs
from ...runtime.chat.chat import ChatTokenizer
from .genai_pipelines import RUNTIME, pipeline_of
from .genai_processor import PROCESSOR

VISION, EMBEDDING = "vision.onnx", "embedding.onnx"
FED_PICTURES = (EMBEDS, TOKENS, MASK, POSITIONS)
SESSION = {"log_id": RUNTIME, "provider_options": []}


def require_graphs(package: ModelPackage) -> None:
    """The folder has the graphs that the pipeline runs before the decoder.

    Raises:
        GuardError: as for `pipeline_of`, or one is missing or takes other inputs.
    """
    pipeline = pipeline_of(package.config, package.root)
    if package.vision_encoder is None or package.embed_tokens is None:
        part = "vision encoder" if package.vision_encoder is None else "embed_tokens graph"
        raise GuardError(f"{package.root}: has no {part}, which {RUNTIME} runs; package a whole model")
    vision = load_graph(package.vision_encoder, trust_links=True).graph
    inputs, fed = [str(value.name) for value in vision.inputs], pipeline.vision_inputs.values()
    if set(inputs) - set(fed) or FEATURES not in {value.name for value in vision.outputs}:
        raise GuardError(
            f"{package.vision_encoder}: takes {', '.join(inputs)}, and {RUNTIME} feeds {', '.join(fed)} "
            f"and reads {FEATURES}; convert the checkpoint with `vlmguard convert` and guard that"
        )


def require_padding_apart(where: Path, padding: int) -> None:
    """No prompt contains the padding token.

    Args:
        where: the folder with the tokenizer.
        padding: id of the token.

    Raises:
        GuardError: genai masks it there, so the model would see another prompt.
    """
    if padding in ChatTokenizer.open(where).encode("a"):
        raise GuardError(
            f"{where}: pad_token_id {padding} is a token of every prompt, and {RUNTIME} takes it for padding there; "
            "set the model's own pad_token_id in generation_config.json"
        )


def picture_sections(config: Mapping[str, Any], vision: ir.Graph, where: str | Path) -> dict[str, Any]:
    """The entries of `model` in `genai_config.json` that pictures need besides the decoder's.

    Args:
        config: the model's `config.json`.
        vision: the vision encoder.
        where: the folder, for errors.

    Raises:
        GuardError: as for `pipeline_of`, or `config.json` lacks a value.
    """
    pipeline = pipeline_of(config, where)
    tokens, numbers = pipeline.require(config, where)
    there = {str(value.name) for value in vision.inputs}
    return {
        **tokens,
        "embedding": {
            "session_options": SESSION,
            "filename": EMBEDDING,
            "inputs": {TOKENS: TOKENS, FEATURES: FEATURES},
            "outputs": {EMBEDS: EMBEDS},
        },
        "type": pipeline.genai_type,
        "vision": {
            "session_options": SESSION,
            "filename": VISION,
            "config_filename": PROCESSOR,
            **numbers,
            **pipeline.of_vision(vision),
            "inputs": {name: fed for name, fed in pipeline.vision_inputs.items() if fed in there},
            "outputs": {FEATURES: FEATURES},
        },
        **({"speech": {"filename": "", "config_filename": ""}} if pipeline.silent else {}),
    }


def image_token(config: Mapping[str, Any], where: str | Path) -> int:
    """Id of the token that a row of image features replaces.

    Args:
        config: the content of a model's `config.json`.
        where: the model, for errors.

    Raises:
        GuardError: as for `pipeline_of` and `PicturePipeline.require`.
    """
    ids, _ = pipeline_of(config, where).require(config, where)
    return ids["image_token_id"]


def features_of(vision: ir.Graph) -> ir.Value:
    """The output with the image features."""
    return next(value for value in vision.outputs if value.name == FEATURES)


def embedding_bytes(package: ModelPackage, embed_tokens: ir.Model) -> bytes:
    """`embedding.onnx` of a folder, from its graph that embeds tokens.

    Raises:
        GuardError: image features cannot be inserted into that graph.
    """
    assert package.vision_encoder is not None
    features = features_of(load_graph(package.vision_encoder, trust_links=True).graph)
    token = image_token(package.config, package.root)
    try:
        insert_image_features(embed_tokens, token, features)
    except GuardError as error:
        raise GuardError(f"{package.embed_tokens}: {error}") from None
    return graph_bytes(embed_tokens)


def mark_pictures(package: ModelPackage, decoder: ir.Model) -> bool:
    """Let a decoder that takes token types make them of token ids, in place; whether it is such a decoder.

    Args:
        package: the model.
        decoder: its guarded decoder.

    Raises:
        GuardError: as for `pipeline_of` and `insert_token_types`.
    """
    pipeline = pipeline_of(package.config, package.root)
    if not pipeline.marks or all(value.name != TOKEN_TYPES for value in decoder.graph.inputs):
        return False
    try:
        insert_token_types(decoder, image_token(package.config, package.root))
    except GuardError as error:
        raise GuardError(f"{package.decoder}: {error}") from None
    return True


def without_image_features(embedding: ir.Model) -> None:
    """Undo `insert_image_features` in place, to compare what is left with the source."""
    strip_guard(embedding)
    take_back_inputs(embedding.graph, {FEATURES})
