"""The `zoo` fixture: real exported decoders by name. A conftest takes it with `from zoo_fixtures import zoo`.

Exporting all of them takes about 100 seconds. `VLMGUARD_ZOO=some/folder pytest` keeps them there for the next session,
apart for every version of the exporters and of the makers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from zoo.makers import MAKERS, ZooModel

EXPORTERS = ("torch", "transformers", "onnxscript", "onnx-ir", "onnxruntime-genai")


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ZooModel]:
    """`zoo("llama-genai-fp32")`: exported on first use, then kept. Tests must not write into its folder.

    With pytest-xdist the workers share the folders: one exports, the others wait and read.
    """
    pytest.importorskip("torch")
    pytest.importorskip("transformers.exporters")
    from filelock import FileLock  # torch depends on it

    if kept := os.environ.get("VLMGUARD_ZOO"):
        root = Path(kept).resolve() / _digest()
    else:
        base = tmp_path_factory.getbasetemp()
        root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "zoo"
    root.mkdir(parents=True, exist_ok=True)
    made: dict[str, ZooModel] = {}

    def get(name: str) -> ZooModel:
        if name not in MAKERS:
            raise KeyError(f"no model {name!r} in the zoo; there are {', '.join(MAKERS)}")
        if "genai" in name and importlib.util.find_spec("onnxruntime_genai") is None:
            pytest.skip("onnxruntime-genai is not installed")
        if name not in made:
            with FileLock(root / f"{name}.lock"):
                made[name] = MAKERS[name](root / name)
        return made[name]

    return get


def _digest() -> str:
    """Of everything that decides what an export looks like."""
    digest = hashlib.sha256()
    for source in ("makers.py", "truth.py"):
        digest.update(Path(__file__).with_name("zoo").joinpath(source).read_bytes())
    for package in EXPORTERS:
        try:
            digest.update(f"{package} {importlib.metadata.version(package)}".encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(f"no {package}".encode())
    return digest.hexdigest()[:16]
