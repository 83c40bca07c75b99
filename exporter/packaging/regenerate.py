"""Regenerates the files that `vlmguard package` writes from the folder itself, so that none of them has to be trusted.

The manifest's record of the packaging (`packaged`) decides nothing: the layout determines which files are written, moved and
left out, and the record must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath

import onnx_ir as ir

from ...graphs import triton
from ...graphs.genai_deepstack import take_apart_features
from ...graphs.genai_embedding import take_out_image_features
from ...graphs.graph_io import external_files, graph_bytes, load_graph
from ...graphs.json_files import read_json
from ...graphs.manifest import Manifest
from ...graphs.package import ModelPackage
from ...graphs.proof.strip import fit_back
from ...graphs.proof.structure import Check, exact
from . import community_config, genai_config
from .genai_pictures import EMBEDDING, VISION, embedding_bytes, fit_decoder, fitted_vision
from .genai_processor import PROCESSOR, processor_bytes

_GENERATION = "generation_config.json"


def check_packaged(folder: Path, manifest: Manifest, package: ModelPackage, original: ModelPackage | None) -> Check:
    """Check that the record of the packaging and every written file equal what the layout gives.

    Args:
        folder: the packaged folder.
        manifest: its manifest.
        package: the opened folder.
        original: the unguarded model, if available.
    """
    record = manifest.packaged
    assert record is not None
    contents = regenerated(package, original, record.written)
    graphs = _graphs(package)
    data = {_relative(package, path) for graph in graphs for path in external_files(graph)}
    movable = {_relative(package, graph) for graph in graphs} | data
    wrong = []
    if package.layout == "onnx-community":  # where data is outside, the graph's references to it were written anew
        contents |= {_relative(package, graph): None for graph in graphs if external_files(graph)}
    elif package.layout == "triton":  # `check_repository` compares their bytes
        contents |= dict.fromkeys([name for name in record.written if _is_of_triton(name)])
    for name in sorted(set(record.written) | contents.keys()):
        if name not in contents or name not in record.written:
            wrong.append(f"{name} is {'not ' if name in contents else ''}recorded as generated")
        elif contents[name] is not None and (folder / name).read_bytes() != contents[name]:
            wrong.append(f"{name} is not what the packaging makes")
    if len(set(record.moved.values())) != len(record.moved):
        wrong.append("two files are recorded as one")
    for here, there in record.moved.items():
        plain = not PurePosixPath(there).is_absolute() and ".." not in PurePosixPath(there).parts
        if here not in movable or here == there or not plain:
            wrong.append(f"{here} is recorded as moved from {there}")
    return exact("what was packaged is what the layout makes", len(record.written) + len(record.moved), wrong)


def regenerated(
    package: ModelPackage, original: ModelPackage | None, written: Collection[str]
) -> dict[str, bytes | None]:
    """The files written by the packaging, by path; `None` for files that other checks compare.

    Args:
        package: the opened folder.
        original: the unguarded model, if available.
        written: files recorded as written; only configs converted from another layout depend on it.
    """
    if package.layout == "genai":
        return _genai_files(package)
    if package.layout == "onnx-community":
        return _community_configs(package, original, written)
    return {}


def _genai_files(package: ModelPackage) -> dict[str, bytes | None]:
    decoder = load_graph(package.decoder, trust_links=True)
    files: dict[str, bytes | None] = {"genai_config.json": genai_config.config_bytes(package, decoder)}
    if genai_config.takes_pictures(decoder):
        assert package.embed_tokens is not None  # the config was made of it
        embedding = load_graph(package.embed_tokens, trust_links=True)
        take_out_image_features(embedding)
        vision, layers = fitted_vision(package)
        files[EMBEDDING] = embedding_bytes(package, embedding, vision.graph, layers)
        files[PROCESSOR] = processor_bytes(package.root)
        if layers > 1:
            files[VISION] = graph_bytes(vision)
        fit_back(decoder)
        if fit_decoder(package, decoder):
            files[genai_config.GRAPH] = graph_bytes(decoder)
    return files


def restored_graphs(manifest: Manifest, package: ModelPackage) -> dict[str, Callable[[ir.Model], None]]:
    """By path, what undoes the layout's changes in a graph, in place, to compare it with the source's."""
    written = manifest.packaged.written if manifest.packaged is not None and package.layout == "genai" else ()
    undo = {EMBEDDING: take_out_image_features, VISION: take_apart_features, genai_config.GRAPH: fit_back}
    return {name: restore for name, restore in undo.items() if name in written}


def load_restored(manifest: Manifest, package: ModelPackage) -> ir.Model:
    """The guarded decoder without the layout's changes, a fresh copy; `check_packaged` proves those.

    Args:
        manifest: of the folder.
        package: the opened folder.
    """
    model = package.load_decoder()
    restore = restored_graphs(manifest, package).get(_relative(package, package.decoder))
    if restore is not None:
        restore(model)
    return model


def is_left_out(layout: str, name: str) -> bool:
    """Whether an arrangement leaves out a file of the guarded folder that is no graph of the model."""
    if layout == "triton":
        return "/" in name
    return name == "genai_config.json" if layout == "onnx-community" else layout == "genai" and name.startswith("onnx/")


def _community_configs(
    package: ModelPackage, original: ModelPackage | None, written: Collection[str]
) -> dict[str, bytes | None]:
    chunks = {path.name: len(files) for path in _graphs(package) if (files := external_files(path))}
    if original is not None:
        made = zip(("config.json", _GENERATION), community_config.configs(original, chunks), strict=True)
        return {name: community_config.config_bytes(content) for name, content in made if content is not None}
    found: dict[str, bytes | None] = {}
    config = read_json(package.root / "config.json")
    settings = config.get("transformers.js_config")
    if chunks:
        settings = {**(settings if isinstance(settings, dict) else {}), "use_external_data_format": chunks}
        config |= {"transformers.js_config": settings}
    if chunks or "config.json" in written:  # made from genai_config.json, which is compared with the source alone
        found["config.json"] = community_config.config_bytes(config)
    generation = read_json(package.root / _GENERATION)
    if _GENERATION in written and generation.keys() <= set(community_config.TOKENS):
        found[_GENERATION] = community_config.config_bytes(generation)
    return found


def _graphs(package: ModelPackage) -> list[Path]:
    parts = (package.decoder, *package.others, package.vision_encoder, package.embed_tokens)
    return [path for path in parts if path is not None]


def _relative(package: ModelPackage, path: Path) -> str:
    return path.relative_to(package.root).as_posix()


def _is_of_triton(name: str) -> bool:
    return PurePosixPath(name).name in (triton.CONFIG, "model.py") or name == triton.PORTS
