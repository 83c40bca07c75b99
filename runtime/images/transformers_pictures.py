"""Pictures by transformers' own image processors, for the types that have none in numpy here. An optional extra.

The processors run in a confined process (`confined`): their options come from the model's folder, which is untrusted. Where a
class has no half that works with Pillow alone, its other half is run if torch and torchvision are installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ...graphs.errors import GuardError, ModelUnreadable
from ...graphs.extras import install_command
from ...graphs.json_files import read_json
from ..confined import TORCHVISION, TRANSFORMERS, ConfinedFailure
from .array_frames import unpacked
from .pixel_steps import declared_processor, processor_name
from .prepared_picture import PreparedPicture

# Arguments of the image processor besides the picture, by `processor_class`.
_CALLS: Mapping[str, Mapping[str, Any]] = {
    "AriaProcessor": {"max_image_size": 980, "split_image": False},
    "DeepseekOcr2Processor": {"crop_to_patches": True, "min_patches": 2, "max_patches": 6},
}
Half = Literal["pil", "torchvision"]
_TORCH = ("torch", "torchvision")
_POOLS = {"pil": TRANSFORMERS, "torchvision": TORCHVISION}
_USUAL = {"height": 448, "width": 448}  # of a blank picture, where the processor has no fixed size


@dataclass(frozen=True)
class TransformersPreprocessor:
    """A processor of transformers. Made by `open`.

    Attributes:
        folder: of the model, for errors.
        kind: name of the class, without `Fast` and `Pil`.
        declared: its options.
        call: further arguments of each call.
        size: height and width of a blank picture.
        half: `pil`, or `torchvision` where the class has no other half.
    """

    folder: Path
    kind: str
    declared: Mapping[str, Any]
    call: Mapping[str, Any]
    size: Mapping[str, int]
    half: Half = "pil"

    keeps_count = False

    @classmethod
    def open(cls, folder: Path | str) -> TransformersPreprocessor:
        """The folder's image processor, tried once.

        Raises:
            ModelUnreadable: it cannot be run here: transformers is not installed, has no such class that runs without
                torchvision, or cannot follow the options.
        """
        folder = Path(folder)
        declared = dict(declared_processor(folder))
        kind = processor_name(declared)
        if find_spec("transformers") is None:
            raise ModelUnreadable(
                f"{folder}: its image processor {kind} runs with transformers, which is not installed; run "
                f"`{install_command('images')}`, or use text-only prompts"
            )
        try:
            half, size = _working_half(kind, declared)
        except (GuardError, ConfinedFailure) as error:
            missing = [name for name in _TORCH if find_spec(name) is None] if "torch" in str(error).lower() else []
            install = f"install {' and '.join(missing)}, " if missing else ""
            raise ModelUnreadable(
                f"{folder}: its image processor {kind} cannot be run here ({error}); {install}"
                "prepare its inputs elsewhere, or use text-only prompts"
            ) from None
        call = _CALLS.get(str(read_json(folder / "processor_config.json").get("processor_class")), {})
        return cls(folder, kind, declared, call, size if len(size) == len(_USUAL) else _USUAL, half)

    def prepare(self, image: Image.Image, alone: bool = True) -> PreparedPicture:
        """Whatever the processor gives."""
        header = {"kind": self.kind, "half": self.half, "declared": self.declared, "call": self.call}
        try:
            reply, content = _POOLS[self.half].run("prepare", {**header, "size": image.size}, image.tobytes())
        except ConfinedFailure as error:
            raise GuardError(
                f"{self.folder}: its image processor {self.kind} cannot take the image ({error}); send another one"
            ) from None
        arrays = unpacked(reply["arrays"], content)
        grid, sizes = _cut(arrays)
        return PreparedPicture(arrays, grid, sizes)

    def blank_image(self) -> Image.Image:
        """A white picture of the processor's size."""
        return Image.new("RGB", (self.size["width"], self.size["height"]), "white")


def _working_half(kind: str, declared: Mapping[str, Any]) -> tuple[Half, Mapping[str, int]]:
    """The half of a class to run, and what `_described` returns for it."""
    try:
        return "pil", _described(kind, "pil", declared)
    except (GuardError, ConfinedFailure):
        if any(find_spec(name) is None for name in _TORCH):
            raise
        return "torchvision", _described(kind, "torchvision", declared)


def _described(kind: str, half: Half, declared: Mapping[str, Any]) -> Mapping[str, int]:
    """The processor's `size`, if it has a height and a width."""
    return _POOLS[half].run("describe", {"kind": kind, "half": half, "declared": declared})[0]["size"]


def _cut(arrays: Mapping[str, np.ndarray]) -> tuple[tuple[int, int] | None, tuple[int, ...]]:
    """Rows and columns of a picture's tiles, and the relative sizes of its parts, if the processor returns them.

    Idefics3's kind gives `rows` and `cols`, Idefics2 only its parts. Ovis2 and MiniCPM-V give `grids`, the latter with the
    patches of each part.
    """
    pixels = arrays.get("pixel_values")  # Video-LLaVA's have another name, and no tiles
    if pixels is None:
        return None, ()
    if "rows" in arrays and "cols" in arrays:
        grid = int(arrays["rows"].flat[0]), int(arrays["cols"].flat[0])
    elif "grids" in arrays:
        grid = int(arrays["grids"].flat[0]), int(arrays["grids"].flat[1])
    elif pixels.ndim == 5 and pixels.shape[1] > 1:  # Idefics2's four quarters and the whole
        grid = 1, pixels.shape[1]
    else:
        return None, ()
    if grid[0] * grid[1] == 0 or ("grids" in arrays and grid == (1, 1)):
        return None, ()
    if "target_sizes" in arrays:
        return grid, tuple(int(size) for size in arrays["target_sizes"].prod(axis=-1))
    parts = pixels.shape[1] if pixels.ndim == 5 else pixels.shape[0]
    return grid, (1,) * parts
