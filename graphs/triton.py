"""Names in a Triton model repository that vlmguard writes: which folder is which part of the model.

REPOSITORY/guard.json, tokenizer, configs         read by us; Triton looks at folders only
REPOSITORY/decoder/config.pbtxt, 1/model.onnx     the guarded decoder, and so on for each graph
REPOSITORY/vlmguard/config.pbtxt, 1/model.py      the front model, which clients ask
"""

from __future__ import annotations

from pathlib import Path

DECODER, VISION_ENCODER, EMBED_TOKENS = "decoder", "vision_encoder", "embed_tokens"
FRONT = "vlmguard"
VERSION = "1"
CONFIG = "config.pbtxt"
GRAPH = "model.onnx"
PORTS = f"{FRONT}/{VERSION}/ports.json"


def is_repository(folder: Path) -> bool:
    """Whether a folder is laid out as such a repository."""
    return (folder / DECODER / CONFIG).is_file()


def graph_path(folder: Path, part: str) -> Path | None:
    """The graph of a part, if the repository has it."""
    path = folder / part / VERSION / GRAPH
    return path if path.is_file() else None
