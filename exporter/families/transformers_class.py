"""Classes of transformers by their names."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def transformers_class(name: str) -> Any:
    """The class of this name, from the package's own table of lazy imports.

    A type checker that sees `import transformers` reads every model in it, which takes longer than all of vlmguard: types come
    from the modules that define them, `transformers.cache_utils` and so on.
    """
    return getattr(import_module("transformers"), name)
