"""Reads the calibration's data from the unguarded model: hidden states, and answers to the texts alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ...graphs.anatomy import DecoderAnatomy
from ...graphs.directions import Directions
from ...graphs.progress import ProgressCallback
from ...graphs.spec import GuardSpec
from ...runtime.generation import Request, Sampling
from ...runtime.vlm import VisionLanguageModel
from ..evaluation.metrics import Tally
from ..extraction.extract import collect_answer_states, collect_states, tapped
from ..prompts.labelled import LabelledPrompt
from .fitting import Study

_GATED_TOKENS = 12  # of each harmless answer, for the gate: more memory, little more to learn


def read_study(
    model: VisionLanguageModel,
    anatomy: DecoderAnatomy,
    directions: Directions,
    prompts: Sequence[LabelledPrompt],
    spec: GuardSpec,
    budget: float,
    max_new_tokens: int,
    report_progress: ProgressCallback,
) -> Study:
    """Run the unguarded model on the calibration prompts.

    Args:
        model: the unguarded model.
        anatomy: of its decoder.
        directions: an SSD for each layer that may be chosen.
        prompts: labelled prompts.
        spec: the guard's fixed settings.
        budget: largest share of harmless prompts refused.
        max_new_tokens: longest answer.
        report_progress: called with `(stage, done, total)`.
    """
    tap = tapped(model, anatomy)
    requests = [prompt.request(model) for prompt in prompts]
    harmless = [index for index, prompt in enumerate(prompts) if prompt.label == "harmless"]
    states = collect_states(
        tap, requests, report_count=lambda done, total: report_progress("reading states", done, total)
    )
    # a gate held from the prompt on does not decide at tokens of the answer
    tokens = min(max_new_tokens, _GATED_TOKENS) if spec.gate == "token" else 0
    answers = collect_answer_states(tap, [requests[i] for i in harmless], tokens) if tokens else []
    of_answers = dict(zip(harmless, answers, strict=bool(tokens)))
    nothing = np.zeros((0, *states.shape[1:]), np.float32)
    return Study(
        directions=directions,
        mode=spec.mode or "restore",
        budget=budget,
        prompts=prompts,
        states=states,
        text_states=_once_each(prompts, lambda texts: collect_states(tap, texts)),
        answer_states=[of_answers.get(index, nothing) for index in range(len(prompts))],
        tau=spec.tau,
    )


def _once_each(prompts: Sequence[LabelledPrompt], read: Callable[[list[Request]], np.ndarray]) -> np.ndarray:
    """One row per prompt, read from its text alone; a text runs once, however many images it has."""
    texts = list(dict.fromkeys(prompt.prompt for prompt in prompts))
    rows = read([Request(text) for text in texts])
    place = {text: row for row, text in enumerate(texts)}
    return rows[[place[prompt.prompt] for prompt in prompts]]


def text_answers(
    model: VisionLanguageModel, prompts: Sequence[LabelledPrompt], base: Tally, max_new_tokens: int
) -> list[str]:
    """The unguarded model's answers to each prompt's text alone.

    Args:
        model: the unguarded model.
        prompts: labelled prompts.
        base: its results on them; prompts in setting `text` are not run again.
        max_new_tokens: longest answer.
    """
    known: Mapping[str, str] = {
        prompt.prompt: answer for prompt, answer in zip(prompts, base.answers, strict=True) if prompt.setting == "text"
    }
    others = list(dict.fromkeys(prompt.prompt for prompt in prompts if prompt.prompt not in known))
    said = model.answer([Request(text) for text in others], Sampling(max_new_tokens=max_new_tokens))
    answers = {**known, **dict(zip(others, said, strict=True))}
    return [answers[prompt.prompt] for prompt in prompts]
