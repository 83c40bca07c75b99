"""Classes of transformers by their names."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def transformers_class(name: str) -> Any:
    """The class of this name, from the package's own table of lazy imports.

    A type checker that sees `import transformers` reads every model in it, which takes longer than all of vlmguard: types come
    from the modules that define them, `transformers.cache_utils` and so on.
    """
    return getattr(import_module("transformers"), name)


def saved_class(config: Mapping[str, Any], model_class: Any) -> Any:
    """The class that reads a checkpoint's weights: `model_class`, or one around it.

    transformers lists ShieldGemma 2 as Gemma 3, and no weight of its checkpoints has a name that Gemma 3 knows: they are those
    of a classifier that has the model as a part.

    Args:
        config: the parsed `config.json`.
        model_class: the class that transformers lists for its `model_type`.
    """
    if config.get("model_type") == model_class.config_class.model_type:
        return model_class
    named = next(iter(config.get("architectures") or ()), "")
    around = getattr(import_module("transformers"), named, None) if isinstance(named, str) else None
    is_own = getattr(getattr(around, "config_class", None), "model_type", None) == config.get("model_type")
    return around if is_own else model_class
