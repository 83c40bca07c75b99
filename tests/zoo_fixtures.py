"""The `zoo` fixture: real exported decoders by name. A conftest takes it with `from zoo_fixtures import zoo`.

Exporting all of them takes about 100 seconds. `VLMGUARD_ZOO=some/folder pytest` keeps them there for the next session,
apart for every version of the exporters and of the makers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import pytest
from zoo.generation_folders import FOLDERS, GenerationFolder
from zoo.model import ZooModel
from zoo.table import ALL_MAKERS, MODULES, module_of

Made = TypeVar("Made")
EXPORTERS = ("torch", "transformers", "onnxscript", "onnx-ir", "onnxruntime-genai", "onnxruntime")


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ZooModel]:
    """`zoo("llama-genai-fp32")`: exported on first use, then kept. Tests must not write into its folder.

    With pytest-xdist the workers share the folders: one exports, the others wait and read.
    """
    return _lending(_homes(tmp_path_factory), ALL_MAKERS, module_of)


@pytest.fixture(scope="session")
def generation_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], GenerationFolder]:
    """`generation_folders("llava-generation")`: the same for whole folders."""
    return _lending(_homes(tmp_path_factory), FOLDERS, lambda _: "generation_folders")


def _homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where each maker module keeps its exports."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers.exporters")
    if kept := os.environ.get("VLMGUARD_ZOO"):
        root = Path(kept).resolve()
    else:
        base = tmp_path_factory.getbasetemp()
        root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "zoo"
    return {module: root / f"{module}-{_digest(module)}" for module in MODULES}


def _lending(
    homes: Mapping[str, Path], makers: Mapping[str, Callable[[Path], Made]], module_of: Callable[[str], str]
) -> Callable[[str], Made]:
    from filelock import FileLock  # torch depends on it

    made: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in makers:
            raise KeyError(f"no model {name!r} in the zoo; there are {', '.join(makers)}")
        if "genai" in name and importlib.util.find_spec("onnxruntime_genai") is None:
            pytest.skip("onnxruntime-genai is not installed")
        if name not in made:
            home = homes[module_of(name)]
            home.mkdir(parents=True, exist_ok=True)
            with FileLock(home / f"{name}.lock"):
                made[name] = makers[name](home / name)
        return made[name]

    return get


def _digest(module: str) -> str:
    """Of everything that decides what a maker module's exports look like."""
    digest = hashlib.sha256()
    for source in ("exporting.py", *MODULES[module]):
        digest.update(Path(__file__).with_name("zoo").joinpath(source).read_bytes())
    for package in EXPORTERS:
        try:
            digest.update(f"{package} {importlib.metadata.version(package)}".encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(f"no {package}".encode())
    return digest.hexdigest()[:16]
