"""Where the trained tiny VLM of `examples/` is, and what its files were before anybody touched them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny_vlm"
CHECKPOINT, SOURCE, PROMPTS = EXAMPLE / "checkpoint", EXAMPLE / "onnx-community", EXAMPLE / "prompts"
DECODER = "onnx/decoder_model_merged.onnx"
ANCHORS, CALIBRATION, EVALUATION = (PROMPTS / f"{name}.jsonl" for name in ("anchors", "calibration", "evaluation"))
# Prompts whose harm is only in the picture.
CALIBRATION_SIGNS, EVALUATION_SIGNS = (PROMPTS / f"{name}-typographic.jsonl" for name in ("calibration", "evaluation"))

# What the `guarded` fixture is: a mode that can be calibrated -> the guarded folder.
Guarded = Callable[[str], Path]


def digests(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file below a folder; caches of linters are nobody's concern."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not {".ruff_cache", "__pycache__"} & set(path.parts)
    }
