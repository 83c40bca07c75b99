"""Writes the image processor's config for onnxruntime-genai: steps of onnxruntime-extensions, from the folder's own processor.

The file has a name of its own, because `processor_config.json` is transformers'. `DecodeImage` gives RGB; `ConvertRGB` behind
it would swap red and blue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...graphs.errors import GuardError
from ...graphs.strict_json import to_strict_json
from ...runtime.images.images import ImagePreprocessor
from ...runtime.images.images_lfm2 import Lfm2ImagePreprocessor
from ...runtime.images.images_pixtral import PixtralImagePreprocessor
from ...runtime.images.images_qwen import QwenImagePreprocessor
from ...runtime.images.pixel_steps import (
    HALF,
    STEPS,
    PixelSteps,
    count_option,
    declared_processor,
    fixed_size,
    opened,
    processor_name,
)
from ...runtime.images.vision import open_preprocessor

PROCESSOR = "genai_processor.json"
# Its config has a name for NEAREST too, with which it fails when it resizes.
_FILTERS: Mapping[Image.Resampling, str] = {
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
    if processor_name(declared_processor(folder)) == _PHI4:  # which cannot be run here, and need not
        steps, more = opened(folder, _PHI4, _PHI4_OPTIONS, _phi4), {"output_aligner": "phi4-vision-aligner"}
    else:
        steps, more = _own_steps(folder), {}
    operations = [{"operation": {"name": f"step_{number}", **step}} for number, step in enumerate(steps)]
    content = {"processor": {"name": "image_processor", "transforms": operations, **more}}
    return (to_strict_json(content, indent=2) + "\n").encode()


_Steps = list[dict[str, Any]]


def _step(kind: str, inputs: Sequence[str] = (), /, **attrs: Any) -> dict[str, Any]:
    """One operation of onnxruntime-extensions; without `inputs` it takes all that the one before gives."""
    named = (("type", kind), ("inputs", list(inputs)), ("attrs", attrs))
    return {name: value for name, value in named if value}


_DECODE = _step("DecodeImage", color_space="RGB")
_CHANNELS_FIRST = _step("Permute3D", dims=[2, 0, 1])
_FIRST = ":0"  # what the step before gives, the first of it
_PHI4 = "Phi4MultimodalImageProcessor"
_PHI4_OPTIONS: Mapping[str, Any] = {
    **STEPS,
    "image_mean": HALF,
    "image_std": HALF,
    "size": {"height": 448, "width": 448},
    "dynamic_hd": 36,
}


def _own_steps(folder: Path) -> _Steps:
    """The steps of an image processor that runs here too."""
    processor = open_preprocessor(folder)
    if isinstance(processor, QwenImagePreprocessor):
        return _qwen(processor)
    if isinstance(processor, PixtralImagePreprocessor):
        return _pixtral(folder, processor)
    if isinstance(processor, Lfm2ImagePreprocessor):
        least, most = (count * processor.edge**2 for count in processor.tokens)
        return _whole(processor.steps, (least, most), patch_size=processor.patch, merge_size=processor.merge)
    if isinstance(processor, ImagePreprocessor):
        return _fixed_size(folder, processor)
    raise GuardError(
        f"{folder}: its image processor has no counterpart in onnxruntime-genai; keep the layout that it has"
    )


def _phi4(options: Mapping[str, Any]) -> _Steps:
    """Tiles, the whole picture small before them, and masks of what is picture."""
    tile = fixed_size("size", options["size"])[0]
    tiles = count_option("dynamic_hd", options["dynamic_hd"])
    steps = PixelSteps.of(options)
    return [
        _DECODE,
        _step("Phi4VisionDynamicPreprocess", dynamic_hd=tiles, dyhd_base_resolution=tile),
        *_values(steps, [_FIRST]),
        _step("Phi4VisionProcessor", [_FIRST, "step_1:1"], dyhd_base_resolution=tile, **_filter(steps)),
    ]


def _qwen(processor: QwenImagePreprocessor) -> _Steps:
    """Resize to a multiple of a token's edge within limits, and cut into patches."""
    cut = {"patch_size": processor.patch, "merge_size": processor.merge}
    resize: _Steps = []
    if processor.pixels is not None:
        resize = [_within(processor.steps, processor.pixels, **cut)]
    patches = _step("PatchImage", **cut, temporal_patch_size=processor.temporal)
    return [_DECODE, *resize, *_values(processor.steps), patches]


def _within(steps: PixelSteps, pixels: tuple[int, int], **cut: int) -> dict[str, Any]:
    """Resize to a multiple of a token's edge, with so many pixels at least and at most."""
    return _step("Resize", smart_resize=1, min_pixels=pixels[0], max_pixels=pixels[1], **cut, **_filter(steps))


def _pixtral(folder: Path, processor: PixtralImagePreprocessor) -> _Steps:
    """Resize to the nearest whole tokens, with as many pixels as the largest picture has at most."""
    edge, longest = processor.edge, processor.longest
    if edge[0] != edge[1] or longest is None:
        raise GuardError(f"{folder}: its tokens are no squares, or it does not resize; keep the layout that it has")
    pixels = (edge[0] ** 2, max(1, longest[0] // edge[0]) * max(1, longest[1] // edge[1]) * edge[0] ** 2)
    return _whole(processor.steps, pixels, patch_size=edge[0], merge_size=1)


def _whole(steps: PixelSteps, pixels: tuple[int, int], **cut: int) -> _Steps:
    """Resize to whole tokens, channels first, with the size after resizing."""
    return [_DECODE, _within(steps, pixels, **cut), *_values(steps), _CHANNELS_FIRST, _step("PixtralImageSizes")]


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
        resize = [_step("Resize", height=height, width=width, keep_aspect_ratio=0, **_filter(processor.steps))]
    return [_DECODE, *resize, *_values(processor.steps), _CHANNELS_FIRST]


def _values(steps: PixelSteps, inputs: Sequence[str] = ()) -> _Steps:
    """Pixels to numbers. `Rescale` is also what converts them to float32."""
    scaled = [_step("Rescale", inputs, rescale_factor=1.0 if steps.rescale_factor is None else steps.rescale_factor)]
    if steps.mean is None or steps.std is None:
        return scaled
    return [*scaled, _step("Normalize", mean=list(steps.mean), std=list(steps.std))]


def _filter(steps: PixelSteps) -> dict[str, str]:
    """The filter of resizing, by its name in onnxruntime-extensions.

    Raises:
        GuardError: it has none.
    """
    if steps.resample not in _FILTERS:
        raise GuardError(f"the image processor resizes with {steps.resample.name}, which onnxruntime-genai lacks")
    return {"interpolation": _FILTERS[steps.resample]}
