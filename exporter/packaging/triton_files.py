"""The files of a Triton repository besides graphs: configs, the front model, and its description of the other models. Checks
that a repository has exactly these.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...graphs import triton
from ...graphs.errors import GuardError, ManifestMismatch
from ...graphs.graph_io import load_graph
from ...graphs.manifest import Manifest
from ...graphs.package import ModelPackage
from ...graphs.proof.structure import Check, exact
from ...graphs.strict_json import to_strict_json
from ...runtime.decoder import DecoderSession
from ...runtime.decoder_inputs import can_pad
from ...runtime.triton_runner import Ports, TritonRunner
from .triton_config import Part, TritonOptions, front_config, graph_config, part_of


def graphs_of(package: ModelPackage) -> dict[str, Path]:
    """Model -> graph."""
    found = {
        triton.DECODER: package.decoder,
        triton.VISION_ENCODER: package.vision_encoder,
        triton.EMBED_TOKENS: package.embed_tokens,
    }
    return {part: path for part, path in found.items() if path is not None}


def written_files(
    graphs: Mapping[str, Path], package: ModelPackage, plan: Mapping[str, Any], options: TritonOptions
) -> dict[str, bytes]:
    """Content of every file that is derived from the graphs: configs, the front model, its description of the other models.

    Args:
        graphs: model name -> graph file.
        package: the guarded folder.
        plan: the guard's plan from the manifest.
        options: options of the repository.
    """
    parts = {name: part_of(name, load_graph(path, trust_links=True)) for name, path in graphs.items()}
    require_runnable(parts, package)
    guard = {"vlmguard.mode": plan["mode"], "vlmguard.layers": ",".join(map(str, plan["layers"]))}
    found = {f"{name}/{triton.CONFIG}": _config(part, options, guard) for name, part in parts.items()}
    found[f"{triton.FRONT}/{triton.CONFIG}"] = front_config(options, guard)
    described = {
        "models": {name: part.ports.to_json() for name, part in parts.items()},
        "pads": can_pad(load_graph(graphs[triton.DECODER], trust_links=True).graph),
    }
    found[triton.PORTS] = to_strict_json(described, indent=1) + "\n"
    content = {name: text.encode() for name, text in found.items()}
    content[f"{triton.FRONT}/{triton.VERSION}/model.py"] = Path(__file__).with_name("front_model.py").read_bytes()
    return content


def own_code() -> tuple[str, ...]:
    """The files in a repository that Triton runs or configures itself by; `check_repository` compares their bytes."""
    parts = (triton.DECODER, triton.VISION_ENCODER, triton.EMBED_TOKENS, triton.FRONT)
    return (f"{triton.FRONT}/{triton.VERSION}/model.py", *(f"{part}/{triton.CONFIG}" for part in parts))


def _config(part: Part, options: TritonOptions, guard: dict[str, str]) -> str:
    return graph_config(part, options, guard if part.name == triton.DECODER else {})


def require_runnable(parts: dict[str, Part], package: ModelPackage) -> None:
    """The front model can feed what the decoder takes.

    Raises:
        GuardError: it cannot.
    """
    decoder = DecoderSession(
        _unrun(parts[triton.DECODER].ports), package.kv_heads, package.head_size, roles=package.roles
    )
    if decoder.takes_embeds and triton.EMBED_TOKENS not in parts:
        raise GuardError(
            f"{package.root}: the decoder takes inputs_embeds, but there is no embed_tokens graph, so nothing could feed it "
            "in Triton; package the whole model folder"
        )


def _unrun(ports: Ports) -> TritonRunner:
    return TritonRunner(triton.DECODER, ports, None)


def check_repository(folder: Path, manifest: Manifest, package: ModelPackage) -> list[Check]:
    """Triton would load what was proved, and nothing else: its rules for folders, and every file that is made from the graphs.

    Raises:
        ManifestMismatch: the manifest's options cannot be read.
    """
    assert manifest.packaged is not None
    try:
        options = TritonOptions(**manifest.packaged.options)
    except (TypeError, GuardError) as error:
        raise ManifestMismatch(f"{folder}: its options cannot be read ({error}); package it again") from None
    graphs = graphs_of(package)
    expected = written_files(graphs, package, manifest.plan, options)
    return [
        exact(
            "Triton finds one version of each model, and no other model", len(graphs) + 1, _misplaced(folder, graphs)
        ),
        exact(
            "configs and front model are what the graphs give",
            len(expected),
            [name for name, content in expected.items() if not _holds(folder / name, content)],
        ),
    ]


def _misplaced(folder: Path, graphs: Mapping[str, Path]) -> list[str]:
    """Every folder in a repository is a model, every folder with a number for a name in that a version of it."""
    models = {path.name: path for path in folder.iterdir() if path.is_dir()}
    wrong = sorted(models.keys() ^ {*graphs, triton.FRONT})
    for name, path in models.items():
        wrong += [
            f"{name}/{found.name}" for found in path.iterdir() if found.name not in (triton.CONFIG, triton.VERSION)
        ]
    return wrong


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content
