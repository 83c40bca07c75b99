"""The graphs around a decoder of onnxruntime-genai's builder: with them its folder is a picture pipeline.

    model.onnx       the decoder, from embeddings: genai's builder with `exclude_embeds`
    vision.onnx      pictures -> image features
    embedding.onnx   token ids and image features -> embeddings
    genai_config.json with `vision` and `embedding`, genai_processor.json, the model's configs

The two graphs are those of the default exporter. The decoder is genai's: its attention is causal, between the tokens of a
picture too, where Gemma 3 in transformers lets these see one another in both directions.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...graphs.errors import ModelUnreadable
from ...graphs.genai_embedding import insert_image_features
from ...graphs.json_files import read_json
from ...graphs.package import COMPANIONS
from ...graphs.progress import ProgressCallback
from ...graphs.strict_json import to_strict_json
from ..choices import Precision
from ..families import find_family
from ..packaging.genai_pictures import (
    EMBEDDING,
    VISION,
    features_of,
    image_token,
    picture_sections,
    require_padding_apart,
)
from ..packaging.genai_pipelines import PIPELINES
from ..packaging.genai_processor import PROCESSOR, processor_bytes
from .convert import DEFAULT_OPSET, export_part, fitted, load_model, save_part
from .foreign_failures import in_one_line
from .parts import around_decoder
from .trace import quiet

CONFIG = "genai_config.json"


def has_pipeline(config: Mapping[str, Any], checkpoint: str | Path) -> bool:
    """Whether a checkpoint becomes a picture pipeline; else genai gets its text decoder alone.

    Args:
        config: its config.json.
        checkpoint: its name, for errors.

    Raises:
        GuardError: genai runs its type with pictures, but not this model.
    """
    pipeline = PIPELINES.get(str(config.get("model_type")))
    if pipeline is None or pipeline.deep or not isinstance(config.get("vision_config"), dict):
        return False  # the builder's decoders take no features for DeepStack: with pictures it would be another model
    pipeline.require(config, checkpoint)
    return True


def add_pictures(
    folder: Path, checkpoint: str | Path, out: Path, dtype: Precision, report_progress: ProgressCallback
) -> None:
    """Complete a folder that genai's builder wrote without embeddings.

    Args:
        folder: of the checkpoint.
        checkpoint: its name, for errors.
        out: the builder's folder.
        dtype: of the decoder; in fp16 the other graphs give fp16 too.
        report_progress: called with `(stage, done, total)`.

    Raises:
        GuardError: a config lacks what genai needs, or a graph cannot be exported.
    """
    for name in COMPANIONS:
        if (folder / name).is_file() and not (out / name).exists():
            shutil.copyfile(folder / name, out / name)
    config = read_json(out / "config.json")
    family = find_family(config, str(checkpoint))
    model = load_model(folder, family, "fp16" if dtype == "fp16" else "fp32", report_progress)
    with quiet():
        family = fitted(family, model, folder, checkpoint, report_progress)
        with in_one_line(f"{checkpoint}: transformers cannot run its vision encoder"):
            parts = around_decoder(family, model)
    graphs = []
    for number, part in enumerate(parts, 1):
        report_progress(f"exporting ({number}/{len(parts)}) {part.name}", 0, 1)
        graphs.append(export_part(model, part, DEFAULT_OPSET, checkpoint))
    vision, embedding = graphs
    insert_image_features(embedding, image_token(config, checkpoint), features_of(vision.graph))
    save_part(vision, out / VISION)
    save_part(embedding, out / EMBEDDING)
    content = read_json(out / CONFIG)
    described = content.get("model")
    if not isinstance(described, dict) or described.get("pad_token_id") is None:
        raise ModelUnreadable(f"{checkpoint}: onnxruntime-genai's builder wrote no pad_token_id; set it in the config")
    described |= picture_sections(config, vision.graph, out)
    (out / CONFIG).write_text(to_strict_json(content, indent=4) + "\n", encoding="utf-8")
    (out / PROCESSOR).write_bytes(processor_bytes(out))
    require_padding_apart(out, described["pad_token_id"])
