"""The site: which address has which file. The page's own files, its libraries, the model, the samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .page_server import Served, Site

_PAGE = Path(__file__).with_name("page")

# The page's imports, by the names in its modules.
_LIBRARY_ADDRESSES = {
    "@huggingface/tokenizers": {"dist/tokenizers.min.mjs": "tokenizers.mjs"},
    "@huggingface/jinja": {"dist/index.js": "jinja.mjs"},
}


def make_site(libraries: Mapping[tuple[str, str], Path], model: Mapping[str, bytes | Path]) -> Site:
    """Everything that is served.

    Args:
        libraries: as `find_libraries` found them.
        model: address below `/model/` -> what is there.
    """
    site = {f"/{path.name}": Served(path) for path in sorted(_PAGE.iterdir()) if path.is_file()}
    site["/"] = site["/index.html"]
    for (name, file), path in libraries.items():
        address = _LIBRARY_ADDRESSES.get(name, {}).get(file, file.rpartition("/")[2])
        site[f"/lib/{address}"] = Served(path)
    return site | {f"/model/{address}": Served(content) for address, content in model.items()}
