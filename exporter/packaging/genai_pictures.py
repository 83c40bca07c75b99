"""onnxruntime-genai's picture pipelines: `vision` and `embedding` of `genai_config.json`, and the graphs that they name.

    vision.onnx      the vision encoder, unchanged
    embedding.onnx   the embedding graph, with image features at the image tokens (`genai_embedding`)
    model.onnx       the guarded decoder, unchanged

genai decides by `model.type` how a picture is fed and where its tokens stand in the prompt, so only the types below can be
written. Its own builder and processors know others too; a new type is a new row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...graphs.errors import GuardError, first_line
from ...graphs.genai_embedding import FEATURES, insert_image_features
from ...graphs.graph_io import graph_bytes, load_graph
from ...graphs.package import ModelPackage
from ...graphs.proof.strip import strip_guard
from ...graphs.roles import EMBEDS, MASK, POSITIONS, TOKENS
from ...graphs.runtime_controls import take_back_inputs
from ...runtime.chat.chat import ChatTokenizer
from ...runtime.chat.folder_configs import IMAGE_TOKEN_KEYS
from .genai_processor import PROCESSOR

RUNTIME = "onnxruntime-genai"
VISION, EMBEDDING = "vision.onnx", "embedding.onnx"
FED_PICTURES = (EMBEDS, MASK, POSITIONS)
SESSION = {"log_id": RUNTIME, "provider_options": []}


@dataclass(frozen=True)
class PicturePipeline:
    """One kind of picture pipeline.

    Attributes:
        genai_type: genai's name of it, `model.type`.
        vision_inputs: inputs of the vision encoder that genai feeds.
        tokens: ids of `model`, each with the keys that it may have in `config.json`.
        numbers: numbers of `model.vision`, from `config.json`; raises GuardError for a model that genai cannot run.
    """

    genai_type: str
    vision_inputs: tuple[str, ...]
    tokens: Mapping[str, tuple[str, ...]]
    numbers: Callable[[Mapping[str, Any]], dict[str, Any]]

    def require(self, config: Mapping[str, Any], where: str | Path) -> tuple[dict[str, int], dict[str, Any]]:
        """The ids and numbers of a model, from its `config.json`.

        Args:
            config: its content.
            where: the model, for errors.

        Raises:
            GuardError: one is missing, or genai cannot run a model with this one.
        """
        try:
            ids = {new: next(config[key] for key in keys if key in config) for new, keys in self.tokens.items()}
            if wrong := [name for name, number in ids.items() if type(number) is not int]:
                raise TypeError(f"{wrong[0]} is no number")
            return ids, self.numbers(config)
        except GuardError as error:
            raise GuardError(f"{where}: {error}") from None
        except (KeyError, StopIteration, TypeError, ValueError) as error:
            raise GuardError(
                f"{where}: its config.json lacks an id or a number that {RUNTIME} needs ({first_line(error)}); copy the "
                "model's again"
            ) from None


def _qwen_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    vision = config["vision_config"]
    return {
        "patch_size": vision["patch_size"],
        "spatial_merge_size": vision["spatial_merge_size"],
        "tokens_per_second": float(vision.get("tokens_per_second", 2)),  # of videos
    }


_QWEN = PicturePipeline(
    genai_type="qwen2_5_vl",
    vision_inputs=("pixel_values", "image_grid_thw"),
    tokens={name: (name,) for name in ("image_token_id", "video_token_id", "vision_start_token_id")},
    numbers=_qwen_numbers,
)


def _gemma3_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    if config["mm_tokens_per_image"] != _GEMMA3_TOKENS:
        raise GuardError(
            f"mm_tokens_per_image is {config['mm_tokens_per_image']}, and {RUNTIME} writes {_GEMMA3_TOKENS} image tokens for "
            "every picture; keep the layout that it has"
        )
    return {}


_GEMMA3_TOKENS = 256
_GEMMA3 = PicturePipeline(
    genai_type="gemma3",
    vision_inputs=("pixel_values",),
    tokens={"image_token_id": IMAGE_TOKEN_KEYS},
    numbers=_gemma3_numbers,
)
# By `model_type` of config.json. Qwen2-VL differs from Qwen2.5-VL inside its vision encoder alone.
PIPELINES: Mapping[str, PicturePipeline] = {"gemma3": _GEMMA3, "qwen2_vl": _QWEN, "qwen2_5_vl": _QWEN}


def pipeline_of(model_type: str, where: str | Path) -> PicturePipeline:
    """The pipeline of a type of model.

    Args:
        model_type: of `config.json`.
        where: the folder, for the error.

    Raises:
        GuardError: genai has none for it, or none that can be written.
    """
    if model_type not in PIPELINES:
        raise GuardError(
            f"{where}: is of type {model_type}, with which {RUNTIME} cannot be given pictures here, only "
            f"{', '.join(sorted(PIPELINES))}; keep the layout that it has"
        )
    return PIPELINES[model_type]


def require_graphs(package: ModelPackage) -> None:
    """The folder has the graphs that the pipeline runs before the decoder.

    Raises:
        GuardError: as for `pipeline_of`, or one is missing or takes other inputs.
    """
    pipeline = pipeline_of(str(package.config.get("model_type")), package.root)
    if package.vision_encoder is None or package.embed_tokens is None:
        part = "vision encoder" if package.vision_encoder is None else "embed_tokens graph"
        raise GuardError(f"{package.root}: has no {part}, which {RUNTIME} runs; package a whole model")
    vision = load_graph(package.vision_encoder, trust_links=True).graph
    inputs = [str(value.name) for value in vision.inputs]
    if set(inputs) - set(pipeline.vision_inputs) or FEATURES not in {value.name for value in vision.outputs}:
        raise GuardError(
            f"{package.vision_encoder}: takes {', '.join(inputs)}, and {RUNTIME} feeds {', '.join(pipeline.vision_inputs)} "
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
    pipeline = pipeline_of(str(config.get("model_type")), where)
    tokens, numbers = pipeline.require(config, where)
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
            "inputs": {str(value.name): str(value.name) for value in vision.inputs},
            "outputs": {FEATURES: FEATURES},
        },
    }


def image_token(config: Mapping[str, Any], where: str | Path) -> int:
    """Id of the token that a row of image features replaces.

    Args:
        config: the content of a model's `config.json`.
        where: the model, for errors.

    Raises:
        GuardError: as for `pipeline_of` and `PicturePipeline.require`.
    """
    ids, _ = pipeline_of(str(config.get("model_type")), where).require(config, where)
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


def without_image_features(embedding: ir.Model) -> None:
    """Undo `insert_image_features` in place, to compare what is left with the source."""
    strip_guard(embedding)
    take_back_inputs(embedding.graph, {FEATURES})
