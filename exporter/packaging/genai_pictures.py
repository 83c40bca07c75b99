"""onnxruntime-genai's picture pipelines: `vision` and `embedding` of `genai_config.json`, and the graphs that they name.

    vision.onnx      the vision encoder, unchanged but for DeepStack (`genai_deepstack`)
    embedding.onnx   the embedding graph, with image features at the image tokens (`genai_embedding`)
    model.onnx       the guarded decoder, unchanged but for token types (`genai_token_types`) and DeepStack

What each type of model needs is in `genai_pipelines`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...graphs.errors import GuardError
from ...graphs.genai_deepstack import join_features, split_embeds, take_apart_features
from ...graphs.genai_embedding import FEATURES, insert_image_features
from ...graphs.genai_token_types import insert_token_types
from ...graphs.graph_io import graph_bytes, load_graph
from ...graphs.package import ModelPackage
from ...graphs.roles import EMBEDS, MASK, POSITIONS, TOKEN_TYPES, TOKENS
from ...runtime.chat.chat import ChatTokenizer
from ...runtime.images.deepstack import embeds_name, is_embeds, is_features, layer_number
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


def fitted_vision(package: ModelPackage) -> tuple[ir.Model, int]:
    """The vision encoder as genai runs it, and the number of layers whose features its rows have.

    Raises:
        GuardError: as for `pipeline_of` and `join_features`.
    """
    vision, layers = _vision_apart(package), 1
    if pipeline_of(package.config, package.root).deep and any(is_features(name) for name in _outputs(vision)):
        layers = len(vision.graph.outputs)
        try:
            join_features(vision)
        except GuardError as error:
            raise GuardError(f"{package.vision_encoder}: {error}") from None
    return vision, layers


def _vision_apart(package: ModelPackage) -> ir.Model:
    """The vision encoder as it was before this layout."""
    assert package.vision_encoder is not None
    vision = load_graph(package.vision_encoder, trust_links=True)
    take_apart_features(vision)
    return vision


def _outputs(vision: ir.Model) -> list[str]:
    return [str(value.name) for value in vision.graph.outputs]


def embedding_bytes(package: ModelPackage, embed_tokens: ir.Model, vision: ir.Graph, layers: int) -> bytes:
    """`embedding.onnx` of a folder.

    Args:
        package: the model.
        embed_tokens: its graph that embeds tokens, changed in place.
        vision, layers: of `fitted_vision`.

    Raises:
        GuardError: image features cannot be inserted into that graph.
    """
    token = image_token(package.config, package.root)
    try:
        insert_image_features(embed_tokens, token, features_of(vision), layers)
    except GuardError as error:
        raise GuardError(f"{package.embed_tokens}: {error}") from None
    return graph_bytes(embed_tokens)


def fit_decoder(package: ModelPackage, decoder: ir.Model) -> bool:
    """Let a decoder take what genai feeds, in place: token ids for token types, one wide tensor for DeepStack.

    Args:
        package: the model.
        decoder: its guarded decoder.

    Returns:
        Whether anything had to change.

    Raises:
        GuardError: as for `pipeline_of`, `insert_token_types` and `split_embeds`.
    """
    pipeline = pipeline_of(package.config, package.root)
    names = [str(value.name) for value in decoder.graph.inputs]
    try:
        if pipeline.marks and TOKEN_TYPES in names:
            insert_token_types(decoder, image_token(package.config, package.root))
        elif pipeline.deep and (rows := _rows_in_order(package, names)):
            split_embeds(decoder, rows)
        else:
            return False
    except GuardError as error:
        raise GuardError(f"{package.decoder}: {error}") from None
    return True


def _rows_in_order(package: ModelPackage, names: Sequence[str]) -> list[str]:
    """The decoder's inputs for DeepStack, in the order of the vision encoder's outputs.

    Raises:
        GuardError: the two are not for the same layers.
    """
    first, *others = _outputs(_vision_apart(package))
    rows = [embeds_name(layer_number(name)) for name in others if is_features(name)]
    taken = [name for name in names if is_embeds(name)]
    if first != FEATURES or len(rows) < len(others) or set(rows) != set(taken):
        raise GuardError(
            f"takes {', '.join(taken) or 'no features'} between its layers, and the vision encoder gives "
            f"{', '.join([first, *others])}; convert the checkpoint with `vlmguard convert` and guard that"
        )
    return rows
