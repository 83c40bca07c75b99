"""M-RoPE positions: transformers' own on random layouts, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_qwen
import torch
from tiny_qwen import IMAGE_TOKEN_ID, KINDS, MERGE

from vlmguard.graphs.errors import GuardError
from vlmguard.runtime.images.positions_mrope import mrope_positions, text_positions
from vlmguard.runtime.images.prompt_images import PromptImages

WORD = 20


def random_layout(random: np.random.Generator, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`ids [batch, sequence]`, `mask`, `grids [images, 3]`: up to three images per prompt, text around every one."""
    rows, grids = [], []
    for _ in range(batch):
        row = [WORD] * random.integers(1, 5)
        for _ in range(random.integers(0, 4)):
            grid = random.integers(1, 4, 3) * (1, MERGE, MERGE)
            grids.append(grid)
            row += [IMAGE_TOKEN_ID] * (grid.prod() // MERGE**2) + [WORD] * random.integers(1, 4)
        rows.append(row)
    longest = max(map(len, rows))
    ids, mask = np.zeros((2, batch, longest), np.int64)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :], mask[number, longest - len(row) :] = row, 1
    return ids, mask, np.array(grids, np.int64).reshape(-1, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same(kind: str) -> None:
    """`get_rope_index`, and the positions that its offset gives the tokens after the prompt."""
    model, random = tiny_qwen.tiny_qwen(kind).model, np.random.default_rng(0)
    images = 0
    for batch in (1, 1, 2, 3, 3, 4, 5):
        ids, mask, grids = random_layout(random, batch)
        is_image = ids == IMAGE_TOKEN_ID
        expected, offset = model.get_rope_index(
            torch.from_numpy(ids),
            mm_token_type_ids=torch.from_numpy(is_image.astype(np.int32)),
            image_grid_thw=torch.from_numpy(grids),
            attention_mask=torch.from_numpy(mask),
        )
        found = mrope_positions(is_image, mask, grids, MERGE)
        np.testing.assert_array_equal(found, expected.numpy())
        assert found.dtype == np.int64
        images += len(grids)

        length = ids.shape[1]
        after = PromptImages(found).positions_between(length, length + 3)
        count = mask.sum(axis=1)[:, None] + np.arange(3)
        np.testing.assert_array_equal(after, np.broadcast_to(count + offset.numpy(), (3, batch, 3)))
    assert images > 20


def test_text_is_counted_three_times() -> None:
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    expected = [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert text_positions(mask).tolist() == [expected] * 3
    none = np.zeros((0, 3), np.int64)
    assert mrope_positions(np.zeros_like(mask, bool), mask, none, MERGE).tolist() == [expected] * 3


def test_padding_on_the_right_is_left_out() -> None:
    mask = np.array([[1, 1, 1, 0, 0]])
    is_image = np.array([[0, 1, 0, 0, 0]], bool)
    assert mrope_positions(is_image, mask, np.array([[1, 2, 2]]), 2)[0].tolist() == [[0, 1, 2, 0, 0]]


def test_positions_go_on_after_the_largest_of_a_row() -> None:
    """A wide image pushes on what comes after it; a tall row of the batch does not."""
    is_image = np.array([[0, 1, 1, 1], [0, 0, 1, 0]], bool)
    grids = np.array([[1, 2, 6], [1, 2, 2]])
    positions = mrope_positions(is_image, np.ones((2, 4)), grids, 2)
    assert positions.tolist() == [
        [[0, 1, 1, 1], [0, 1, 2, 3]],
        [[0, 1, 1, 1], [0, 1, 2, 3]],
        [[0, 1, 2, 3], [0, 1, 2, 3]],
    ]
    images = PromptImages(positions)
    for axis in images.positions_between(3, 6):  # type: ignore[union-attr]
        assert axis[:, 1:].tolist() == [[4, 5], [4, 5]]


@pytest.mark.parametrize(
    "tokens, grids, line",
    [
        (
            2,
            [[1, 2, 2]],
            "prompt 0 has a run of 2 image tokens where image 0 of 1 has 1; expand each image placeholder to its own "
            "image's tokens",
        ),
        (
            1,
            [],
            "prompt 0 has a run of 1 image tokens where image 0 of 0 has 0; expand each image placeholder to its own "
            "image's tokens",
        ),
        (
            1,
            [[1, 2, 2], [1, 2, 2]],
            "the prompts have image tokens for 1 of 2 images; add the placeholders",
        ),
    ],
)
def test_tokens_and_grids_must_agree(tokens: int, grids: list[list[int]], line: str) -> None:
    is_image = np.array([[False, *[True] * tokens]])
    with pytest.raises(GuardError) as refused:
        mrope_positions(is_image, np.ones_like(is_image), np.array(grids, np.int64).reshape(-1, 3), 2)
    assert str(refused.value) == line


def test_what_goes_in_between_layers_ends_with_the_prompt() -> None:
    rows = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    images = PromptImages(injected={"deepstack_embeds_0": rows})
    found = images.injected_between("deepstack_embeds_0", 1, 5)
    assert found is not None and found.tolist() == [[[2, 3], [4, 5], [0, 0], [0, 0]]]
    assert images.injected_between("deepstack_embeds_0", 3, 4) is None
    assert images.injected_between("deepstack_embeds_1", 0, 1) is None
    assert images.positions_between(0, 1) is None
