"""LLaVA-NeXT: tiles, their separators and the caller's part as in LLaVA-OneVision, without scaling a large grid down."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from .family import Arrays, Family
from .fixed_size import fixed_size_vision
from .llava_onevision import all_laid_out, features_and_separator, sample


def place(config: Any, given: Arrays, seen: Arrays) -> np.ndarray:
    """The rows of all pictures, `[image tokens, width]`; `given["image_sizes"] [pictures, 2]` are their own sizes."""
    return all_laid_out(config, given, seen, None)


LLAVA_NEXT = Family(
    model_type="llava_next",
    model_class="LlavaNextForConditionalGeneration",
    image_towers=("clip_vision_model", "siglip_vision_model"),
    vision=replace(fixed_size_vision(features_and_separator), sample=sample, place=place),
)
