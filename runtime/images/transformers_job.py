"""transformers' own image processors: what runs in the confined processes of `transformers_pictures`.

Only the package's own classes are run, never code from a model's folder. Most have a Pillow half. For it torch and torchvision
are left out even where they are installed, so that a picture gives the same numbers everywhere, and the process starts in a
second.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from ...graphs.errors import GuardError

_LEFT_OUT: Any = None  # in place of a module: Python then finds none of that name


def describe(kind: str, half: str, declared: Mapping[str, Any]) -> dict[str, Any]:
    """The `size` of a processor with these options: `{"height", "width"}`, or empty where it has another kind of size.

    Raises:
        GuardError: no such half of such a class exists in transformers, or it returns no `pixel_values` (Fuyu's returns images,
            which another class cuts into patches).
    """
    processor = _processor(kind, half, declared)
    if not any("pixel_values" in name for name in processor.model_input_names):
        raise GuardError(f"it returns {processor.model_input_names[0]} and no pixel_values")
    size = getattr(processor, "size", None) or {}
    sides = ("height", "width")
    numbers = {side: size.get(side) if isinstance(size, Mapping) else getattr(size, side, None) for side in sides}
    return {side: int(number) for side, number in numbers.items() if number}


def prepare(
    kind: str, half: str, declared: Mapping[str, Any], call: Mapping[str, Any], image: Image.Image
) -> dict[str, np.ndarray]:
    """The processor's outputs for one picture, by name.

    Args:
        kind: name of the class, without `Fast` and `Pil`.
        half: `pil` or `torchvision`, always the same one in one process.
        declared: the options of the folder.
        call: further arguments of the call.
        image: RGB.
    """
    returned = "np" if half == "pil" else "pt"
    found = _processor(kind, half, declared)(images=[image], return_tensors=returned, **call)
    arrays = {name: _array(values) for name, values in found.items()}
    return {name: array for name, array in arrays.items() if array.dtype.kind in "fiub"}


def _array(values: Any) -> np.ndarray:
    """An array of numbers, or of tensors; float32 where numpy lacks a tensor's type."""
    is_float = getattr(values, "is_floating_point", bool)
    return np.asarray(values.float() if is_float() else values)


def _processor(kind: str, half: str, declared: Mapping[str, Any]) -> Any:
    for name in ("torch", "torchvision") if half == "pil" else ():
        sys.modules.setdefault(name, _LEFT_OUT)
    from transformers.models.auto import image_processing_auto as auto

    table: Mapping[str, Mapping[str, str | None]] = auto.IMAGE_PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]
    rows = [
        row for row in table.values() if kind in (row.get("torchvision"), (row.get("pil") or "").removesuffix("Pil"))
    ]
    name = next(filter(None, (row.get(half) for row in rows)), None)
    if name is None:
        without = " that works without torchvision" if rows and half == "pil" else ""
        raise GuardError(f"transformers has no class of that name{without}")
    options = {key: value for key, value in declared.items() if key not in ("auto_map", "image_processor_type")}
    found: Any = auto.get_image_processor_class_from_name(name)
    return found.from_dict(options)
