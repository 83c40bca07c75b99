"""Where a model comes from: an ONNX file, a model folder, or a checkpoint that is exported to a temporary folder first."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ..graphs.errors import ModelUnreadable, OutputRefused
from ..graphs.package import ModelPackage, open_package
from ..runtime.vlm import VisionLanguageModel
from .checkpoint import Dtype, convert_checkpoint

# (what is going on, done, of how many)
Watch = Callable[[str, int, int], None]


def unwatched(stage: str, done: int, total: int) -> None:
    """Nobody is looking."""


@contextlib.contextmanager
def opened(
    model: Path | str, variant: str | None, dtype: Dtype, opset: int | None, tell: Watch
) -> Iterator[tuple[ModelPackage, str, Path]]:
    """`(package, name, folder beside which OUT goes)`; a checkpoint is exported to a temporary folder first."""
    path = Path(model)
    if is_checkpoint(model):
        with tempfile.TemporaryDirectory(prefix="vlmguard-") as temporary:
            folder = Path(temporary) / "onnx-community"
            convert_checkpoint(model, folder, dtype=dtype, opset=opset, progress=lambda stage: tell(stage, 0, 1))
            beside = path.absolute().parent if path.is_dir() else Path.cwd()
            yield open_package(folder), path.absolute().name, beside
        return
    package = open_package(path, variant)
    if package.layout == "bare":
        yield package, package.name, package.root
    else:
        yield package, package.name, package.root.parent


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


def is_checkpoint(model: Path | str) -> bool:
    """A Hugging Face checkpoint folder (config and weights, no ONNX), or something that can only be a hub id."""
    path = Path(model)
    if path.is_dir():
        has_graphs = any(path.glob("*.onnx")) or (path / "onnx").is_dir() or (path / "genai_config.json").is_file()
        return not has_graphs and (path / "config.json").is_file()
    text = str(model)
    return (
        not path.exists() and text.count("/") == 1 and not text.startswith((".", "/", "~")) and path.suffix != ".onnx"
    )


def open_model(model: Path | str, variant: str | None = None) -> VisionLanguageModel:
    """A model folder or file, running, unguarded or guarded, without looking at any manifest.

    Raises:
        ModelUnreadable: it is a checkpoint, or cannot be opened.
    """
    if is_checkpoint(model):
        raise ModelUnreadable(f"{model}: is a checkpoint, not ONNX; convert it first with `vlmguard convert`")
    return VisionLanguageModel(open_package(model, variant))
