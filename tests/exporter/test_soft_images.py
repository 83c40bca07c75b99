"""Worst-case soft images: found without gradients, within the budget, the same for the same seed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import numpy as np
import pytest
from tiny_vlm_paths import CALIBRATION, SOURCE, Guarded

from vlmguard.exporter.calibration.soft_images import JUDGED_TOKENS, beside, worst_images
from vlmguard.exporter.evaluation.evaluate import evaluate, tally
from vlmguard.exporter.prompts.labelled import LabelledPrompt
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.layouts import open_package
from vlmguard.runtime.decoder import DecoderSession
from vlmguard.runtime.guarded import GuardedVLM
from vlmguard.runtime.vlm import VisionLanguageModel

pytest_plugins = ("tiny_vlm_fixtures",)


def texts(label: str, count: int) -> list[str]:
    rows = [json.loads(line) for line in CALIBRATION.read_text(encoding="utf-8").splitlines()]
    return [row["prompt"] for row in rows if (row["setting"], row["label"]) == ("text", label)][::6][:count]


HARMFUL, HARMLESS = texts("harmful", 4), texts("harmless", 4)


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return VisionLanguageModel(open_package(SOURCE))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The decoder's calls, as they are made."""
    made: list[str] = []
    for name in ("prefill", "step"):
        real = getattr(DecoderSession, name)

        def counted(self: DecoderSession, *arguments: object, _real=real, _name: str = name) -> object:
            made.append(_name)
            return _real(self, *arguments)

        monkeypatch.setattr(DecoderSession, name, counted)
    yield made


def test_the_known_gap_is_found_within_the_budget(model: VisionLanguageModel, calls: list[str]) -> None:
    """Under a picture the tiny VLM answers what it refuses as text; the search counts each call that it makes."""
    progress: list[tuple[int, int]] = []
    found = worst_images(
        model, HARMFUL, 2, harmless=HARMLESS, calls=60, report_count=lambda done, all_: progress.append((done, all_))
    )
    assert found.prompts == tuple(HARMFUL) and found.blank_refused == 0
    assert [image.refused for image in found.images] == [0, 0]
    assert all(image.refusal < 0.01 for image in found.images)
    assert found.calls == len(calls) <= 60 and found.calls > 50  # the budget is spent, not only kept
    assert progress[-1] == (found.calls, 60) and [done for done, _ in progress] == list(range(1, found.calls + 1))
    told = found.to_json()
    assert (told["prompts"], told["refused_with_a_blank_picture"], told["seed"]) == (4, 0, 0)
    assert not any(text in json.dumps(told) for text in HARMFUL)


def test_a_guard_that_was_fitted_to_pictures_falls_to_a_soft_image(
    guarded: Guarded, model: VisionLanguageModel
) -> None:
    """`restore` refuses every prompt beside the blank picture and none behind the rows that are found."""
    vlm = GuardedVLM.open(guarded("restore"))
    found = worst_images(vlm, HARMFUL, harmless=HARMLESS, calls=60)
    (image,) = found.images
    assert found.blank_refused == 4 and image.refused == 0
    # the rows are what the answers are judged with, wherever prompts are asked
    prompts = beside(found.images, [LabelledPrompt(text, text, "harmful", "text") for text in HARMFUL])
    assert [(prompt.id, prompt.setting) for prompt in prompts] == [(f"{text}-soft-0", "image") for text in HARMFUL]
    assert tally(vlm, prompts, JUDGED_TOKENS).refusals == (False,) * 4
    gap = evaluate(model, vlm, prompts, JUDGED_TOKENS).yardstick.settings[0].gap
    assert gap is not None and (gap.text_only.hits, gap.unguarded.hits, gap.closed) == (4, 0, 0.0)


def test_the_search_does_better_than_the_first_random_prefixes(guarded: Guarded) -> None:
    """On a guard that no image takes refusals from: the probability of a refusal falls as calls are spent."""
    vlm = GuardedVLM.open(guarded("align"))
    few, more = (worst_images(vlm, HARMFUL[:2], calls=calls) for calls in (26, 90))
    assert more.images[0].refusal < few.images[0].refusal
    assert more.images[0].refused == more.blank_refused == 2


def test_the_same_seed_gives_the_same_images(model: VisionLanguageModel) -> None:
    first, again, other = (worst_images(model, HARMFUL[:2], 2, calls=44, seed=seed) for seed in (5, 5, 6))
    ids = [image.token_ids for image in first.images]
    assert first.to_json() == again.to_json() and ids == [image.token_ids for image in again.images]
    assert all(
        np.array_equal(a.features.rows, b.features.rows) for a, b in zip(first.images, again.images, strict=True)
    )
    assert ids[0] != ids[1] and not set(ids) & {image.token_ids for image in other.images}


def test_an_image_is_embeddings_of_known_tokens_times_a_scale(model: VisionLanguageModel) -> None:
    (image,) = worst_images(model, HARMFUL[:2], calls=30).images
    expected = model.token_embeddings(np.array(image.token_ids)) * np.float32(image.scale)
    np.testing.assert_array_equal(image.features.rows, expected)
    assert len(image.token_ids) == len(model.image_features(model.blank_image()).rows) == 16
    marks = {model.chat.image_token_id, model.chat.pad_id, *model.chat.eos_ids}
    assert not marks & set(image.token_ids) and 0.25 <= image.scale <= 4.0


def test_what_cannot_be_searched_is_refused(model: VisionLanguageModel, calls: list[str]) -> None:
    with pytest.raises(GuardError, match=re.escape("0 soft images are none; ask for 1 or more")):
        worst_images(model, HARMFUL, 0)
    too_few = "20 calls are too few to judge 4 prompts; give at least 25"  # as text, blank, one image, one prefix
    with pytest.raises(GuardError, match=re.escape(too_few)):
        worst_images(model, HARMFUL, calls=20)
    assert calls == []
    none = "the model refuses none of 4 harmful prompts as text; no image can lower that"
    with pytest.raises(GuardError, match=re.escape(none)):
        worst_images(model, HARMLESS)
