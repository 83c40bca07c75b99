"""Writes the image processor's config for onnxruntime-genai: steps of onnxruntime-extensions, from the folder's own processor.

The file has a name of its own, because `processor_config.json` is transformers'. `DecodeImage` gives RGB; `ConvertRGB` behind
it would swap red and blue.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ...graphs.errors import GuardError
from ...graphs.strict_json import to_strict_json
from ...runtime.images.images import ImagePreprocessor
from ...runtime.images.images_qwen import QwenImagePreprocessor
from ...runtime.images.pixel_steps import PixelSteps
from ...runtime.images.vision import open_preprocessor

PROCESSOR = "genai_processor.json"
_FILTERS: Mapping[Image.Resampling, str] = {
    Image.Resampling.NEAREST: "NEAREST",
    Image.Resampling.BILINEAR: "LINEAR",
    Image.Resampling.BICUBIC: "CUBIC",
    Image.Resampling.LANCZOS: "LANCZOS",
}


def processor_bytes(folder: Path) -> bytes:
    """The config as it is written.

    Args:
        folder: it contains the model's own `preprocessor_config.json` or `processor_config.json`.

    Raises:
        ModelUnreadable: it declares no image processor, or one that cannot be followed.
        GuardError: its steps have no counterpart in onnxruntime-extensions.
    """
    processor = open_preprocessor(folder)
    if isinstance(processor, QwenImagePreprocessor):
        steps = _qwen(processor)
    elif isinstance(processor, ImagePreprocessor):
        steps = _fixed_size(folder, processor)
    else:
        raise GuardError(
            f"{folder}: its image processor has no counterpart in onnxruntime-genai; keep the layout that it has"
        )
    operations = [
        {"operation": {"name": f"step_{number}", "type": kind, **({"attrs": attrs} if attrs else {})}}
        for number, (kind, attrs) in enumerate(steps)
    ]
    content = {"processor": {"name": "image_processor", "transforms": operations}}
    return (to_strict_json(content, indent=2) + "\n").encode()


_Steps = list[tuple[str, dict[str, Any]]]
_DECODE = ("DecodeImage", {"color_space": "RGB"})


def _qwen(processor: QwenImagePreprocessor) -> _Steps:
    """Resize to a multiple of a token's edge within limits, and cut into patches."""
    cut = {"patch_size": processor.patch, "merge_size": processor.merge}
    resize: _Steps = []
    if processor.pixels is not None:
        least, most = processor.pixels
        limits = {"min_pixels": least, "max_pixels": most}
        resize = [("Resize", {"smart_resize": 1, **limits, **cut, **_filter(processor.steps)})]
    patches = ("PatchImage", {**cut, "temporal_patch_size": processor.temporal})
    return [_DECODE, *resize, *_values(processor.steps), patches]


def _fixed_size(folder: Path, processor: ImagePreprocessor) -> _Steps:
    """Resize to one size, channels first."""
    if processor.pad_to_square or processor.shortest_edge is not None or processor.crop_to is not None:
        raise GuardError(
            f"{folder}: its image processor pads or crops, which genai's pipelines do not do alike; keep the layout that it "
            "has"
        )
    resize: _Steps = []
    if processor.resize_to is not None:
        height, width = processor.resize_to
        resize = [("Resize", {"height": height, "width": width, "keep_aspect_ratio": 0, **_filter(processor.steps)})]
    return [_DECODE, *resize, *_values(processor.steps), ("Permute3D", {"dims": [2, 0, 1]})]


def _values(steps: PixelSteps) -> _Steps:
    """Pixels to numbers. `Rescale` is also what converts them to float32."""
    scaled: _Steps = [("Rescale", {"rescale_factor": 1.0 if steps.rescale_factor is None else steps.rescale_factor})]
    if steps.mean is None or steps.std is None:
        return scaled
    return [*scaled, ("Normalize", {"mean": list(steps.mean), "std": list(steps.std)})]


def _filter(steps: PixelSteps) -> dict[str, str]:
    """The filter of resizing, by its name in onnxruntime-extensions.

    Raises:
        GuardError: it has none.
    """
    if steps.resample not in _FILTERS:
        raise GuardError(f"the image processor resizes with {steps.resample.name}, which onnxruntime-genai lacks")
    return {"interpolation": _FILTERS[steps.resample]}
