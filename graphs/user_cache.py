"""The user's cache folder: exports of checkpoints, what TensorRT-RTX compiled, and the playground's libraries.

It is the platform's, or `VLMGUARD_CACHE`; an empty value turns the cache off.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

CACHE = "VLMGUARD_CACHE"


def cache_folder() -> Path | None:
    """The cache of this user, which may not exist yet; `None` where `VLMGUARD_CACHE` turns it off."""
    named = os.environ.get(CACHE)
    if named is not None:
        return Path(named).expanduser().absolute() if named else None
    if sys.platform == "win32":
        home = os.environ.get("LOCALAPPDATA")
        return (Path(home) if home else Path.home() / "AppData" / "Local") / "vlmguard" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "vlmguard"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmguard"
