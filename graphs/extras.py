"""The command that installs an optional dependency of this package, as it works on this machine.

The package may have come from a clone, a repository, a file or an index. `pip install "vlmguard[cpu]"` works for the last
alone, so every message that names an extra takes its command from here.
"""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

Extra = Literal[
    "cpu",
    "gpu",
    "images",
    "torch",
    "genai",
    "tensorrt",
    "rtx",
    "report",
    "ray",
    "serve",
    "sign",
    "sbom",
    "optimum",
    "fuzz",
    "test",
]  # as in pyproject.toml, which a test compares

_PACKAGE = "vlmguard"
_FOLDER = Path(__file__).resolve().parents[1]


def install_command(*extras: Extra) -> str:
    """A shell command that adds these extras to this installation, for example `pip install -e '/src/vlmguard[cpu]'`."""
    wanted = f"[{','.join(extras)}]"
    if (_FOLDER / "pyproject.toml").is_file():  # a clone: the folders at its top are the package
        return f"pip install -e {shlex.quote(f'{_FOLDER}{wanted}')}"
    url = _direct_url()
    return f"pip install {shlex.quote(f'{_PACKAGE}{wanted}' + (f' @ {url}' if url else ''))}"


def _direct_url() -> str | None:
    """The requirement from which pip installed this package; `None` for a package index (PEP 610)."""
    try:
        recorded = distribution(_PACKAGE).read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    if recorded is None:
        return None
    origin = json.loads(recorded)
    vcs = origin.get("vcs_info")
    return f"{vcs['vcs']}+{origin['url']}@{vcs['commit_id']}" if vcs else origin["url"]
