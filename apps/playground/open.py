"""`playground`: a guarded folder as a site that a browser opens, in one screen.

guarded folder ──► both decoders ──┐
        configs ──► facts ─────────┼──► site ──► server
        prompts ──► samples ───────┤
   npm registry ──► libraries ─────┘
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from ...exporter.prompts.overlaps import require_held_out_of
from ...graphs.errors import GuardError
from ...graphs.graph_io import external_files, graph_bytes, load_graph
from ...graphs.manifest import read_manifest
from ...graphs.progress import ProgressCallback, ignore_progress
from ...graphs.roles import input_roles
from ...graphs.strict_json import to_strict_json
from ...runtime.chat.chat import ChatTokenizer
from ...runtime.images.vision import open_preprocessor
from .facts import model_facts, require_page_model, token_checks, tokenizer_json
from .libraries import LIBRARIES, find_libraries
from .page_server import PlaygroundServer
from .samples import BLANK, choose_samples, png
from .sides import Sides, open_sides
from .site import make_site

DEFAULT_PORT = 8365
# WebAssembly addresses 4 GiB; the rest is for what is computed.
LARGEST_MODEL = 3 << 30  # bytes, both sides


def playground(
    guarded: Path | str,
    *,
    base: Path | str | None = None,
    variant: str | None = None,
    prompts: str | None = None,
    assets: Path | None = None,
    port: int = DEFAULT_PORT,
    report_progress: ProgressCallback = ignore_progress,
) -> PlaygroundServer:
    """Make the site of a guarded folder, and a server that is bound and not running yet.

    Args:
        guarded: a folder of graphs in the onnx-community layout that `vlmguard-export` wrote.
        base: the unguarded model; default: the folder's own graph, the guard taken out in memory.
        variant: precision variant of the decoder; `None`: the one that runs.
        prompts: labelled prompts to pick from; default: found beside the model, else built-in ones.
        assets: a `node_modules` with the libraries; default: the user's cache, filled from the npm registry.
        port: of the loopback address; 0 takes any that is free.
        report_progress: called with `(stage, done, total)`.

    Raises:
        GuardError: anything wrong with the request or its files; nothing is served.
    """
    folder = Path(guarded).absolute()
    sides = open_sides(folder, Path(base).absolute() if base is not None else None, variant)
    require_page_model(sides)
    _require_room(sides)
    libraries = find_libraries(assets, report_progress)
    return PlaygroundServer(make_site(libraries, _model_files(sides, prompts)), port)


def _model_files(sides: Sides, prompts: str | None) -> dict[str, bytes | Path]:
    """Address below `/model/` -> what is there."""
    package = sides.package
    path = package.companion("tokenizer.json")
    chat = ChatTokenizer.open(path.parent if path is not None else package.root)
    images = open_preprocessor(package.root)
    samples = choose_samples(prompts, [sides.base_home.parent, package.root])
    title = prompts or "the prompts found beside the model"
    require_held_out_of(package.root, read_manifest(package.root), title, samples.prompts, "show the model")
    assert package.vision_encoder is not None and package.embed_tokens is not None  # or it was refused
    files: dict[str, bytes | Path] = {"tokenizer.json": tokenizer_json(chat)}
    parts = {
        "base": _in_memory(files, "base", sides.base, sides.base_home),
        "guarded": _in_memory(files, "guarded", sides.guarded, package.decoder.parent),
        "embed": _on_disk(files, "embed", package.embed_tokens),
        "vision": _on_disk(files, "vision", package.vision_encoder),
    }
    files |= {f"{name}.png": png(picture) for name, picture in samples.pictures.items()}
    files[f"{BLANK}.png"] = png(images.blank_image())
    facts = model_facts(sides, chat, images) | {
        "parts": parts,
        "samples": samples.to_json(),
        "tokenChecks": token_checks(chat, list(dict.fromkeys(row.prompt for row in samples.prompts))),
        "libraries": [str(library) for library in LIBRARIES],
    }
    files["facts.json"] = to_strict_json(facts, ensure_ascii=False).encode()
    return files


# How the page opens one graph: its address, where its external data is, which nodes stay on the CPU beside WebGPU, and which
# outputs refill the cache.
Part = dict[str, object]
# onnxruntime-web 1.30 on WebGPU computes a wrong `And` in one graph after one of other shapes in another graph, as in SmolVLM's
# vision encoder and then its decoder's attention mask: it runs the other graph's shader.
_CPU_OPERATORS = frozenset({"And"})


def _on_disk(files: dict[str, bytes | Path], name: str, graph: Path) -> Part:
    files[f"{name}.onnx"] = graph
    data = {str(path.relative_to(graph.parent)): path for path in external_files(graph)}
    return _part(files, name, data, load_graph(graph, trust_links=True))


def _in_memory(files: dict[str, bytes | Path], name: str, graph: ir.Model, home: Path) -> Part:
    files[f"{name}.onnx"] = graph_bytes(graph)
    tensors = (value.const_value for value in graph.graph.initializers.values())
    names = {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    cache = {pair.past: pair.present for pair in input_roles(graph.graph).states}
    return _part(files, name, {location: home / location for location in sorted(names)}, graph) | {"cache": cache}


def _part(files: dict[str, bytes | Path], name: str, data: Mapping[str, Path], graph: ir.Model) -> Part:
    """One model file with its external data, which is served under numbered URLs because file names are untrusted."""
    addresses = {location: f"{name}-{number}.data" for number, location in enumerate(data)}
    files |= {addresses[location]: path for location, path in data.items()}
    return {
        "graph": f"{name}.onnx",
        "data": [{"path": p, "address": a} for p, a in addresses.items()],
        "cpuNodes": [node.name for node in graph.graph if node.op_type in _CPU_OPERATORS and node.name],
        "cache": {},
    }


def _require_room(sides: Sides) -> None:
    """Both sides fit into a browser's memory.

    Raises:
        GuardError: they do not.
    """
    package = sides.package
    parts = [package.decoder, package.decoder, package.embed_tokens, package.vision_encoder]
    size = sum(file.stat().st_size for part in parts if part for file in (part, *external_files(part)))
    if size > LARGEST_MODEL:
        raise GuardError(
            f"{package.root}: both sides take {size / 2**30:.1f} GiB, WebAssembly has room for {LARGEST_MODEL >> 30} GiB; "
            "choose a smaller --variant, such as q4"
        )
