"""Rules for the positions of a prompt's tokens, one of which every decoder follows: in numpy, for any call.

`find_rule` compares each with the positions that transformers' `generate` gave the decoder, at the prompt and at later steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...graphs.errors import GuardError
from ...runtime.images.positions_by_image import AXES, positions_by_image
from ...runtime.images.positions_mrope import mrope_positions, text_positions
from .family import BATCH, SEQUENCE, Shape, Turn, positions

Rule = Callable[[Any, Turn], np.ndarray]  # rule(config, turn): positions of the call's tokens, [..., batch, length]


def counted(config: Any, turn: Turn) -> np.ndarray:
    """The token's number within its prompt, `[batch, length]`."""
    return positions(turn)


def by_place(config: Any, turn: Turn) -> np.ndarray:
    """Time, row and column, `[3, batch, length]`: the Qwen-VL and GLM-V kind."""
    if "image_grid_thw" not in turn.given:
        return text_positions(turn.mask)[..., -turn.length :]
    grids, merge = turn.given["image_grid_thw"], merge_of(config)
    return mrope_positions(turn.of_image, turn.mask, grids, merge)[..., -turn.length :]


def by_image(config: Any, turn: Turn) -> np.ndarray:
    """Number, column, row and image, `[4, batch, length]`: HunYuan-VL."""
    if "image_grid_thw" not in turn.given:
        return text_positions(turn.mask, AXES)[..., -turn.length :]
    grids = turn.given["image_grid_thw"]
    return positions_by_image(turn.of_image, turn.mask, grids, over_batch=True)[..., -turn.length :]


def counted_from_one(config: Any, turn: Turn) -> np.ndarray:
    """The token's number within its prompt, from 1."""
    return positions(turn) + 1


RULES: Mapping[Rule, Shape] = {
    counted: (BATCH, SEQUENCE),
    counted_from_one: (BATCH, SEQUENCE),
    by_place: (3, BATCH, SEQUENCE),
    by_image: (AXES, BATCH, SEQUENCE),
}


def find_rule(config: Any, calls: Sequence[tuple[Turn, np.ndarray | None]]) -> Rule | None:
    """The rule that gives every call the positions that it got; `None` if none does, or if the decoder got none.

    Args:
        config: of the model.
        calls: each with its positions, `[..., batch, length]`.
    """
    return next((rule for rule in RULES if all(_follows(rule, config, *call) for call in calls)), None)


def merge_of(config: Any) -> int:
    """Patches per side that become one token."""
    vision = getattr(config, "vision_config", None)
    for part in (vision, config):
        for name in ("spatial_merge_size", "merge_size", "spatial_patch_size"):
            if isinstance(number := getattr(part, name, None), int):
                return number
    return 1


def _follows(rule: Rule, config: Any, turn: Turn, got: np.ndarray | None) -> bool:
    if got is None:
        return False
    try:
        wanted = rule(config, turn)
    except GuardError:  # grids of another kind of model
        return False
    if wanted.ndim == 3 and got.ndim == 3 and (len(wanted), len(got)) == (3, 4):
        got = got[1:]  # transformers puts the tokens' numbers before the three
    if wanted.ndim == 2 and got.ndim == 3:
        wanted = np.broadcast_to(wanted, got.shape)
        if (got != got[:1]).any():
            return False
    real = turn.mask[:, -turn.length :].astype(bool)
    return got.shape[-2:] == wanted.shape[-2:] and got.ndim == wanted.ndim and bool((got == wanted)[..., real].all())
