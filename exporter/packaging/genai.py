"""`vlmguard package --genai`: a folder that onnxruntime-genai opens, for decoders that take token ids.

genai's vision models need an embedding graph that inserts the image features (inputs `input_ids` and `image_features`). In the
onnx-community layout the app inserts them, so only text decoders can be packaged.
"""

from __future__ import annotations

from pathlib import Path

from ...graphs.errors import GuardError
from ...graphs.graph_io import load_graph
from ...graphs.manifest import Manifest
from ...graphs.new_files import Data
from ...graphs.package import ModelPackage
from ...graphs.progress import ProgressCallback, ignore_progress
from ...graphs.roles import EMBEDS
from .genai_config import FED, GRAPH, RUNTIME, config_bytes
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
    inputs = [str(value.name) for value in decoder.graph.inputs]
    if EMBEDS in inputs:
        raise GuardError(
            f"{package.decoder}: takes inputs_embeds, and {RUNTIME} needs an embedding graph that mixes image features in, "
            "which this folder has not; export the checkpoint with --exporter genai, or keep the layout that it has"
        )
    require_known(decoder, str(package.decoder), RUNTIME, FED)
    brought = {name: name for name in loose_files(manifest, package) if not name.startswith("onnx/")}
    brought |= with_data(package.decoder, package.root, GRAPH)
    config = config_bytes(package, decoder)
    there = package.decoder.relative_to(package.root).as_posix()
    return FolderLayout("genai", {there: GRAPH}, brought, {"genai_config.json": config})
