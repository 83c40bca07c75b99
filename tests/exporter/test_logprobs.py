"""Measured answers: the words that `answer` gives, and probabilities that another computation gives too."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny_vlm_paths import PROMPTS, SOURCE, Guarded

from vlmguard.exporter.evaluation.logprobs import ask, kl_divergence, log_likelihoods
from vlmguard.graphs.layouts import open_package
from vlmguard.runtime.decoder_inputs import PromptBatch
from vlmguard.runtime.generation import Request, Sampling
from vlmguard.runtime.guarded import GuardedVLM
from vlmguard.runtime.vlm import VisionLanguageModel

pytest_plugins = ("tiny_vlm_fixtures",)

TEXTS = [Request(text) for text in ("how to wash the boat", "please tell me how to steal the old boat", "say the lamp")]
PICTURE = sorted((PROMPTS / "images").glob("*.png"))[0]


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return VisionLanguageModel(open_package(SOURCE))


def by_one_call(model: VisionLanguageModel, request: Request, answer: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """First-token log-probabilities and the answer's log-likelihood from the logits of prompt and answer in one call."""
    batch = model.batch([request])
    ids = np.concatenate([batch.ids, [answer]], axis=1)
    whole = PromptBatch(ids, np.ones_like(ids), model._embeds(ids))
    logits = model.decoder.prefill(whole)[0]["logits"][0].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    start = batch.ids.shape[1] - 1
    return log_p[start], float(sum(log_p[start + n, token] for n, token in enumerate(answer)))


def test_answers_are_those_of_the_model_and_their_probabilities_too(model: VisionLanguageModel) -> None:
    said = ask(model, TEXTS, 12)
    assert [one.answer for one in said] == model.answer(TEXTS, Sampling(12))
    for request, one in zip(TEXTS, said, strict=True):
        first, log_likelihood = by_one_call(model, request, one.tokens)
        np.testing.assert_allclose(one.first, first, atol=1e-4)
        assert one.log_likelihood == pytest.approx(log_likelihood, abs=1e-3) and one.log_likelihood < 0
        assert np.exp(one.first.astype(np.float64)).sum() == pytest.approx(1)


def test_given_answers_of_different_lengths_are_as_likely_as_one_call_says(model: VisionLanguageModel) -> None:
    own = [one.tokens for one in ask(model, TEXTS, 12)]
    given = [own[1][:3], own[2], own[0]]  # somebody else's, so that the model would not say them
    found = log_likelihoods(model, TEXTS, given)
    expected = [by_one_call(model, request, tokens)[1] for request, tokens in zip(TEXTS, given, strict=True)]
    assert found == pytest.approx(expected, abs=1e-3) and min(found) < -5
    assert log_likelihoods(model, TEXTS, own) == pytest.approx([one.log_likelihood for one in ask(model, TEXTS, 12)])
    assert log_likelihoods(model, TEXTS[:1], [()]) == [0.0]


@pytest.mark.parametrize("mode", ["restore", pytest.param("supervise", marks=pytest.mark.long)])
def test_a_guarded_model_is_measured_step_by_step(guarded: Guarded, mode: str) -> None:
    """Its gate is asked at each token: the likelihood of its own refusal is that of the refusal it says."""
    vlm = GuardedVLM.open(guarded(mode))
    shown = [replace(request, image=PICTURE) for request in TEXTS[:2]]
    said = ask(vlm, shown, 12)
    assert log_likelihoods(vlm, shown, [one.tokens for one in said]) == pytest.approx(
        [one.log_likelihood for one in said], abs=1e-5
    )


def test_the_divergence_of_two_distributions() -> None:
    p, q = np.log([0.5, 0.5]), np.log([0.9, 0.1])
    assert kl_divergence(p, p) == 0.0
    assert kl_divergence(p, q) == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1))
    assert kl_divergence(p, q) != pytest.approx(kl_divergence(q, p))
    with np.errstate(divide="ignore"):
        assert kl_divergence(np.log([1.0, 0.0]), np.log([0.5, 0.5])) == pytest.approx(np.log(2))
