"""InternVL, in the form that transformers reads (`-hf` checkpoints): every tile of a picture is an image of its own."""

from __future__ import annotations

from .family import Family
from .fixed_size import fixed_size_vision, own_image_features

INTERNVL = Family(
    model_type="internvl",
    model_class="InternVLForConditionalGeneration",
    image_towers=("internvl_vision",),
    vision=fixed_size_vision(own_image_features),
)
