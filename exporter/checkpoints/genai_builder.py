"""onnxruntime-genai's model builder with the files of transformers 5, as a program: `python -m ...genai_builder ARGUMENTS`.

transformers 5 keeps the rotary embedding of models with sliding-window layers (Gemma 3) by layer type:

    rope_parameters: {full_attention: {rope_type, rope_theta}, sliding_attention: {rope_type, rope_theta}}

The builder (0.18) reads `rope_parameters["rope_type"]` and fails with a KeyError. This module converts such a config to the
older form: one set of parameters, and `rope_local_base_freq` for the layers with a window.

transformers 5 also names the class of a tokenizer after the type of the model. genai refuses a name that it does not know, so
such a class is written by the name of an older one that reads the same `tokenizer.json`.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from ...graphs.json_files import read_json
from ...graphs.strict_json import to_strict_json

BUILDER = "onnxruntime_genai.models.builder"
# How words are cut before byte pairs are merged differs, and is in `tokenizer.json`.
OLDER_TOKENIZERS = {"Qwen3_5Tokenizer": "Qwen2Tokenizer"}


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


def name_older_tokenizer(folder: Path) -> None:
    """Write the name of a class that genai knows to `tokenizer_config.json`, if the one there is another name of it."""
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    if older := OLDER_TOKENIZERS.get(str(config.get("tokenizer_class"))):
        path.write_text(to_strict_json(config | {"tokenizer_class": older}, indent=2) + "\n", encoding="utf-8")


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
