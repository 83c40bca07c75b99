"""A byte-level tokenizer without merges: special tokens first, then the 256 bytes. onnxruntime-genai reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def save_byte_tokenizer(folder: Path, special_tokens: Sequence[str], tokenizer_class: str) -> None:
    """Write `tokenizer.json`, and the class into `tokenizer_config.json`, which has to exist."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = [*special_tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": tokenizer_class}
    path.write_text(json.dumps(config), encoding="utf-8")
