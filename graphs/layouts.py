"""Opens a model file or folder and finds the decoder. There is one function per layout.

Layouts (docs/graphs.md, section "Layouts that apps load"):

- `onnx-community`: `onnx/{vision_encoder,embed_tokens,decoder_model_merged}[_variant].onnx`, configs and tokenizer at the root
- `genai`: `genai_config.json` names the decoder file, or the stages of a `decoder.pipeline` (`genai_pipeline.py`)
- `transformers`: `export.json` names the graphs of `OnnxExporter.export_for_generation(...).save_pretrained` (5.23), and the
  decoder's weights are in TWO of them: `language_model` for the prompt, `decode` for each further token
- `bare`: one `model.onnx`, its external data beside it, tokenizer beside or above it
- `triton`: a model repository of Triton Inference Server, as `vlmguard package --triton` writes it (`triton.py`)
- `engines`: TensorRT engines that `vlmguard engine` built; only their `guard.json` describes them, so only `GuardedVLM`
opens them

Several files of a folder may hold the decoder (precision variants, `decode` and `language_model`). All are guarded, or left
out of the guarded folder: an app that opens another file must not find an unguarded one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import triton
from .decoder_state import is_state_name
from .errors import ModelUnreadable
from .genai_pipeline import read_pipeline, stage_files
from .graph_io import external_files, load_graph
from .json_files import read_json
from .links import require_own
from .package import ModelPackage
from .places import require_model
from .roles import input_roles

# Graphs of the onnx-community layout that are not decoders.
_SIBLINGS = ("vision_encoder", "embed_tokens", "audio_encoder")
_DECODERS = ("decoder_model_merged", "decoder_with_past_model", "decoder_model", "model")
_TRANSFORMERS_MANIFEST = "export.json"


def open_package(path: Path | str, variant: str | None = None, trust_links: bool = False) -> ModelPackage:
    """Find the decoder of a file or folder.

    Args:
        path: a `.onnx` file, or a folder in one of the layouts.
        variant: precision suffix of the onnx-community layout (`fp16`, `q4`, ...); other variants are left out. `None`: all
            variants; the one without suffix runs, else the first.
        trust_links: as in `ModelPackage`.

    Raises:
        ModelUnreadable: the path is missing, no single decoder is found, or a graph is a link out of the folder.
    """
    path = Path(path).absolute()
    package = replace(_find(path, variant), trust_links=trust_links)
    # the one that was named may be a link of the user's
    graphs = {package.decoder, *package.others, package.vision_encoder, package.embed_tokens, package.head} - {
        path,
        None,
    }
    for graph in sorted(filter(None, graphs)):
        if graph.exists() and not trust_links:
            require_own(graph, package.root)
    return package


def variant_name(decoder: Path) -> str:
    """`decoder_model_merged_q4f16.onnx` -> `q4f16`; "" for the plain file, or a name of another layout."""
    stem = _stem(decoder, _DECODERS)
    return decoder.stem.removeprefix(stem or decoder.stem).removeprefix("_")


def variant_of(package: ModelPackage, variant: str) -> ModelPackage:
    """A package seen from the decoder graph of one precision.

    Args:
        package: of an onnx-community folder.
        variant: suffix of the file: `fp16`, `q4`, ...; "" for the plain one.

    Raises:
        ModelUnreadable: the folder has no such variant.
    """
    views = {variant_name(view.decoder): view for view in package.views()}
    if package.layout != "onnx-community" or variant not in views:
        known = ", ".join(repr(name) for name in sorted(views))
        raise ModelUnreadable(f"{package.root}: the decoder has no variant {variant!r}, only {known}; name one")
    return views[variant]


def _find(path: Path, variant: str | None) -> ModelPackage:
    require_model(path)
    if variant is not None and not (path / "onnx").is_dir():
        raise ModelUnreadable(
            f"{path}: variant {variant!r} needs an onnx-community folder, other layouts have no variants; leave --variant out"
        )
    if path.is_file():
        return _from_file(path)
    if not path.is_dir():  # a FIFO or a device
        raise ModelUnreadable(f"{path}: is neither a file nor a folder; give a .onnx file or a model folder")
    if triton.is_repository(path):  # first: configs of the layout that it was made from lie in it too
        return _triton(path)
    if (path / "genai_config.json").is_file():
        return _genai(path)
    if (path / "onnx").is_dir():
        return _onnx_community(path, variant)
    if (path / _TRANSFORMERS_MANIFEST).is_file():
        return _transformers(path)
    graphs = sorted(path.glob("*.onnx"))
    if len(graphs) == 1:
        return ModelPackage(path, graphs[0], "bare")
    if not graphs:
        raise ModelUnreadable(f"{path}: holds no .onnx file and is no checkpoint; give a model file or folder")
    raise ModelUnreadable(f"{path}: holds {len(graphs)} graphs ({_some(graphs)}); name the decoder's file")


def _from_file(path: Path) -> ModelPackage:
    root = path.parent.parent
    if path.parent.name == "onnx" and (root / "config.json").is_file() and _stem(path, _DECODERS) is not None:
        return _community_package(root, path)
    if (path.parent / "genai_config.json").is_file():
        package = _genai(path.parent)
        if package.decoder == path and not package.others:
            return package
        if path in (package.decoder, *package.others):
            raise ModelUnreadable(
                f"{path}: is one of the decoder graphs of a genai pipeline "
                f"({_some([package.decoder, *package.others])}); name the folder, so that all are guarded"
            )
    if (path.parent / _TRANSFORMERS_MANIFEST).is_file():
        package = _transformers(path.parent)
        if package.others and path in (package.decoder, *package.others):
            raise ModelUnreadable(
                f"{path}: is one of the decoder graphs of a transformers export "
                f"({_some([package.decoder, *package.others])}); name the folder, so that all are guarded"
            )
    return ModelPackage(path.parent, path, "bare")


def _genai(root: Path) -> ModelPackage:
    config = read_json(root / "genai_config.json")
    _require_no_library(root, config)
    model = config.get("model")
    parts = model.items() if isinstance(model, dict) else ()
    named = {part: entry.get("filename") for part, entry in parts if isinstance(entry, dict)}
    paths = {part: _inside(root, name, "genai_config.json") for part, name in named.items() if isinstance(name, str)}
    around = {part: paths[part] for part in ("vision", "embedding", "speech") if part in paths}
    if "decoder" not in paths and (stages := stage_files(config)):
        return _pipeline(root, config, stages, around)
    if "decoder" not in paths:
        raise ModelUnreadable(f"{root / 'genai_config.json'}: names no model.decoder.filename; is it complete?")
    return ModelPackage(
        root,
        paths["decoder"],
        "genai",
        vision_encoder=around.get("vision"),
        embed_tokens=around.get("embedding"),
        left_out=_others(root, {paths["decoder"], *around.values()}),
    )


def _pipeline(root: Path, config: Mapping[str, Any], files: Sequence[str], around: Mapping[str, Path]) -> ModelPackage:
    """The stages that hold the decoder's layers are its graphs; the others lie around it."""
    paths = [_inside(root, name, "genai_config.json") for name in files]
    graphs = {path: load_graph(path, trust_links=True) for path in paths}  # its links are judged with all others'
    decoder = config["model"]["decoder"]
    layers = decoder.get("num_hidden_layers")
    parts = read_pipeline(root / "genai_config.json", graphs, layers if isinstance(layers, int) else None)
    return ModelPackage(
        root,
        parts.decoders[0],
        "genai",
        vision_encoder=around.get("vision"),
        embed_tokens=around.get("embedding", parts.embed_tokens),
        left_out=_others(root, {*paths, *around.values()}),
        others=parts.decoders[1:],
        head=parts.head,
    )


def _triton(root: Path) -> ModelPackage:
    decoder = triton.graph_path(root, triton.DECODER)
    if decoder is None:
        raise ModelUnreadable(f"{root / triton.DECODER}: holds no {triton.VERSION}/{triton.GRAPH}; package it again")
    vision, embed = triton.graph_path(root, triton.VISION_ENCODER), triton.graph_path(root, triton.EMBED_TOKENS)
    kept = {path for path in (decoder, vision, embed) if path is not None}
    return ModelPackage(root, decoder, "triton", vision, embed, _others(root, kept))


def _require_no_library(root: Path, config: Any) -> None:
    """onnxruntime-genai loads a shared library that the config names: untrusted code."""
    waiting = [config]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict) and part.get("custom_ops_library"):
            raise ModelUnreadable(
                f"{root / 'genai_config.json'}: loads a library of its own ({part['custom_ops_library']!r}), which is code; "
                "do not use it, or remove custom_ops_library"
            )
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()


def _onnx_community(root: Path, variant: str | None) -> ModelPackage:
    found = {path: _stem(path, _DECODERS) for path in sorted((root / "onnx").glob("*.onnx"))}
    decoders = {path: stem for path, stem in found.items() if stem is not None}
    if not decoders:
        raise ModelUnreadable(f"{root / 'onnx'}: holds no decoder ({', '.join(_DECODERS)}); found {_some(list(found))}")
    suffixes = {path: variant_name(path) for path in decoders}
    chosen = [path for path in decoders if variant is None or suffixes[path] == variant]
    if not chosen:
        known = ", ".join(repr(name) for name in sorted(set(suffixes.values())))
        raise ModelUnreadable(f"{root / 'onnx'}: the decoder has no variant {variant!r}, only {known}; name one")
    chosen.sort(key=lambda path: (_DECODERS.index(decoders[path]), suffixes[path] != "", suffixes[path]))
    return _community_package(root, chosen[0], tuple(chosen[1:]))


def _community_package(root: Path, decoder: Path, others: tuple[Path, ...] = ()) -> ModelPackage:
    stem = _stem(decoder, _DECODERS)
    suffix = decoder.stem.removeprefix(stem or "")
    siblings = {}
    for name in _SIBLINGS:
        # A q4 decoder often sits beside an fp16 encoder: the same variant first, then the plain file, then any.
        candidates = [root / "onnx" / f"{name}{suffix}.onnx", root / "onnx" / f"{name}.onnx"]
        candidates += sorted((root / "onnx").glob(f"{name}_*.onnx"))
        siblings[name] = next((path for path in candidates if path.is_file()), None)
    around = {path for path in (root / "onnx").glob("*.onnx") if _stem(path, _SIBLINGS) is not None}
    return ModelPackage(
        root,
        decoder,
        "onnx-community",
        vision_encoder=siblings["vision_encoder"],
        embed_tokens=siblings["embed_tokens"],
        left_out=_others(root, {decoder, *others, *around}),
        others=others,
    )


def _transformers(root: Path) -> ModelPackage:
    """The graphs with a KV cache hold the decoder; the one that takes `input_ids` and a past can run alone."""
    components = read_json(root / _TRANSFORMERS_MANIFEST).get("components")
    named = components.values() if isinstance(components, dict) else ()
    names = [entry["file"] for entry in named if isinstance(entry, dict) and isinstance(entry.get("file"), str)]
    paths = [_inside(root, name, _TRANSFORMERS_MANIFEST) for name in names]
    cached = {path: load_graph(path, trust_links=True).graph for path in paths}  # its links are judged with all others'
    if len(paths) > 1:
        cached = {
            path: graph for path, graph in cached.items() if any(is_state_name(v.name or "") for v in graph.outputs)
        }
    if not cached:
        raise ModelUnreadable(
            f"{root / _TRANSFORMERS_MANIFEST}: names no graph with a KV cache among {_some(paths)}; is it a decoder?"
        )
    alone = [path for path, graph in cached.items() if input_roles(graph).states]
    decoder = (alone or list(cached))[0]
    return ModelPackage(
        root,
        decoder,
        "transformers",
        left_out=_others(root, set(paths)),
        others=tuple(path for path in cached if path != decoder),
    )


def _others(root: Path, keep: set[Path]) -> tuple[str, ...]:
    """Graphs that are not kept, and their external data; relative to root."""
    kept_data = {data for path in keep if path.is_file() for data in external_files(path)}
    left: set[str] = set()
    for path in root.rglob("*.onnx"):
        if path not in keep:
            left.add(path.relative_to(root).as_posix())
            with contextlib.suppress(ModelUnreadable):
                left |= {data.relative_to(root).as_posix() for data in external_files(path) if data not in kept_data}
    return tuple(sorted(left))


def _stem(path: Path, stems: tuple[str, ...]) -> str | None:
    """The stem of a file name, with or without a `_variant`."""
    return next((s for s in stems if path.stem == s or path.stem.startswith(f"{s}_")), None)


def _inside(root: Path, name: str, said_by: str) -> Path:
    path = root / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ModelUnreadable(f"{root}: names a file outside itself ({name}); do not use it, or fix {said_by}")
    return path


def _some(paths: list[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "") if names else "nothing"
