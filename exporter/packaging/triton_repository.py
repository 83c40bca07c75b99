"""`vlmguard package --triton`: a guarded folder as a model repository of Triton Inference Server.

There is one model per graph, each in the backend that runs it, and a front model that calls them. An ensemble is not enough:
Triton's ensembles have no loops, and an answer is a loop of unknown length.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ...graphs import triton
from ...graphs.errors import GuardError
from ...graphs.manifest import Manifest
from ...graphs.new_files import Data
from ...graphs.package import ModelPackage
from ...graphs.progress import ProgressCallback, ignore_progress
from .repackage import FolderLayout, Packaged, loose_files, repackage, with_data
from .triton_config import TritonOptions
from .triton_files import graphs_of, written_files


def package_triton(
    guarded: Path | str,
    out: Path | str,
    options: TritonOptions | None = None,
    *,
    data: Data = "link",
    force: bool = False,
    report_progress: ProgressCallback = ignore_progress,
) -> Packaged:
    """Write a Triton model repository.

    Args:
        guarded: a folder that `vlmguard-export` wrote.
        out: the repository to write.
        options: how Triton runs it.
        data, force, report_progress: as for `repackage`.

    Raises:
        GuardError: as for `repackage`; or a graph cannot be run by Triton.
    """
    chosen = options or TritonOptions()
    return repackage(
        guarded,
        out,
        lambda manifest, package: arrange(manifest, package, chosen),
        data=data,
        force=force,
        report_progress=report_progress,
    )


def arrange(manifest: Manifest, package: ModelPackage, options: TritonOptions) -> FolderLayout:
    """The layout of the repository.

    Raises:
        GuardError: as for `package_triton`.
    """
    if manifest.engines:
        raise _engines_refused(package, manifest)
    graphs = graphs_of(package)
    written = written_files(graphs, package, manifest.plan, options)
    brought = {name: name for name in loose_files(manifest, package) if "/" not in name}  # a folder would be a model
    for part, graph in graphs.items():
        brought |= with_data(graph, package.root, f"{part}/{triton.VERSION}/{triton.GRAPH}")
    decoder = f"{triton.DECODER}/{triton.VERSION}/{triton.GRAPH}"
    return FolderLayout("triton", {brought[decoder]: decoder}, brought, written, asdict(options))


def _engines_refused(package: ModelPackage, manifest: Manifest) -> GuardError:
    why = {
        "tensorrt_rtx": "engines of TensorRT-RTX, which Triton's TensorRT backend does not load",
        "tensorrt": "TensorRT engines, which are not packaged: they do not declare their inputs and outputs",
    }
    return GuardError(
        f"{package.root}: holds {why[manifest.engines[0].backend]}; package the guarded ONNX folder that they were built from"
    )
