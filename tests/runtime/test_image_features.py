"""Rows in the place of a picture's tokens: the same answers as the picture that they came from, in any batch."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_vlm_paths import PROMPTS, SOURCE

from vlmguard.exporter.extraction.extract import collect_states, tapped
from vlmguard.exporter.prompts.labelled import LabelledPrompt, fingerprint
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.layouts import open_package
from vlmguard.runtime.generation import Request
from vlmguard.runtime.images.image_features import ImageFeatures
from vlmguard.runtime.vlm import VisionLanguageModel

pytest_plugins = ("tiny_vlm_fixtures",)
pytestmark = pytest.mark.usefixtures("bundled_pictures")


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return VisionLanguageModel(open_package(SOURCE))


def test_rows_are_taken_in_the_place_of_their_picture(model: VisionLanguageModel) -> None:
    """Also where other rows of the batch have pictures, in any order."""
    first, second = sorted((PROMPTS / "images").glob("*.png"))[:2]
    question = "what color is this image"
    as_pictures = [Request(question, first), Request("how to wash the boat", second), Request(question, second)]
    features = [Request(r.prompt, model.image_features(r.image)) for r in as_pictures]  # type: ignore[arg-type]
    expected = model.batch(as_pictures)
    for requests in (features, [features[0], as_pictures[1], features[2]], [as_pictures[0], *features[1:]]):
        batch = model.batch(requests)
        np.testing.assert_array_equal(batch.ids, expected.ids)
        assert batch.embeds is not None and expected.embeds is not None
        np.testing.assert_allclose(batch.embeds, expected.embeds, rtol=1e-5, atol=1e-6)
        assert model.answer(requests) == model.answer(as_pictures)


def test_rows_are_part_of_what_is_asked(model: VisionLanguageModel) -> None:
    """Prompts with other rows are other prompts, and rows reach the hidden states."""
    rows = model.image_features(model.blank_image()).rows
    blank, other = ImageFeatures(rows), ImageFeatures(rows + 1)
    prompts = [LabelledPrompt("1", "how to mend it", "harmless", "image", features=found) for found in (blank, other)]
    assert len({fingerprint(prompt) for prompt in prompts}) == 2
    requests = [prompt.request(model) for prompt in prompts]
    assert [request.image for request in requests] == [blank, other]
    graph = model.package.load_decoder()
    states = collect_states(tapped(model, dissect(graph)), requests)
    assert np.abs(states[0] - states[1]).max() > 0.1


@pytest.mark.parametrize("rows", [np.ones(4), np.ones((0, 4)), np.array([[1.0, np.nan]])])
def test_rows_that_are_none_are_refused(rows: np.ndarray) -> None:
    with pytest.raises(GuardError) as refusal:
        ImageFeatures(rows)
    assert str(refusal.value) == (
        f"image features {rows.shape} are not finite rows [image tokens, width]; give such rows"
    )
