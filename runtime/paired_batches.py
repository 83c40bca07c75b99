"""Batches for a guard that reads paired rows (`graphs.pairs`): the text-only prompt in front of the prompt with the image.

Only the prompt's call needs pairs. Behind it the text-only rows are dropped: decode steps cost what they cost unguarded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .decoder_inputs import DecoderState, PromptBatch
from .images.positions_mrope import text_positions
from .images.prompt_images import PromptImages

PROMPTS = slice(1, None, 2)  # rows of the prompts in an interleaved batch


def interleaved(texts: PromptBatch, prompts: PromptBatch, left: bool) -> PromptBatch:
    """`[text 0, prompt 0, text 1, prompt 1, ...]`, padded to one length.

    Args:
        texts, prompts: of the same number of rows, neither with inputs by name (`PromptBatch.given`).
        left: pad on the left; else on the right, for a decoder that takes positions from the number of tokens.
    """
    assert texts.size == prompts.size and texts.given is None and prompts.given is None
    length = max(texts.ids.shape[1], prompts.ids.shape[1])
    pair = texts, prompts

    def woven(*arrays: np.ndarray, axis: int = 0) -> np.ndarray:
        """Rows in turns; `axis` is that of the rows, tokens are on the one behind it."""
        both = np.stack([_padded(array, axis + 1, length, left) for array in arrays], axis=axis + 1)
        return both.reshape(*both.shape[:axis], -1, *both.shape[axis + 2 :])

    ids, mask = woven(texts.ids, prompts.ids), woven(texts.mask, prompts.mask)
    embeds = None
    if texts.embeds is not None and prompts.embeds is not None:
        embeds = woven(texts.embeds, prompts.embeds)
    images = None
    if texts.images is not None or prompts.images is not None:
        images = _images(pair, woven)
    return PromptBatch(ids, mask, embeds, images, further=prompts.further)


def _images(pair: tuple[PromptBatch, PromptBatch], woven: Callable[..., np.ndarray]) -> PromptImages:
    """Inputs of an interleaved batch that depend on images; rows without an image are text."""
    sides = [batch.images or PromptImages() for batch in pair]
    positions, at, injected = None, None, {}
    if any(side.positions is not None for side in sides):
        both = zip(sides, pair, strict=True)
        axes = next(len(side.positions) for side in sides if side.positions is not None)
        known = [text_positions(one.mask, axes) if side.positions is None else side.positions for side, one in both]
        positions = woven(*known, axis=1)
    if any(side.at is not None for side in sides):
        both = zip(sides, pair, strict=True)
        at = woven(*(np.zeros(one.ids.shape, bool) if side.at is None else side.at for side, one in both))
    for name in dict.fromkeys(name for side in sides for name in side.injected):
        like = next(side.injected[name] for side in sides if name in side.injected)
        both = zip(sides, pair, strict=True)
        none = (side.injected.get(name, np.zeros((*one.ids.shape, like.shape[-1]), like.dtype)) for side, one in both)
        injected[name] = woven(*none)
    return PromptImages(positions, injected, at)


def _padded(array: np.ndarray, axis: int, length: int, left: bool) -> np.ndarray:
    missing = length - array.shape[axis]
    widths = [(0, 0)] * array.ndim
    widths[axis] = (missing, 0) if left else (0, missing)
    return np.pad(array, widths)


def rows_of(state: DecoderState, rows: slice) -> DecoderState:
    """The state of some rows of a batch, on the host."""
    images = state.images
    if images is not None:
        images = PromptImages(
            None if images.positions is None else images.positions[:, rows],
            {name: values[rows] for name, values in images.injected.items()},
            None if images.at is None else images.at[rows],
        )
    return replace(
        state,
        ids=state.ids[rows],
        mask=state.mask[rows],
        embeds=None if state.embeds is None else state.embeds[rows],
        cache={name: np.ascontiguousarray(np.asarray(value)[rows]) for name, value in state.cache.items()},
        images=images,
    )
