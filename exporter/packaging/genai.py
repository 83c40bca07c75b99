"""`vlmguard package --genai`: a folder that onnxruntime-genai opens.

A decoder that takes token ids is the whole folder. One that takes embeddings is the last of three graphs, and the folder is one
of genai's picture pipelines (`genai_pictures`).
"""

from __future__ import annotations

import json
from pathlib import Path

from ...graphs.graph_io import graph_bytes, load_graph
from ...graphs.manifest import Manifest
from ...graphs.new_files import Data
from ...graphs.package import ModelPackage
from ...graphs.progress import ProgressCallback, ignore_progress
from .genai_config import FED_TEXT, GRAPH, config_bytes, takes_pictures
from .genai_pictures import (
    EMBEDDING,
    FED_PICTURES,
    VISION,
    embedding_bytes,
    fit_decoder,
    fitted_vision,
    require_graphs,
    require_padding_apart,
)
from .genai_pipelines import RUNTIME, pipeline_of
from .genai_processor import PROCESSOR, processor_bytes
from .known_inputs import require_known
from .repackage import FolderLayout, Packaged, loose_files, repackage, require_other_layout, with_data


def package_genai(
    guarded: Path | str,
    out: Path | str,
    *,
    data: Data = "link",
    force: bool = False,
    report_progress: ProgressCallback = ignore_progress,
) -> Packaged:
    """Write the genai layout.

    Args:
        guarded, out, data, force, report_progress: as for `repackage`.

    Raises:
        GuardError: as for `repackage`; onnxruntime-genai cannot feed the decoder, or no config has a required value.
    """
    return repackage(guarded, out, arrange, data=data, force=force, report_progress=report_progress)


def arrange(manifest: Manifest, package: ModelPackage) -> FolderLayout:
    """The layout of the folder.

    Raises:
        GuardError: as for `package_genai`.
    """
    require_other_layout(package, "genai", RUNTIME)
    decoder = load_graph(package.decoder, trust_links=True)
    pictures = takes_pictures(decoder)
    states: dict[str, str] = {}
    if pictures:
        require_graphs(package)
        states = dict(pipeline_of(package.config, package.root).states.values())
    fitted = pictures and fit_decoder(package, decoder)
    require_known(decoder, str(package.decoder), RUNTIME, FED_PICTURES if pictures else FED_TEXT, states)
    brought = {name: name for name in loose_files(manifest, package) if not name.startswith("onnx/")}
    brought |= with_data(package.decoder, package.root, GRAPH)
    config = config_bytes(package, decoder)
    written = {"genai_config.json": config}
    if fitted:
        brought.pop(GRAPH)
        written[GRAPH] = graph_bytes(decoder)
    rewritten: dict[str, str] = {}
    if pictures:
        vision, embed_tokens = package.vision_encoder, package.embed_tokens
        assert vision is not None and embed_tokens is not None  # `require_graphs` requires both
        require_padding_apart(package.root, json.loads(config)["model"]["pad_token_id"])
        brought |= with_data(vision, package.root, VISION) | with_data(embed_tokens, package.root, EMBEDDING)
        rewritten = {brought.pop(EMBEDDING): EMBEDDING}
        whole, layers = fitted_vision(package)
        if layers > 1:
            rewritten[brought.pop(VISION)] = VISION
            written[VISION] = graph_bytes(whole)
        written[EMBEDDING] = embedding_bytes(package, load_graph(embed_tokens, trust_links=True), whole.graph, layers)
        written[PROCESSOR] = processor_bytes(package.root)
    there = package.decoder.relative_to(package.root).as_posix()
    return FolderLayout("genai", {there: GRAPH}, brought, written, rewritten=rewritten)
