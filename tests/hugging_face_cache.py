"""The Hugging Face cache, as `huggingface_hub` lays it out: every file of a snapshot is a link to a blob."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path


def into_cache(model: Path, cache: Path, name: str = "models--someone--model") -> Path:
    """Copy a model's files into a cache; the snapshot's folder."""
    repository = cache / name
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    for path in sorted(path for path in model.rglob("*") if path.is_file()):
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot
