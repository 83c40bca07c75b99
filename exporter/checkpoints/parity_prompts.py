"""The prompts that torch and the graphs are compared on: two texts, with a picture each where the model takes pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..families.family import Arrays, Turn, Vision
from ..families.image_tokens import image_token_id


@dataclass(frozen=True)
class Prompt:
    """Two prompts, the first padded on the left.

    Attributes:
        given: what transformers takes for the images, one in each prompt; empty for a text-only model. The vision encoder
            takes those of it that it names.
        input_ids, attention_mask: `[2, sequence]` int64.
        image_token: stands for a row of image features; `None` for a text-only model.
    """

    given: Arrays
    input_ids: np.ndarray
    attention_mask: np.ndarray
    image_token: int | None


def sample_prompt(
    vision: Vision | None, config: Any, texts: tuple[list[int], list[int]], given: Arrays, image_tokens: tuple[int, ...]
) -> Prompt:
    """The two texts, with an image in the middle of each if the model takes images.

    Args:
        vision: the row's vision part; `None` for text models.
        config: transformers' config of the model.
        texts: token ids of the two texts.
        given: the vision encoder's inputs.
        image_tokens: number of image tokens of each prompt.
    """
    before, after = vision.around(config) if vision is not None else ([], [])
    image_token = image_token_id(config)

    def with_image(text: list[int], count: int) -> list[int]:
        half = len(text) // 2
        assert image_token is not None, "a model that takes images has an image token"
        return [*text[:half], *before, *[image_token] * count, *after, *text[half:]]

    rows = [with_image(text, count) for text, count in zip(texts, image_tokens, strict=True)] if vision else texts
    longest = max(map(len, rows))
    ids = np.stack([np.pad(row, (longest - len(row), 0), constant_values=texts[0][-1]) for row in rows])
    mask = np.stack([np.pad(np.ones(len(row), np.int64), (longest - len(row), 0)) for row in rows])
    return Prompt(given, ids.astype(np.int64), mask, image_token if vision else None)


def turns(prompt: Prompt, seen: Arrays, tokens: tuple[np.ndarray, ...]) -> Iterator[Turn]:
    """The prefill and one call for each of `tokens [batch, 1]`."""
    ids, mask = prompt.input_ids, prompt.attention_mask
    image = prompt.image_token, (ids == prompt.image_token).sum(axis=1) if prompt.image_token is not None else None
    yield Turn(ids, mask, ids.shape[1], prompt.given, seen, *image)
    for token in tokens:
        ids, mask = np.concatenate([ids, token], axis=1), np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        yield Turn(ids, mask, 1, prompt.given, seen, *image)
