"""Two short texts for the comparison with torch: real sentences behind the token that every prompt of the model begins with.

The first token is what matters for float16: attention sinks there, and its state is often a hundred times larger than any
other. Gemma 3 270M reaches 104,000 at BOS and 1,000 elsewhere, so a comparison on random words alone sees no overflow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.chat.folder_configs import FolderConfigs, open_tokenizer
from ...runtime.chat.special_tokens import add_declared_tokens, boundary_ids

_SENTENCES = (
    "The capital of France is Paris.",
    "Water boils at one hundred degrees Celsius at sea level, and it freezes at zero degrees.",
)
_LENGTHS = (6, 12)  # tokens, BOS not counted; they differ, so that one of the two is padded
_FEWEST = 4


def prompt_texts(folder: Path, config: Any) -> tuple[list[int], list[int]]:
    """Token ids of two texts of different lengths, each beginning with BOS where the checkpoint has one.

    Args:
        folder: the checkpoint. Without a tokenizer.json, or with one that lacks the sentences' words, the text after BOS is
            seeded random tokens.
        config: transformers' config of the model.
    """
    vocabulary = config.get_text_config().vocab_size
    bos, sentences = _of_tokenizer(folder) if (folder / "tokenizer.json").is_file() else (None, None)
    if bos is None:
        bos = getattr(config.get_text_config(), "bos_token_id", None)
    begin = [bos] if isinstance(bos, int) and 0 <= bos < vocabulary else []
    if sentences is None or any(number >= vocabulary for ids in sentences for number in ids):
        random, words = np.random.default_rng(0), plain_tokens(config)
        sentences = [random.choice(words, length).tolist() for length in _LENGTHS]
    first, second = ([*begin, *ids[:length]] for ids, length in zip(sentences, _LENGTHS, strict=True))
    return first, second


def plain_tokens(config: Any) -> np.ndarray:
    """Token ids without those that the config gives a meaning (image, video, start of an image, end of the answer)."""
    meant = [number for name, number in _flat(config.to_dict()) if str(name).endswith(("_token_id", "_token_index"))]
    vocabulary = np.arange(config.get_text_config().vocab_size)
    return vocabulary[~np.isin(vocabulary, meant)]


def _of_tokenizer(folder: Path) -> tuple[int | None, list[list[int]] | None]:
    """BOS, and the sentences' ids; `None` for either that the tokenizer does not have."""
    configs, tokenizer = FolderConfigs.read(folder), open_tokenizer(folder)
    special = add_declared_tokens(folder, tokenizer, configs)
    bos, _, _ = boundary_ids(tokenizer, configs, special)
    ids = [tokenizer.encode(sentence, add_special_tokens=False).ids for sentence in _SENTENCES]
    unknown = tokenizer.token_to_id(special.get("unk_token", "<unk>"))
    known = all(len(one) >= _FEWEST and unknown not in one for one in ids) and len(ids[0]) != len(ids[1])
    return bos, ids if known else None


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every entry of a config that is no table itself."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        elif isinstance(value, int):
            yield name, value
