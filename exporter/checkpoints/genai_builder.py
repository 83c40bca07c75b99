"""onnxruntime-genai's model builder with the configs of transformers 5, as a program: `python -m ...genai_builder ARGUMENTS`.

transformers 5 keeps the rotary embedding of models with sliding-window layers (Gemma 3) by layer type:

    rope_parameters: {full_attention: {rope_type, rope_theta}, sliding_attention: {rope_type, rope_theta}}

The builder (0.18) reads `rope_parameters["rope_type"]` and fails with a KeyError. This module converts such a config to the
older form: one set of parameters, and `rope_local_base_freq` for the layers with a window.
"""

from __future__ import annotations

import runpy
from typing import Any

BUILDER = "onnxruntime_genai.models.builder"


def flatten_rope(config: Any) -> None:
    """Write rotary parameters by layer type as the older configs have them, in place; others stay as they are."""
    by_type = getattr(config, "rope_parameters", None)
    if not isinstance(by_type, dict) or not isinstance(by_type.get("full_attention"), dict):
        return
    every, local = by_type["full_attention"], by_type.get("sliding_attention") or {}
    if "rope_theta" in local:
        config.rope_local_base_freq = local["rope_theta"]
    config.rope_theta = every.get("rope_theta")
    config.rope_parameters = dict(every)


def main() -> None:
    """Run the builder on the command line's arguments."""
    import onnxruntime_genai.models  # noqa: F401  # puts its folder on the path: the builder imports `builders` by that name
    from builders.base import Model  # pyright: ignore[reportMissingImports]

    original = Model.make_config_init

    def make_config_init(self: Any, config: Any) -> None:
        for part in (config, getattr(config, "text_config", None)):
            flatten_rope(part)
        original(self, config)

    Model.make_config_init = make_config_init
    runpy.run_module(BUILDER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
