"""The files of a guarded folder, against the list in its manifest: the same names, one file each, and nothing beside them
that a runtime would load.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from .errors import ManifestMismatch
from .graph_content import is_graph
from .package import COMPANIONS, SIGNATURE_NAME

# Programs, in the languages that runtimes load by themselves.
CODE = frozenset({".so", ".dll", ".dylib", ".py", ".pyc", ".pyd", ".pbtxt"})
# Weights that are not a graph's: a loader of checkpoints would take them, and they are unguarded.
CHECKPOINTS = frozenset(
    {".safetensors", ".gguf", ".ggml", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".tflite"}
)
# Triton runs a model's own in the place of its Python.
_STUB = "triton_python_backend_stub"
_TEXT_PARTS = (
    "tokenizer",
    "tokenization",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "preprocessor",
    "processor",
    "image_processor",
    "video_preprocessor",
    "audio_processor",
    "feature_extractor",
    "chat_template",
    "generation",
    "sentencepiece",
    "spiece",
)
_TEXT_SUFFIXES = frozenset({".jinja", ".jinja2", ".tiktoken", ".spm"})
_READ_BY_PEOPLE = ("README", "LICENSE")
_OWN = frozenset({"guard.json", SIGNATURE_NAME})


def require_plain_names(folder: Path, manifest_path: Path, names: Collection[str]) -> None:
    """Every name in a manifest is the one name of one file below the folder, on every file system.

    Raises:
        ManifestMismatch: which name is not.
    """
    seen: dict[str, str] = {}
    for name in names:
        if Path(name).is_absolute() or ".." in PurePosixPath(name).parts or ":" in name.split("/")[0]:
            raise ManifestMismatch(f"{manifest_path}: lists a file outside the folder ({name}); export again")
        if not name or "\\" in name or "\0" in name or PurePosixPath(name).as_posix() != name or name == ".":
            raise ManifestMismatch(f"{manifest_path}: lists {name!r}, which is no plain relative path; export again")
        alike = unicodedata.normalize("NFC", name).casefold()
        if alike in seen:
            raise ManifestMismatch(
                f"{manifest_path}: lists {seen[alike]!r} and {name!r}, which are one file on some systems; export again"
            )
        seen[alike] = name
    if _OWN & set(names):
        raise ManifestMismatch(f"{manifest_path}: lists itself or the signature; export again")


def require_nothing_beside(folder: Path, names: Collection[str], besides: str = "") -> None:
    """No file that a runtime would load stands beside the listed ones, and no link leads to more.

    Args:
        besides: pattern of files that may have been added.

    Raises:
        ManifestMismatch: which file was added.
    """
    listed = {unicodedata.normalize("NFC", name).casefold(): name for name in names}
    added = []
    for path, name in _walk(folder):
        if path.is_symlink() and not path.is_file():
            raise ManifestMismatch(f"{folder}: {name} is a link to a folder or to nothing; remove it, or export again")
        alike = listed.get(unicodedata.normalize("NFC", name).casefold())
        if name in names or name in _OWN:
            continue
        if alike is not None or (is_read(path, name) and not fnmatchcase(name, besides)):
            added.append(name)
    if added:
        raise ManifestMismatch(f"{folder}: {min(added)} was added after the proof; remove it, or export again")


def is_read(path: Path, name: str) -> bool:
    """Whether some runtime would run a file or go by it: a model, a program, a template, a tokenizer's part."""
    suffix, lower = path.suffix.lower(), path.name.lower()
    if suffix in CODE or suffix in CHECKPOINTS or suffix in _TEXT_SUFFIXES or path.name == _STUB:
        return True
    if path.name in COMPANIONS:
        return not path.name.startswith(_READ_BY_PEOPLE)
    if lower.startswith(_TEXT_PARTS) and suffix in {"", ".json", ".txt", ".model"}:
        return True
    return not name.startswith(".git/") and path.is_file() and is_graph(path)


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every file and every link below a folder, hidden ones too; links are not followed."""
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        for entry in sorted(files) + [name for name in sorted(folders) if (here / name).is_symlink()]:
            path = here / entry
            yield path, path.relative_to(folder).as_posix()
