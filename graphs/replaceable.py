"""Folders that `--force` may delete: those written by vlmguard, and model layouts with nothing else in them.

A folder with a manifest (guarded graphs, engines, packaged layouts) or with a record of `vlmguard convert` may hold the
files listed there. Any other folder may hold graphs, their weights and the files that go with a model, at its top or in
`onnx/`. One foreign file, such as notes or sources, and the folder stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ModelUnreadable, OutputRefused
from .graph_io import external_files
from .package import COMPANIONS

WRITTEN_NAME = ".vlmguard.json"  # hidden: no layout takes it along
_WRITTEN_SCHEMA = "vlmguard.written/1"
_MANIFEST_NAME, _MANIFEST_SCHEMAS = "guard.json", "vlmguard.guard/"
_BESIDE_MANIFEST = (_MANIFEST_NAME, "guard.toml", "model.sig")  # what we write and do not list
_LAYOUT_FOLDERS = (Path(), Path("onnx"))
_GRAPHS = re.compile(r".+\.(onnx|ort)(_data\w*|\.data|\.guard\.data)?")
_CONFIGS = ("export.json", "ort_config.json", "quantize_config.json")
_LARGEST_RECORD = 64 << 20  # bytes


def written_record(folder: Path) -> bytes:
    """The content of `WRITTEN_NAME`: what a finished folder without a manifest holds."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return (json.dumps({"schema": _WRITTEN_SCHEMA, "files": files}, indent=1) + "\n").encode()


def require_replaceable(folder: Path) -> None:
    """`--force` may delete the folder: it is empty, ours, or a model layout and nothing else.

    Raises:
        OutputRefused: it holds another file, the first of which is named.
    """
    foreign = foreign_file(folder)
    if foreign is not None:
        raise OutputRefused(
            f"{folder}: holds {foreign}, which is no part of a model that vlmguard wrote, and --force would delete it; "
            "choose another OUT"
        )


def foreign_file(folder: Path) -> str | None:
    """The first file that is neither ours nor a model layout's, relative to the folder; `None`: the folder is replaceable."""
    listed = _listed(folder)
    if listed is not None:
        return next((name for name in _files(folder) if name not in listed), None)
    unknown = (name for name in _files(folder) if not _has_a_layouts_name(Path(name)))
    data = None
    for name in unknown:
        data = _external_data(folder) if data is None else data
        if name not in data:
            return name
    graphs = any(next((folder / place).glob("*.onnx"), None) for place in _LAYOUT_FOLDERS)
    return None if graphs else next(_files(folder), None)  # configs without a graph are a checkpoint's


def _listed(folder: Path) -> set[str] | None:
    """Files listed in the folder's manifest or record, and these themselves; `None` without a valid one."""
    manifest = _object(folder / _MANIFEST_NAME)
    if str(manifest.get("schema")).startswith(_MANIFEST_SCHEMAS) and isinstance(manifest.get("files"), dict):
        return {*manifest["files"], *_BESIDE_MANIFEST}
    record = _object(folder / WRITTEN_NAME)
    if record.get("schema") == _WRITTEN_SCHEMA and isinstance(record.get("files"), list):
        return {*map(str, record["files"]), WRITTEN_NAME}
    return None


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `{}` where there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= _LARGEST_RECORD:
            content = json.loads(path.read_text(encoding="utf-8"))
            return content if isinstance(content, dict) else {}
    return {}


def _files(folder: Path) -> Iterator[str]:
    """Every file, link and special file below the folder, relative to it; a folder's own files before its subfolders'.

    Read as it is consumed: a search for one foreign file ends at the first.
    """
    for place, subfolders, names in os.walk(folder):
        subfolders.sort()
        linked = [name for name in subfolders if (Path(place) / name).is_symlink()]  # os.walk does not enter them
        for name in sorted([*names, *linked]):
            yield (Path(place) / name).relative_to(folder).as_posix()


def _has_a_layouts_name(path: Path) -> bool:
    known = path.name in COMPANIONS or path.name in _CONFIGS or _GRAPHS.fullmatch(path.name) is not None
    return path.parent in _LAYOUT_FOLDERS and known


def _external_data(folder: Path) -> set[str]:
    """External data of the folder's graphs, under whatever names they keep it."""
    found: set[str] = set()
    for graph in (path for place in _LAYOUT_FOLDERS for path in sorted((folder / place).glob("*.onnx"))):
        with contextlib.suppress(ModelUnreadable):
            found |= {data.relative_to(folder.absolute()).as_posix() for data in external_files(graph)}
    return found
