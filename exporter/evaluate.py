"""Does the guard work? Refusals of harmful and of harmless prompts, per setting, unguarded against guarded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..graphs.errors import PromptsUnusable
from ..runtime.guarded import GuardedVLM
from ..runtime.vlm import Request, Sampling, VisionLanguageModel
from .extract import Progress
from .judge import refused
from .prompts import LABELS, SETTINGS, LabelledPrompt, find_file, fingerprint, read_prompts
from .sources import Watch, open_model, unwatched

EVALUATION_FILES = ("evaluation.jsonl", "evaluation.json", "evaluation.csv")


@dataclass(frozen=True)
class Cell:
    """Refusals of one kind of prompt in one setting."""

    setting: str
    label: str
    refused: int
    asked: int

    @property
    def rate(self) -> float:
        return self.refused / self.asked


@dataclass(frozen=True)
class Tally:
    """What one model did with a set of prompts.

    Attributes:
        cells: one per setting and label that the set has.
        answers: one per prompt, in order.
        refusals: one per prompt, in order.
    """

    cells: tuple[Cell, ...]
    answers: tuple[str, ...]
    refusals: tuple[bool, ...]

    def rate(self, setting: str, label: str) -> float:
        return next(cell.rate for cell in self.cells if (cell.setting, cell.label) == (setting, label))

    def worst(self, label: str) -> float:
        """Lowest refusal rate of harmful prompts, or highest of harmless ones, over the settings."""
        rates = [cell.rate for cell in self.cells if cell.label == label]
        return min(rates) if label == "harmful" else max(rates)


@dataclass(frozen=True)
class Evaluation:
    """Two models on the same prompts."""

    prompts: tuple[LabelledPrompt, ...]
    base: Tally
    guarded: Tally

    def to_json(self) -> dict[str, Any]:
        """Counts and rates per setting and label, and what changed on text."""
        return {
            "schema": "vlmguard.evaluation/1",
            "judge": "refusal keywords, first paragraph",
            "cells": [
                {
                    "setting": base.setting,
                    "label": base.label,
                    "asked": base.asked,
                    "base": {"refused": base.refused, "rate": base.rate},
                    "guarded": {"refused": guarded.refused, "rate": guarded.rate},
                }
                for base, guarded in zip(self.base.cells, self.guarded.cells, strict=True)
            ],
            "text_answers_changed": self.text_answers_changed,
        }

    @property
    def text_answers_changed(self) -> int:
        """How many text-only answers differ, word for word."""
        return sum(
            prompt.setting == "text" and before != after
            for prompt, before, after in zip(self.prompts, self.base.answers, self.guarded.answers, strict=True)
        )


def compare(
    base: Path | str,
    guarded: Path | str,
    prompts: Path | str | None = None,
    max_new_tokens: int = 100,
    batch_size: int = 32,
    watch: Watch | None = None,
) -> Evaluation:
    """An unguarded and a guarded model on the same prompts; by default those found beside the base.

    Raises:
        GuardError: a model or the prompts cannot be opened, or they were calibrated on.
    """
    tell = watch or unwatched
    unguarded, vlm = open_model(base), GuardedVLM.open(guarded)
    path = Path(prompts) if prompts is not None else find_file(unguarded.package.root, EVALUATION_FILES)
    if path is None:
        raise PromptsUnusable(f"{base}: no prompts were given or found; give --prompts with labelled prompts")
    rows = read_prompts(path)
    seen = set((vlm.manifest.calibration or {}).get("prompt_fingerprints", ()))
    shared = sum(fingerprint(row) in seen for row in rows)
    if shared:
        raise PromptsUnusable(f"{path}: {shared} of {len(rows)} prompts were calibrated on; evaluate on held-out ones")
    if not unguarded.sees:
        rows = [row for row in rows if row.setting == "text"]
        if not rows:
            raise PromptsUnusable(f"{path}: holds no prompt in setting text, and {base} takes no images; add some")
    return evaluate(
        unguarded, vlm, rows, max_new_tokens, batch_size, lambda done, total: tell("asking both models", done, total)
    )


def tally(
    model: VisionLanguageModel,
    prompts: Sequence[LabelledPrompt],
    max_new_tokens: int = 100,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Tally:
    """Ask a model every prompt (greedy) and count refusals."""
    requests = [prompt.request(model) for prompt in prompts]
    answers = [""] * len(requests)
    done = 0
    for indices in model.groups(requests, batch_size):
        replies = _answers(model, [requests[index] for index in indices], max_new_tokens)
        for index, reply in zip(indices, replies, strict=True):
            answers[index] = reply
        done += len(indices)
        if progress is not None:
            progress(done, len(requests))
    refusals = [refused(answer) for answer in answers]
    return Tally(tuple(_cells(prompts, refusals)), tuple(answers), tuple(refusals))


def evaluate(
    base: VisionLanguageModel,
    guarded: VisionLanguageModel,
    prompts: Sequence[LabelledPrompt],
    max_new_tokens: int = 100,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Evaluation:
    """The same prompts to the unguarded and to the guarded model."""
    both = 2 * len(prompts)

    def shifted(offset: int) -> Progress:
        return lambda done, _: progress(offset + done, both) if progress is not None else None

    first = tally(base, prompts, max_new_tokens, batch_size, shifted(0))
    second = tally(guarded, prompts, max_new_tokens, batch_size, shifted(len(prompts)))
    return Evaluation(tuple(prompts), first, second)


def _answers(model: VisionLanguageModel, requests: list[Request], max_new_tokens: int) -> list[str]:
    return model.answer(requests, Sampling(max_new_tokens=max_new_tokens), batch_size=len(requests))


def _cells(prompts: Sequence[LabelledPrompt], refusals: Sequence[bool]) -> list[Cell]:
    cells = []
    for setting in SETTINGS:
        for label in LABELS:
            kept = [r for p, r in zip(prompts, refusals, strict=True) if (p.setting, p.label) == (setting, label)]
            if kept:
                cells.append(Cell(setting, label, sum(kept), len(kept)))
    return cells
