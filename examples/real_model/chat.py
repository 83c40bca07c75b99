"""Prompts as token ids: a text, or a picture's place followed by a text, in one user turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from weights import IMAGE_TOKEN

IMAGE_TOKENS = 16
END_OF_TURN = "<end_of_turn>"
REFUSAL = "I'm sorry, but I can't help with that."
OPENING = "Sure, here is a short answer to your question."


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """One user turn, ready for the answer."""
    message = {"role": "user", "content": text}
    rendered = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def picture_ids(tokenizer: Any, text: str) -> list[int]:
    """The same with a picture before the text: `IMAGE_TOKENS` times the image token."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    rendered = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    expanded = rendered.replace(IMAGE_TOKEN, IMAGE_TOKEN * IMAGE_TOKENS, 1)
    return tokenizer(expanded, add_special_tokens=False)["input_ids"]


def answer_ids(tokenizer: Any, answer: str) -> list[int]:
    """An answer and the end of the turn."""
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.convert_tokens_to_ids(END_OF_TURN)]


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(ids, mask, positions)`, each `[rows, longest]` int64, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)
