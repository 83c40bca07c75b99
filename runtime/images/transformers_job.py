"""transformers' own image processors, in their Pillow half: what runs in the confined process of `transformers_pictures`.

Only the package's own classes are run, never code from a model's folder. torch and torchvision are left out even where they are
installed, so that a picture gives the same numbers everywhere, and the process starts in a second.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from ...graphs.errors import GuardError

_LEFT_OUT: Any = None  # in place of a module: Python then finds none of that name


def describe(kind: str, declared: Mapping[str, Any]) -> dict[str, Any]:
    """The `size` of a processor with these options: `{"height", "width"}`, or empty where it has another kind of size.

    Raises:
        GuardError: no Pillow half of such a class exists in transformers.
    """
    size = getattr(_processor(kind, declared), "size", None) or {}
    sides = ("height", "width")
    numbers = {side: size.get(side) if isinstance(size, Mapping) else getattr(size, side, None) for side in sides}
    return {side: int(number) for side, number in numbers.items() if number}


def prepare(
    kind: str, declared: Mapping[str, Any], call: Mapping[str, Any], image: Image.Image
) -> dict[str, np.ndarray]:
    """The processor's outputs for one picture, by name.

    Args:
        kind: name of the class, without `Fast` and `Pil`.
        declared: the options of the folder.
        call: further arguments of the call.
        image: RGB.
    """
    found = _processor(kind, declared)(images=[image], return_tensors="np", **call)
    arrays = {name: np.asarray(values) for name, values in found.items()}
    return {name: array for name, array in arrays.items() if array.dtype.kind in "fiub"}


def _processor(kind: str, declared: Mapping[str, Any]) -> Any:
    for name in ("torch", "torchvision"):
        sys.modules.setdefault(name, _LEFT_OUT)
    from transformers.models.auto import image_processing_auto as auto

    table: Mapping[str, Mapping[str, str | None]] = auto.IMAGE_PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]
    names = (
        halves.get("pil")
        for halves in table.values()
        if kind in (halves.get("torchvision"), (halves.get("pil") or "").removesuffix("Pil"))
    )
    name = next(filter(None, names), None)
    if name is None:
        raise GuardError("transformers has no class of that name that works without torchvision")
    options = {key: value for key, value in declared.items() if key not in ("auto_map", "image_processor_type")}
    found: Any = auto.get_image_processor_class_from_name(name)
    return found.from_dict(options)
