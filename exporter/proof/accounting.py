"""Accounts for every file of a guarded folder. `verify` decides from the folder, not from its manifest, which files to check.

The layout is detected and compared with the manifest's. Every graph is a verified decoder or contains no part of one. External
data is listed. Configs name only checked graphs. There is no code and no checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import onnx_ir as ir

from ...graphs.anatomy import DecoderAnatomy
from ...graphs.bystanders import decoder_in
from ...graphs.directions import DIRECTIONS_FILE
from ...graphs.errors import GuardError, ManifestMismatch
from ...graphs.graph_content import is_engine, is_graph
from ...graphs.graph_io import external_files, load_graph
from ...graphs.inventory import CHECKPOINTS, CODE
from ...graphs.json_files import LARGEST_JSON, read_json
from ...graphs.manifest import Manifest
from ...graphs.package import ModelPackage
from ...graphs.proof.structure import Check, exact

# Configs that name graphs, by the key.
_NAMES_A_GRAPH = frozenset({"filename", "file", "model_file", "model_file_name"})
# Settings that make a runtime take graphs, weights or code from elsewhere.
_REDIRECTS = (
    "external_initializers",
    "custom_ops",
    "ep.context",
    "ep_context",
    "optimized_model_filepath",
    "load_model_format",
)
_NO_CONFIGS = frozenset({"tokenizer.json", "vocab.json", "added_tokens.json", "sbom.cdx.json"})


def graphs_of(folder: Path, manifest: Manifest) -> list[str]:
    """The graphs and engines among the folder's files, by what they hold; everything of that kind is listed."""
    return sorted(name for name in manifest.files if is_graph(folder / name))


def text_inputs(package: ModelPackage) -> tuple[str, ...]:
    """The decoder's inputs that onnxruntime-genai feeds text to, by the names that its config gives them."""
    model = read_json(package.root / "genai_config.json").get("model") if package.layout == "genai" else None
    decoder = model.get("decoder") if isinstance(model, dict) else None
    named = decoder.get("inputs") if isinstance(decoder, dict) else None
    found = [named.get(name) for name in ("input_ids", "inputs_embeds")] if isinstance(named, dict) else []
    return tuple(name for name in found if isinstance(name, str))


def check_layout(manifest: Manifest, package: ModelPackage) -> Check:
    """Check that the folder has the layout recorded in its manifest."""
    wrong = (
        [] if package.layout == manifest.layout else [f"it is {package.layout}, the manifest records {manifest.layout}"]
    )
    if package.layout == "triton" and manifest.packaged is None:
        wrong.append("a Triton repository is made by `vlmguard package`, and its manifest has no record of that")
    return exact("the folder has the layout that its manifest names", 1, wrong)


def check_graphs(
    folder: Path, manifest: Manifest, decoder: ir.Model, anatomy: DecoderAnatomy, code: frozenset[str] = frozenset()
) -> list[Check]:
    """Check that every graph is a verified decoder or contains none, and that data, configs and code are accounted for.

    Args:
        folder: its files match the manifest.
        manifest: of the folder.
        decoder, anatomy: the decoder that runs, without its guard.
        code: programs that another check compares with our own.
    """
    graphs = graphs_of(folder, manifest)
    decoders = {record.path for record in manifest.decoders}
    wrong = [said for name in graphs if name not in decoders and (said := _judged(folder, name, decoder, anatomy))]
    data = [(name, path) for name in graphs if not wrong for path in external_files(folder / name)]
    unlisted = [
        f"{name} keeps weights in {path.name}" for name, path in data if _relative(folder, path) not in manifest.files
    ]
    strays = _strays(manifest, code)
    misled, configs = _misled(folder, manifest, set(graphs))
    return [
        exact("every graph is a verified decoder or holds none", len(graphs), wrong),
        exact("all weights outside the graphs are listed", len(graphs) + len(data), unlisted),
        exact("no config leads to another graph or to code", 1 + configs, misled),
        exact("no code and no checkpoint lies in the folder", len(manifest.files), strays),
    ]


def check_engine_files(folder: Path, manifest: Manifest) -> list[Check]:
    """A folder of engines holds the engines of its manifest, and no graph."""
    found = graphs_of(folder, manifest)
    engines = [name for name in found if is_engine(folder / name)]
    named = [engine.path for engine in manifest.engines]
    wrong = [f"{name} is a graph" for name in found if name not in engines]
    wrong += [f"{name} is in the manifest, and is no engine" for name in named if name not in engines]
    wrong += [f"{name} is not in the manifest's engines" for name in engines if name not in named]
    roles = [engine.role for engine in manifest.engines]
    if len(set(named)) != len(named) or len(set(roles)) != len(roles) or "decoder" not in roles:
        wrong.append("the manifest does not name one engine of the decoder, and each engine and each role once")
    strays = _strays(manifest)
    return [
        exact("the folder holds the engines of its manifest, and no graph", len(engines), wrong),
        exact("no code and no checkpoint lies in the folder", len(manifest.files), strays),
    ]


def require_kind(folder: Path, manifest: Manifest) -> None:
    """Require that the folder and its manifest agree on engines or graphs.

    Raises:
        ManifestMismatch: they differ, so that the proof would cover other files than those a runtime loads.
    """
    engines = [name for name in manifest.files if is_engine(folder / name)]
    if bool(engines) != bool(manifest.engines):
        what = f"holds {engines[0]}" if engines else "holds no engine"
        listed = "an engine" if manifest.engines else "no engine"
        raise ManifestMismatch(f"{folder}: {what}, its manifest lists {listed}; do not use it, or build it again")


def _judged(folder: Path, name: str, decoder: ir.Model, anatomy: DecoderAnatomy) -> str:
    """The fault of a graph beside the decoders; "" if there is none."""
    if is_engine(folder / name) or name.lower().endswith(".ort"):
        return f"{name} is compiled, and cannot be judged"
    try:
        reason = decoder_in(load_graph(folder / name, trust_links=True), decoder, anatomy)
    except GuardError as error:
        return f"{name} cannot be judged ({error})"
    return f"{name} {reason}, and is no verified decoder" if reason else ""


def _strays(manifest: Manifest, code: frozenset[str] = frozenset()) -> list[str]:
    """The files that do not belong in a guarded folder, each with its kind; `code` does."""
    directions = {DIRECTIONS_FILE}
    if not manifest.engines:  # graphs are planned again from these, which reads them
        directions |= {record.directions for record in manifest.decoders if record.directions is not None}
    others = [name for name in manifest.files if name not in code and name not in directions]
    return [f"{name} is {what}" for name in others if (what := _stray(name))]


def _stray(name: str) -> str:
    """Kind of a file that does not belong in a guarded folder, or ""."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in CODE:
        return "code"
    return "a checkpoint, which is unguarded" if suffix in CHECKPOINTS else ""


def _misled(folder: Path, manifest: Manifest, graphs: set[str]) -> tuple[list[str], int]:
    """`(what is wrong, how many configs were read)`"""
    wrong, read = [], 0
    for name in sorted(manifest.files):
        path = folder / name
        if path.suffix.lower() != ".json" or path.name in _NO_CONFIGS or path.stat().st_size > LARGEST_JSON:
            continue
        read += 1
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            wrong.append(f"{name} is no JSON")
            continue
        for key, value in _settings(content):
            if any(part in key.lower() for part in _REDIRECTS) and value:
                wrong.append(f"{name} sets {key}")
            elif isinstance(value, str) and (key in _NAMES_A_GRAPH or PurePosixPath(value).suffix.lower() == ".onnx"):
                wrong += [f"{name} names {value!r}, {why}" for why in _leads(folder, path.parent, value, graphs)]
    return wrong, read


def _leads(folder: Path, home: Path, value: str, graphs: set[str]) -> Iterator[str]:
    """Why a name in a config leads to a graph that was not judged."""
    parts = PurePosixPath(value.replace("\\", "/")).parts
    if value.startswith(("/", "\\")) or ".." in parts or ":" in value:
        if PurePosixPath(value).suffix.lower() == ".onnx" or ".." in parts:
            yield "which lies outside the folder"
        return
    for place in dict.fromkeys((home, folder, folder / "onnx")):
        path = place / value
        if path.is_file() and _relative(folder, path) not in graphs:
            yield "which is no graph that can be judged"


def _settings(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a config with its value, at any depth; those of a list have its key."""
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(str(name), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(key, inner) for inner in value]
        if key:
            yield key, value


def _relative(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
