"""`config.json` and `generation_config.json` of a folder for transformers.js."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...graphs.errors import GuardError
from ...graphs.json_files import read_json
from ...graphs.package import ModelPackage

RUNTIME = "transformers.js"
GENAI = "genai_config.json"
# Keys of the decoder in `genai_config.json`, and their names in `config.json`.
_SAME = {
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_hidden_layers": "num_hidden_layers",
    "num_key_value_heads": "num_key_value_heads",
    "head_size": "head_dim",
}
_ALSO = {"vocab_size": "vocab_size", "context_length": "max_position_embeddings", "type": "model_type"}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def config_bytes(content: Mapping[str, Any]) -> bytes:
    """A config as it is written."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def configs(package: ModelPackage, chunks: Mapping[str, int]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """`config.json` and `generation_config.json` where they must be written; `None`: the folder's own will do."""
    generation = package.companion("generation_config.json")
    genai = read_json(package.root / GENAI).get("model")
    config = package.config
    made = None
    if not config:
        if not isinstance(genai, dict) or not isinstance(genai.get("decoder"), dict):
            raise GuardError(
                f"{package.root}: has no config.json, by which {RUNTIME} goes; put the model's beside the graph"
            )
        config = {new: genai["decoder"][old] for old, new in _SAME.items() if old in genai["decoder"]}
        config |= {new: genai[old] for old, new in _ALSO.items() if old in genai}
        made = config = config | {name: genai[name] for name in TOKENS if name in genai}
    if chunks:
        own = config.get("transformers.js_config")
        made = config | {
            "transformers.js_config": {
                **(own if isinstance(own, dict) else {}),
                "use_external_data_format": dict(chunks),
            }
        }
    tokens = {name: genai[name] for name in TOKENS if name in genai} if isinstance(genai, dict) else {}
    return made, tokens if generation is None and tokens else None
