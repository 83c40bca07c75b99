"""Pictures to `pixel_values` of one size: CLIP, SigLIP, LLaVA, Gemma 3 and PaliGemma. numpy and Pillow only.

Pad to a square, resize, centre crop, rescale, normalise. The arithmetic, its order and its dtypes are those of transformers'
Pillow processors (`CLIPImageProcessorPil`, ...).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...graphs.errors import GuardError
from .open_picture import open_image
from .picture_files import refuse_huge
from .pixel_steps import HALF, STEPS, PixelSteps, declared_processor, opened, processor_name, size_option
from .prepared_picture import PreparedPicture

# What transformers' processors do where a config is silent. A new processor of this kind is a new row.
_CLIP: Mapping[str, Any] = {
    **STEPS,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_pad": False,
}
_SIGLIP: Mapping[str, Any] = _CLIP | {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": HALF,
    "image_std": HALF,
}
PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "CLIPImageProcessor": _CLIP,
    # Pan and scan, further crops of the same picture, is off unless a folder declares it, and then refused.
    "Gemma3ImageProcessor": _SIGLIP | {"resample": 2},
    "LlavaImageProcessor": _CLIP,  # `do_pad` means: to a square, with the mean colour, before resizing
    "SiglipImageProcessor": _SIGLIP,
}
PADS_TO_SQUARE = frozenset({"LlavaImageProcessor"})


@dataclass(frozen=True)
class ImagePreprocessor:
    """The steps of a folder's image processor, in this order. Created by `open`.

    Attributes:
        kind: the processor's name, a key of `PROCESSORS`.
        pad_to_square: pad with the mean colour to a square.
        shortest_edge: resize the shorter side to this many pixels, or
        resize_to: resize to `(height, width)` pixels; both `None`: keep the size.
        crop_to: crop the centre to `(height, width)` pixels, padding with black; `None`: do not crop.
        steps: filter of the resizing, then scale and normalisation of the pixels.
    """

    kind: str
    pad_to_square: bool
    shortest_edge: int | None
    resize_to: tuple[int, int] | None
    crop_to: tuple[int, int] | None
    steps: PixelSteps

    @classmethod
    def open(cls, folder: Path | str) -> ImagePreprocessor:
        """Read the folder's image processor, one of `PROCESSORS`.

        Raises:
            ModelUnreadable: it declares none, or options that cannot be followed.
        """
        kind = processor_name(declared_processor(Path(folder)))
        return opened(folder, kind, PROCESSORS[kind], lambda options: _from_options(kind, options))

    @property
    def keeps_count(self) -> bool:
        return (self.crop_to or self.resize_to) is not None

    def pixel_values(self, images: Sequence[Image.Image | Path | str]) -> np.ndarray:
        """`[batch, 3, height, width]` float32, one row per image.

        Raises:
            GuardError: as `open_image`; or no images, or images that come out in different sizes.
        """
        if not images:
            raise GuardError("no images to prepare; give at least one")
        rows = [self._prepared(open_image(image)) for image in images]
        shapes = sorted({row.shape for row in rows})
        if len(shapes) > 1:
            raise GuardError(
                f"{self.kind} keeps image sizes, so a batch of {shapes} cannot be stacked; send one by one"
            )
        return np.stack(rows)

    def prepare(self, image: Image.Image, alone: bool = True) -> PreparedPicture:
        """`pixel_values [1, 3, height, width]`."""
        return PreparedPicture({"pixel_values": self._prepared(image)[None]})

    def blank_image(self) -> Image.Image:
        """A white picture of the size that the model sees, so that nothing is resized or cropped."""
        height, width = self.crop_to or self.resize_to or (self.shortest_edge or 224,) * 2
        return Image.new("RGB", (width, height), "white")

    def _prepared(self, image: Image.Image) -> np.ndarray:
        """`[3, height, width]` float32 of an RGB picture."""
        if self.pad_to_square:
            image = padded_to_square(image, self.steps.mean)
        target = self._resized_size(image)
        if target is not None:
            image = self.steps.resized(image, *target)
        pixels = np.asarray(image)
        if self.crop_to is not None:
            pixels = _center_crop(pixels, *self.crop_to)
        return self.steps.values(pixels)

    def _resized_size(self, image: Image.Image) -> tuple[int, int] | None:
        """`(height, width)` after resizing; the longer side is rounded down, as in transformers and torchvision."""
        if self.shortest_edge is None:
            return self.resize_to
        short, long = sorted(image.size)
        edges = self.shortest_edge, int(self.shortest_edge * long / short)
        return edges if image.height <= image.width else (edges[1], edges[0])


def _from_options(kind: str, options: Mapping[str, Any]) -> ImagePreprocessor:
    """Options with every key present, checked; raises what a malformed one raises."""
    if options["do_pad"] and kind not in PADS_TO_SQUARE:
        raise GuardError(f"do_pad is known for {', '.join(sorted(PADS_TO_SQUARE))} only")
    shortest_edge, resize_to = size_option(options["size"], square=False) if options["do_resize"] else (None, None)
    crop_edge, crop_to = size_option(options["crop_size"]) if options["do_center_crop"] else (None, None)
    if crop_edge is not None:
        raise GuardError("crop_size must have height and width")
    return ImagePreprocessor(
        kind=kind,
        pad_to_square=bool(options["do_pad"]),
        shortest_edge=shortest_edge,
        resize_to=resize_to,
        crop_to=crop_to,
        steps=PixelSteps.of(options),
    )


def padded_to_square(image: Image.Image, mean: tuple[float, ...] | None) -> Image.Image:
    """The picture in the middle of a square as wide as its longer side, on the mean colour."""
    edge = max(image.size)
    if image.size == (edge, edge):
        return image
    refuse_huge(edge, edge, "padded to a square by the model's image processor, the image")
    red, green, blue = (int(channel * 255) for channel in mean or (0.0, 0.0, 0.0))
    square = Image.new("RGB", (edge, edge), (red, green, blue))
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return square


def _center_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """`[height, width, 3]` from the middle of `pixels`; black where the picture is smaller than that."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    inside = pixels[max(top, 0) : top + height, max(left, 0) : left + width]
    if inside.shape[:2] == (height, width):
        return inside
    cropped = np.zeros((height, width, 3), pixels.dtype)
    cropped[max(-top, 0) :, max(-left, 0) :][: inside.shape[0], : inside.shape[1]] = inside
    return cropped
