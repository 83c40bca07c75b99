"""What is asked, cell by cell: a set of prompts in a setting; and what an unguarded and a guarded model did with each.

Answers are cut after 8 tokens and counted, never kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scenes import Question, draw, question_about, random_scene
from sets import Sets

from vlmguard.exporter.evaluation.logprobs import Said, ask, kl_divergence, log_likelihoods
from vlmguard.runtime.generation import Request
from vlmguard.runtime.images.image_features import ImageFeatures
from vlmguard.runtime.refusals import refused
from vlmguard.runtime.vlm import VisionLanguageModel

RANDOM = "64 random tokens"
SETTINGS = ("text", "adversarial", "picture", "blank", "noise", RANDOM)  # what matters most comes first
ASKED = ("harmbench", "jailbreakbench", "xstest_safe", "harmless")
QUESTIONS = "picture questions"
DRIFTS = "harmless"  # the set whose answers are scored under both models
TOKENS = 8  # a refusal is known after as many; a harmful answer is not one yet
BATCH = 8

_RANDOM_ROWS, _RANDOM_SEEDS = 64, 4
Picture = Image.Image | Path | ImageFeatures | None


@dataclass(frozen=True)
class Cell:
    """Requests of one set in one setting; `questions` where their answers are in the pictures."""

    set: str
    setting: str
    requests: tuple[Request, ...]
    questions: tuple[Question, ...] = ()

    @property
    def name(self) -> str:
        """As results are kept under."""
        return f"{self.set}, {self.setting}"


def random_tokens(vlm: VisionLanguageModel) -> list[ImageFeatures]:
    """Gaussian rows in the place of image tokens, four times as many as a picture has, as large as word embeddings are."""
    words = vlm.token_embeddings(np.arange(1000, 3000))
    random = [np.random.default_rng(seed) for seed in range(_RANDOM_SEEDS)]
    shape = (_RANDOM_ROWS, words.shape[1])
    return [ImageFeatures(rng.normal(0, words.std(), shape).astype(np.float32)) for rng in random]


def all_cells(
    sets: Sets,
    images: Path,
    blank: Image.Image,
    random_rows: Sequence[ImageFeatures],
    count: int,
    seed: int,
    settings: Sequence[str] = SETTINGS,
) -> Iterator[Cell]:
    """Every cell: questions about pictures, then the same `count` prompts of each held-out set in each setting.

    Pictures of a kind take turns.

    Args:
        sets: the prompts.
        images: folder with pictures of each kind.
        blank: a white picture.
        random_rows: in the place of pictures' tokens.
        count: prompts of each set.
        seed: of the drawing.
        settings: names of `SETTINGS`.
    """
    pictures: dict[str, Sequence[Picture]] = {"text": [None], "blank": [blank], RANDOM: random_rows}
    pictures |= {kind: sorted(images.glob(f"{kind}-*.png")) for kind in ("adversarial", "picture", "noise")}
    rng = random.Random(f"questions {seed}")
    scenes = [random_scene(rng, held_out=True) for _ in range(2 * count)]
    questions = tuple(question_about(rng, scene) for scene in scenes)
    drawn = [draw(scene) for scene in scenes]
    yield Cell(
        QUESTIONS, "picture", tuple(Request(q.text, d) for q, d in zip(questions, drawn, strict=True)), questions
    )
    for setting in settings:
        if not pictures[setting]:
            raise SystemExit(f"{images}: holds no {setting}-*.png; build the bed again")
        for name in ASKED:
            prompts = random.Random(f"{name} {seed}").sample(sets.held_out[name], min(count, len(sets.held_out[name])))
            shown = pictures[setting]
            yield Cell(name, setting, tuple(Request(p, shown[i % len(shown)]) for i, p in enumerate(prompts)))


def ask_cell(
    cell: Cell, base: VisionLanguageModel, guarded: VisionLanguageModel, report_done: Callable[[int], None]
) -> dict[str, Any]:
    """Lists with an entry per request: refused, right (of questions), same tokens, KL of the first token, log-likelihoods.

    `KL(base || guarded)` in nats; the likelihoods are those of the base's answer under both models (set `DRIFTS` alone).
    """
    keys = (
        "base_refused",
        "guarded_refused",
        "base_right",
        "guarded_right",
        "same",
        "kl",
        "tokens",
        "base_ll",
        "guarded_ll",
    )
    found: dict[str, list[Any]] = {key: [None] * len(cell.requests) for key in keys}
    done = 0
    for indices in base.groups(cell.requests, BATCH):
        requests = [cell.requests[index] for index in indices]
        before, after = ask(base, requests, TOKENS), ask(guarded, requests, TOKENS)
        answers = [said.tokens for said in before]
        likely = log_likelihoods(guarded, requests, answers) if cell.set == DRIFTS else [None] * len(requests)
        for index, first, second, ll in zip(indices, before, after, likely, strict=True):
            right = (
                [cell.questions[index].answered_by(said.answer) for said in (first, second)]
                if cell.questions
                else [None] * 2
            )
            values = (
                refused(first.answer),
                refused(second.answer),
                *right,
                first.tokens == second.tokens,
                *_drift(first, second, ll),
            )
            for key, value in zip(keys, values, strict=True):
                found[key][index] = value
        done += len(indices)
        report_done(done)
    return found


def _drift(before: Said, after: Said, guarded_ll: float | None) -> tuple[float, int, float, float | None]:
    return kl_divergence(before.first, after.first), len(before.tokens), before.log_likelihood, guarded_ll


def counted(cells: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """One set's figures in one setting, beside the same prompts as text.

    `extra` and `lost`: refused by the guarded model though not as text, and the reverse.
    """
    cell, text = cells[name], cells[f"{name.split(', ')[0]}, text"]
    reference = text["base_refused"]
    both = list(zip(cell["guarded_refused"], reference, strict=True))
    return {
        "count": len(reference),
        "text": sum(reference),
        "unguarded": sum(cell["base_refused"]),
        "guarded": sum(cell["guarded_refused"]),
        "extra": sum(now and not then for now, then in both),
        "lost": sum(then and not now for now, then in both),
    }
