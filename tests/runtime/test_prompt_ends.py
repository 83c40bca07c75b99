"""Where a prompt ends, for a guard at the prompt's end: prompts that come in several calls, and conversations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from tiny_vlm_paths import PROMPTS, SOURCE, Guarded

from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.plan import PROMPT_SUPERVISOR_INPUT
from vlmguard.runtime.chat.turns import Turn
from vlmguard.runtime.decoder_inputs import PromptBatch
from vlmguard.runtime.generation import Request
from vlmguard.runtime.guarded import GuardedVLM
from vlmguard.runtime.paired_batches import interleaved
from vlmguard.runtime.vlm import VisionLanguageModel

pytest_plugins = ("tiny_vlm_fixtures",)

PICTURE = sorted((PROMPTS / "images").glob("*.png"))[0]
REQUEST = Request("how to steal the boat", PICTURE)
TALK = (Turn("user", "what color is this image", pictures=1), Turn("assistant", "i see red ."))


@pytest.fixture(scope="module")
def rows(guarded: Guarded) -> GuardedVLM:
    return GuardedVLM.open(guarded("rows"))


@pytest.fixture(scope="module")
def by_input(guarded: Guarded) -> GuardedVLM:
    return GuardedVLM.open(guarded("align"))


def in_parts(
    model: VisionLanguageModel, batch: PromptBatch, cuts: Sequence[int], told: np.ndarray | None = None
) -> np.ndarray:
    """Logits at the prompt's end, `[batch, vocabulary]`, of a prompt in several calls; the supervisor is fed in the last."""
    session = model.decoder
    silent = None if told is None else session.no_supervisor(batch.size)
    whole, given = session.prefill_feeds(batch, silent), {}
    ends = [*cuts, batch.ids.shape[1]]
    for start, stop in zip([0, *cuts], ends, strict=True):
        feeds = dict(whole) | {past: given[pair.present] for past, pair in session._states.items() if given}
        for name in ("inputs_embeds", "position_ids"):
            feeds[name] = whole[name][:, start:stop]
        feeds["attention_mask"] = whole["attention_mask"][:, :stop]
        if told is not None and stop == ends[-1]:
            feeds[PROMPT_SUPERVISOR_INPUT] = told
        given = session.runner.run(feeds)
    return given["logits"][:, -1]


def test_the_input_is_fed_in_the_last_part_of_a_prompt(by_input: GuardedVLM) -> None:
    batch, told = by_input.batch([REQUEST]), np.asarray(by_input.supervise([REQUEST]))
    whole = in_parts(by_input, batch, [], told)
    for cuts in ([4], [7, batch.ids.shape[1] - 1]):  # a last part of one token too
        np.testing.assert_allclose(in_parts(by_input, batch, cuts, told), whole, atol=1e-4)
    silent = np.full_like(told, -1e30)
    assert np.abs(in_parts(by_input, batch, [4], silent) - whole).max() > 1


def test_pairs_in_parts_are_edited_at_the_end_of_each_part_that_both_rows_have(rows: GuardedVLM) -> None:
    both = interleaved(rows.batch([REQUEST.text_only]), rows.batch([REQUEST]), left=True)
    whole, length = in_parts(rows, both, []), both.ids.shape[1]
    absent = int((both.mask[0] == 0).sum())  # columns that are padding in the text-only row
    np.testing.assert_allclose(in_parts(rows, both, [absent]), whole, atol=1e-4)
    unguarded = in_parts(VisionLanguageModel(open_package(SOURCE)), both, [])
    refused = whole[1].argmax()
    assert refused != unguarded[1].argmax()
    assert in_parts(rows, both, [length - 3])[1].argmax() == refused
    # a last part of one token is a decode step, and is not edited
    apart = in_parts(rows, both, [length - 1])
    np.testing.assert_allclose(apart[0], unguarded[0], atol=1e-4)
    assert np.abs(apart[1] - whole[1]).max() > 1e-2


@pytest.mark.parametrize("text", ["how to steal the boat", "how to polish the lamp"])
def test_the_newest_turn_of_a_conversation_follows_the_conversation_without_its_image(
    rows: GuardedVLM, by_input: GuardedVLM, text: str
) -> None:
    """Whether the image came with the newest turn or with an earlier one."""
    for request in (
        Request(text, PICTURE, TALK),
        Request(text, PICTURE, (Turn("user", "how to wash the boat"), TALK[1])),
    ):
        alone = VisionLanguageModel(open_package(SOURCE)).answer([request.text_only])
        assert by_input.answer([request]) == rows.answer([request]) == alone
