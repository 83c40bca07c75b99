"""Places to search for files, and checks that paths typed by the user exist.

Needs the standard library alone: a typo is refused before seconds of imports.
"""

from __future__ import annotations

from pathlib import Path

from .errors import GuardError, ManifestMismatch, ModelUnreadable

# A model folder with one of these names is a part of the model: the folder above it is the model's own root.
_PARTS_OF_A_MODEL = ("onnx", "onnx-community", "genai", "checkpoint")


def model_folders(folder: Path) -> tuple[Path, ...]:
    """The folders that belong to the model in `folder`: itself, and the one above if `folder` is named as a part of it."""
    folder = folder.absolute()
    return (folder, folder.parent) if folder.name in _PARTS_OF_A_MODEL else (folder,)


def is_checkpoint(model: Path | str) -> bool:
    """Whether it is a Hugging Face checkpoint folder (config and weights, no ONNX), or can only be a hub id."""
    path = Path(model)
    if path.is_dir():
        has_graphs = any(path.glob("*.onnx")) or (path / "onnx").is_dir() or (path / "genai_config.json").is_file()
        return not has_graphs and (path / "config.json").is_file()
    text = str(model)
    return (
        not path.exists() and text.count("/") == 1 and not text.startswith((".", "/", "~")) and path.suffix != ".onnx"
    )


def require_model(model: Path | str) -> None:
    """There is a file or folder of that name, or the name can be a hub id.

    Raises:
        ModelUnreadable: neither.
    """
    path = Path(model)
    if not path.exists() and not is_checkpoint(model):
        raise ModelUnreadable(f"{path.absolute()}: no such file or folder; give a .onnx file or a model folder")


def require_guarded_folder(folder: Path, manifest: str = "guard.json") -> None:
    """There is a folder of that name with a manifest in it.

    Raises:
        ManifestMismatch: there is none.
    """
    if folder.is_file():
        raise ManifestMismatch(f"{folder}: is a file; give the guarded folder that it lies in")
    if not folder.is_dir():
        raise ManifestMismatch(f"{folder}: no such folder; give one that `vlmguard-export` wrote")
    if not (folder / manifest).is_file():
        raise ManifestMismatch(f"{folder}: has no {manifest}, so it is not a guarded folder; export it first")


# Messages for missing input files, with the way to create them.
CONFIG = "no such config file; a calibrating export writes one, guard.toml"
DIRECTIONS = "no such directions file; extract one with `vlmguard directions`"
PROOF_INPUTS = "no such file of proof inputs; write one with numpy.savez"
KEY = "no such key file; give the path of a PEM file"


def require_file(path: Path, missing: str, kind: type[GuardError] = GuardError) -> None:
    """The path is a file.

    Args:
        missing: the sentence's end where it is not.
        kind: the error's class.

    Raises:
        GuardError: it is missing, or a folder.
    """
    if path.is_dir():
        raise kind(f"{path}: is a folder; give a file")
    if not path.is_file():
        raise kind(f"{path}: {missing}")


def expanded(path: Path) -> Path:
    """The path with a leading `~` or `~user` replaced by that user's home folder.

    Raises:
        GuardError: there is no such user, or `~` stands for a folder further on.
    """
    try:
        path = path.expanduser()
    except RuntimeError:
        raise GuardError(
            f"{path}: {path.parts[0]} names no user of this machine; write the folder's full path"
        ) from None
    require_no_tilde(path)
    return path


def require_no_tilde(path: Path) -> None:
    """No part of the path is a literal `~`, which a shell did not replace.

    Raises:
        GuardError: one is.
    """
    if "~" in path.parts:
        raise GuardError(
            f"{path}: has a folder named ~, which a shell would not reach; write the home folder's full path"
        )
