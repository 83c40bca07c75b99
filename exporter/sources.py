"""Opens a model: an ONNX file, a model folder, or a checkpoint, which is exported first and cached."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..graphs.errors import GuardError, ModelUnreadable, OutputRefused
from ..graphs.layouts import open_package
from ..graphs.manifest import MANIFEST_NAME
from ..graphs.modes import guard_mode
from ..graphs.package import COMPANIONS, ModelPackage
from ..graphs.places import is_checkpoint
from ..graphs.progress import ProgressCallback
from ..graphs.proof.structure import Check
from ..runtime.vlm import VisionLanguageModel
from .checkpoints.cache import exported
from .checkpoints.convert import locate, read_config
from .choices import Precision
from .families import find_family

# (what is going on, done, of how many)


@dataclass(frozen=True)
class Source:
    """An opened model.

    Attributes:
        package: its graphs; a checkpoint's are in a temporary folder or the cache.
        name: base of the default OUT name.
        beside: parent of the default OUT.
        home: the user's model folder, which is searched for prompts and directions (`find_file`).
        parity: the comparison of a checkpoint's export with torch, if it was made.
    """

    package: ModelPackage
    name: str
    beside: Path
    home: Path
    parity: tuple[Check, ...] = ()


@contextlib.contextmanager
def opened(
    model: Path | str,
    variant: str | None,
    report_progress: ProgressCallback,
    dtype: Precision | None = None,
    opset: int | None = None,
    exporter: str | None = None,
    cache: bool = True,
) -> Iterator[Source]:
    """Open a model; a checkpoint is exported first, or taken from the cache of exports (`checkpoints.cache`).

    Args:
        model: a file, a folder or a hub id.
        variant: precision variant of an onnx-community folder.
        report_progress: called with `(stage, done, total)`.
        dtype: precision of a checkpoint's graphs, one of `Precision`.
        opset: ONNX opset of a checkpoint's graphs.
        exporter: exporter of a checkpoint.
        cache: whether a checkpoint's export is taken from the cache, and kept there.

    Raises:
        GuardError: an option was given that this kind of model has no use for.
    """
    path = Path(model)
    if is_checkpoint(model):
        if variant is not None:
            raise GuardError(f"--variant {variant} is for onnx-community folders, {model} is a checkpoint; use --dtype")
        with exported(model, exporter, dtype, opset, report_progress, cache) as export:
            beside = path.absolute().parent if path.is_dir() else Path.cwd()
            # a hub id has no local folder to search
            home = path.absolute() if path.is_dir() else export.folder
            yield Source(open_package(export.folder), path.absolute().name, beside, home, export.parity)
        return
    if dtype is not None or opset is not None:
        raise GuardError(f"--dtype and --opset are for checkpoints, {model} is ONNX already; leave them out")
    if not cache:
        raise GuardError(f"--no-cache is for checkpoints, {model} is ONNX already; leave it out")
    if exporter is not None:
        raise GuardError(f"--exporter {exporter} is for checkpoints, {model} is ONNX already; leave it out")
    package = open_package(path, variant)
    beside = package.root if package.layout == "bare" else package.root.parent
    yield Source(package, package.name, beside, package.root)


def above(package: ModelPackage) -> dict[str, Path]:
    """Files of a bare model that lie in the folder above its own: name -> absolute path."""
    if package.layout != "bare":
        return {}
    paths = filter(None, map(package.companion, COMPANIONS))
    return {path.name: path for path in paths if path.parent != package.root}


def require_apart(target: Path, model: Path, package: ModelPackage) -> None:
    """OUT must not be, hold or (where the whole folder is the model) lie in the model: the input is never changed.

    Raises:
        OutputRefused: it does.
    """
    out = target.resolve()
    for source in {package.root.resolve(), model.resolve()} if model.exists() else {package.root.resolve()}:
        folder = source if source.is_dir() else source.parent
        inside = folder in out.parents and package.layout != "bare"
        if out == folder or out in folder.parents or inside:
            raise OutputRefused(
                f"{target}: would overwrite or lie inside the model {folder}; choose a folder beside it"
            )


def require_images_for(mode: str | None, model: Path | str) -> None:
    """A mode that compares a prompt with an image to the same words without it has images to work on.

    Known of checkpoints alone: an ONNX text decoder may be one part of a model that takes images.

    Raises:
        GuardError: the checkpoint is a text-only model.
    """
    if mode is None or not guard_mode(mode).toward_text or not is_checkpoint(model):
        return
    if not find_family(read_config(locate(model)), str(model)).takes_images:
        raise GuardError(
            f"{model}: takes no images, so mode {mode} would compare each prompt with itself; for a text-only model choose "
            "--mode restore (calibrated), or steer or project along given directions"
        )


def require_unmarked(model: Path | str) -> None:
    """Require that a model given as unguarded is not a guarded folder.

    Raises:
        GuardError: it has a manifest.
    """
    if (Path(model) / MANIFEST_NAME).is_file():
        raise GuardError(f"{model}: is guarded (it has a {MANIFEST_NAME}); give the model that it was made from")


def open_model(model: Path | str, variant: str | None = None) -> VisionLanguageModel:
    """A model folder or file, running, unguarded or guarded, without looking at any manifest.

    Raises:
        ModelUnreadable: it is a checkpoint, or cannot be opened.
    """
    if is_checkpoint(model):
        raise ModelUnreadable(f"{model}: is a checkpoint, not ONNX; convert it first with `vlmguard convert`")
    return VisionLanguageModel(open_package(model, variant))
