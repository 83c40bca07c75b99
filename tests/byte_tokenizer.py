"""A byte-level tokenizer without merges: special tokens and the 256 bytes. onnxruntime-genai reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any


def save_byte_tokenizer(folder: Path, special_tokens: Sequence[str] | Mapping[str, int], tokenizer_class: str) -> None:
    """Write `tokenizer.json`, and the class into `tokenizer_config.json`, which has to exist.

    Args:
        folder: of the checkpoint.
        special_tokens: with their ids, or in the order of their ids from 0; the bytes get the ids that are left.
        tokenizer_class: transformers' name.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = dict(special_tokens) if isinstance(special_tokens, Mapping) else _numbered(special_tokens)
    special = frozenset(vocabulary.values())
    left = (number for number in count() if number not in special)
    vocabulary |= zip(sorted(pre_tokenizers.ByteLevel.alphabet()), left, strict=False)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": tokenizer_class}
    path.write_text(json.dumps(config), encoding="utf-8")


def save_processor(
    folder: Path,
    configs: Mapping[str, Mapping[str, Any]],
    special_tokens: Sequence[str] | Mapping[str, int],
    tokenizer_class: str,
    chat_template: str,
) -> None:
    """Write a checkpoint's configs, its tokenizer of bytes and its chat template.

    Args:
        folder: of the checkpoint.
        configs: content of each file by name; `tokenizer_config.json` is one.
        special_tokens, tokenizer_class: as for `save_byte_tokenizer`.
        chat_template: in Jinja.
    """
    for name, content in configs.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    save_byte_tokenizer(folder, special_tokens, tokenizer_class)
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}
