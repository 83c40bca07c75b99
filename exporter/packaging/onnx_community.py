"""`vlmguard package --onnx-community`: names and configs as transformers.js looks for them on the hub.

onnx/model.onnx, or decoder_model_merged.onnx with embed_tokens.onnx and vision_encoder.onnx
external data NAME.onnx_data, NAME.onnx_data_1, ...; config.json counts them, because a browser cannot list a folder
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from ...graphs.errors import GuardError
from ...graphs.external_weights import CheckedWeight
from ...graphs.graph_io import external_files, graph_bytes, load_graph
from ...graphs.manifest import Manifest
from ...graphs.new_files import Data
from ...graphs.package import ModelPackage
from ...graphs.progress import ProgressCallback, ignore_progress
from ...graphs.roles import EMBEDS, MASK, POSITIONS, TOKENS, input_roles
from .community_config import GENAI, RUNTIME, config_bytes, configs
from .known_inputs import require_known
from .repackage import FolderLayout, Packaged, loose_files, repackage, require_other_layout

_FED = (TOKENS, EMBEDS, MASK, POSITIONS, "num_logits_to_keep", "use_cache_branch")


def package_onnx_community(
    guarded: Path | str,
    out: Path | str,
    *,
    data: Data = "link",
    force: bool = False,
    report_progress: ProgressCallback = ignore_progress,
) -> Packaged:
    """Write the onnx-community layout.

    Args:
        guarded, out, data, force, report_progress: as for `repackage`.

    Raises:
        GuardError: as for `repackage`; transformers.js cannot feed the decoder, or the model has no config.
    """
    return repackage(guarded, out, arrange, data=data, force=force, report_progress=report_progress)


def arrange(manifest: Manifest, package: ModelPackage) -> FolderLayout:
    """The layout of the folder.

    Raises:
        GuardError: as for `package_onnx_community`.
    """
    require_other_layout(package, "onnx-community", RUNTIME)
    if package.layout == "transformers":
        raise GuardError(
            f"{package.root}: was written by transformers' exporter, whose decoder is two graphs with other input names than "
            f"{RUNTIME} feeds; convert the checkpoint with `vlmguard convert` and guard that"
        )
    decoder = load_graph(package.decoder, trust_links=True)
    require_known(decoder, str(package.decoder), RUNTIME, _FED)
    graphs = _names(package, bool(input_roles(decoder.graph).embeds))
    brought = {name: name for name in loose_files(manifest, package) if name != GENAI}
    written: dict[str, bytes] = {}
    chunks: dict[str, int] = {}
    for here, graph in graphs.items():
        there = graph.relative_to(package.root).as_posix()
        files = external_files(graph)
        if not files:
            brought[here] = there
            continue
        renamed = {path.relative_to(graph.parent).as_posix(): _data_name(here, at) for at, path in enumerate(files)}
        written[here] = _referring(graph, renamed)
        chunks[Path(here).name] = len(files)
        for path in files:
            name = renamed[path.relative_to(graph.parent).as_posix()]
            brought[f"onnx/{name}"] = path.relative_to(package.root).as_posix()
    config, generation = configs(package, chunks)
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        if content is not None:
            brought.pop(name, None)
            written[name] = config_bytes(content)
    runs = next(here for here, graph in graphs.items() if graph == package.decoder)
    return FolderLayout(
        "onnx-community", {package.decoder.relative_to(package.root).as_posix(): runs}, brought, written
    )


def _names(package: ModelPackage, takes_embeds: bool) -> dict[str, Path]:
    """Path in the folder -> graph."""
    if not takes_embeds:
        return {"onnx/model.onnx": package.decoder}
    embed, vision = package.embed_tokens, package.vision_encoder
    if embed is None:
        raise GuardError(
            f"{package.root}: the decoder takes inputs_embeds, but there is no embed_tokens graph; package a whole model"
        )
    taken = [str(value.name) for value in load_graph(embed, trust_links=True).graph.inputs]
    if taken != [TOKENS]:
        raise GuardError(
            f"{embed}: takes {', '.join(taken)}, {RUNTIME} gives input_ids alone and puts the image features in itself; "
            "keep the layout that it has"
        )
    graphs = {"onnx/decoder_model_merged.onnx": package.decoder, "onnx/embed_tokens.onnx": embed}
    return graphs | ({"onnx/vision_encoder.onnx": vision} if vision is not None else {})


def _data_name(graph: str, at: int) -> str:
    return f"{Path(graph).name}_data" + (f"_{at}" if at else "")


def _referring(graph: Path, renamed: Mapping[str, str]) -> bytes:
    """The graph with its external data under other names; nothing else is changed."""
    model = load_graph(graph, trust_links=True)
    for part in model.graphs():
        for value in part.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = CheckedWeight.of(tensor, renamed[Path(tensor.location).as_posix()])
    return graph_bytes(model)
