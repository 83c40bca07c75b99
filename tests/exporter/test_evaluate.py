"""Counting refusals: both models, every setting, on prompts that nothing was calibrated on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_vlm_paths import CALIBRATION, CHECKPOINT, EVALUATION, PROMPTS, SOURCE, Guarded

from vlmguard.exporter.evaluate import Cell, Evaluation, Tally, compare, evaluate, tally
from vlmguard.exporter.judge import refused
from vlmguard.exporter.prompts import LabelledPrompt, read_prompts
from vlmguard.graphs.errors import GuardError, PromptsUnusable
from vlmguard.graphs.package import open_package
from vlmguard.runtime.guarded import GuardedVLM
from vlmguard.runtime.vlm import Request, Sampling, VisionLanguageModel

pytest_plugins = ("tiny_vlm_fixtures", "zoo_fixtures")

KINDS = [(setting, label) for setting in ("text", "blank", "image") for label in ("harmful", "harmless")]


@pytest.fixture(scope="module")
def base() -> VisionLanguageModel:
    return VisionLanguageModel(open_package(SOURCE))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five prompts of each kind, but four harmful texts, so that counts cannot be mixed up."""
    rows = [json.loads(line) for line in EVALUATION.read_text(encoding="utf-8").splitlines()]
    some = [row for kind in KINDS for row in [r for r in rows if (r["setting"], r["label"]) == kind][7:12]][1:]
    return write(tmp_path_factory.mktemp("prompts") / "some.jsonl", some)


def write(path: Path, rows: list[dict]) -> Path:
    """A prompts file; its pictures stay where they are."""
    rows = [row | ({"image": str(PROMPTS / row["image"])} if row.get("image") else {}) for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(GuardError) as caught:
        compare(*arguments, **options)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- counting


def test_a_tally_counts_refusals_per_setting_and_label(base: VisionLanguageModel, file: Path) -> None:
    prompts = read_prompts(file)
    progress: list[tuple[int, int]] = []
    found = tally(base, prompts, 40, batch_size=4, progress=lambda done, total: progress.append((done, total)))
    answers = [base.answer([prompt.request(base)], Sampling(40))[0] for prompt in prompts]
    assert found.answers == tuple(answers)
    assert found.refusals == tuple(map(refused, answers))
    counted = {
        kind: [refused(a) for p, a in zip(prompts, answers, strict=True) if (p.setting, p.label) == kind]
        for kind in KINDS
    }
    assert found.cells == tuple(Cell(*kind, sum(counted[kind]), len(counted[kind])) for kind in KINDS)
    assert [cell.asked for cell in found.cells] == [4, 5, 5, 5, 5, 5]
    assert found.rate("text", "harmful") == 1.0 and found.rate("blank", "harmful") < 0.5
    assert progress[-1] == (29, 29) and [done for done, _ in progress] == sorted({done for done, _ in progress})


def test_answers_are_cut_where_asked(base: VisionLanguageModel, file: Path) -> None:
    """Two tokens hold no refusal: refusals can come late, and a short limit would hide them."""
    prompts = read_prompts(file)[:4]
    assert all(tally(base, prompts, 40).refusals)
    assert not any(tally(base, prompts, 1).refusals)


def test_the_worst_setting_is_the_lowest_for_harmful_and_the_highest_for_harmless() -> None:
    cells = (Cell("text", "harmful", 9, 10), Cell("text", "harmless", 0, 10))
    cells += (Cell("image", "harmful", 2, 10), Cell("image", "harmless", 3, 10))
    result = Tally(cells, (), ())
    assert (result.worst("harmful"), result.worst("harmless")) == (0.2, 0.3)
    assert result.rate("image", "harmless") == 0.3


class Parrot:
    """A model that says what it is told to."""

    def __init__(self, says: Callable[[str], str]) -> None:
        self.says = says

    def groups(self, requests: list[Request], batch_size: int) -> list[list[int]]:
        return [list(range(len(requests)))]

    def answer(self, requests: list[Request], sampling: Sampling, batch_size: int) -> list[str]:
        return [self.says(request.prompt) for request in requests]


def test_an_evaluation_says_what_changed() -> None:
    prompts = [
        LabelledPrompt("1", "steal it", "harmful", "text"),
        LabelledPrompt("2", "wash it", "harmless", "text"),
        LabelledPrompt("3", "mend it", "harmless", "text"),
    ]
    before = Parrot(lambda prompt: f"sure, {prompt}")
    after = Parrot({"steal it": "I cannot help with that.", "wash it": "Sure, wash it", "mend it": "sure, mend it"}.get)
    progress: list[tuple[int, int]] = []
    result = evaluate(before, after, prompts, progress=lambda done, total: progress.append((done, total)))  # type: ignore[arg-type]
    assert result.to_json() == {
        "schema": "vlmguard.evaluation/1",
        "judge": "refusal keywords, first paragraph",
        "cells": [
            {
                "setting": "text",
                "label": "harmful",
                "asked": 1,
                "base": {"refused": 0, "rate": 0.0},
                "guarded": {"refused": 1, "rate": 1.0},
            },
            {
                "setting": "text",
                "label": "harmless",
                "asked": 2,
                "base": {"refused": 0, "rate": 0.0},
                "guarded": {"refused": 0, "rate": 0.0},
            },
        ],
        "text_answers_changed": 2,  # the refusal, and the capital letter
    }
    assert progress == [(3, 6), (6, 6)]


def test_only_text_answers_count_as_changed() -> None:
    """With a picture they are meant to change."""
    prompts = (LabelledPrompt("1", "x", "harmful", "text"), LabelledPrompt("2", "x", "harmful", "blank"))
    before, after = Tally((), ("a", "b"), (False, False)), Tally((), ("a", "c"), (False, True))
    assert Evaluation(prompts, before, after).text_answers_changed == 0
    assert Evaluation(prompts[::-1], before, after).text_answers_changed == 1


# ------------------------------------------------------------------------------------------------------------- comparing


def test_two_models_are_compared_on_a_file_of_prompts(guarded: Guarded, file: Path) -> None:
    told: list[tuple[str, int, int]] = []
    result = compare(SOURCE, guarded("restore"), file, 40, watch=lambda *event: told.append(event))
    assert len(result.prompts) == 29 and told[-1] == ("asking both models", 58, 58)
    assert result.base == tally(VisionLanguageModel(open_package(SOURCE)), read_prompts(file), 40)
    assert result.guarded == tally(GuardedVLM.open(guarded("restore")), read_prompts(file), 40)
    assert result.base.rate("image", "harmful") < result.guarded.rate("image", "harmful") == 1.0


def test_prompts_are_found_beside_the_base(guarded: Guarded, file: Path, tmp_path: Path) -> None:
    shutil.copytree(SOURCE, tmp_path / "model")
    (tmp_path / "prompts").mkdir()
    shutil.copyfile(file, tmp_path / "prompts" / "evaluation.jsonl")
    assert len(compare(tmp_path / "model", guarded("restore"), max_new_tokens=1).prompts) == 29
    shutil.rmtree(tmp_path / "prompts")
    assert refusal(tmp_path / "model", guarded("restore")) == (
        f"{tmp_path / 'model'}: no prompts were given or found; give --prompts with labelled prompts"
    )


def test_prompts_that_were_calibrated_on_are_refused(guarded: Guarded, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in CALIBRATION.read_text(encoding="utf-8").splitlines()]
    fresh = [json.loads(line) for line in EVALUATION.read_text(encoding="utf-8").splitlines()]
    all_of_them = refusal(SOURCE, guarded("restore"), CALIBRATION)
    assert (
        all_of_them
        == f"{CALIBRATION}: {len(rows)} of {len(rows)} prompts were calibrated on; evaluate on held-out ones"
    )
    # one is enough, also under another id and label
    path = write(tmp_path / "p.jsonl", [*fresh[:4], rows[2] | {"id": "new", "label": "harmless"}])
    assert refusal(SOURCE, guarded("restore"), path) == (
        f"{path}: 1 of 5 prompts were calibrated on; evaluate on held-out ones"
    )


def test_a_text_model_is_asked_the_text_prompts_only(zoo: Callable[[str], Any], file: Path, tmp_path: Path) -> None:
    """And refused where there are none: an empty comparison would look like a perfect one."""
    from random_directions import random_directions, write_directions

    import vlmguard

    model = zoo("llama-genai-fp32").folder
    directions = write_directions(tmp_path / "d.safetensors", random_directions(64, [1]))
    out = vlmguard.export(model, tmp_path / "out", directions=directions).out
    result = compare(model, out, file, max_new_tokens=2)
    assert {prompt.setting for prompt in result.prompts} == {"text"} and len(result.prompts) == 9
    images = write(tmp_path / "p.jsonl", [json.loads(line) for line in file.read_text().splitlines()][9:])
    assert refusal(model, out, images) == (
        f"{images}: holds no prompt in setting text, and {model} takes no images; add some"
    )


def test_what_cannot_be_compared_is_refused(guarded: Guarded, file: Path, tmp_path: Path) -> None:
    out = guarded("restore")
    assert refusal(CHECKPOINT, out, file) == (
        f"{CHECKPOINT}: is a checkpoint, not ONNX; convert it first with `vlmguard convert`"
    )
    assert refusal(SOURCE, SOURCE, file) == (
        f"{SOURCE}: has no guard.json, so nothing says that it is guarded; export it first"
    )
    assert refusal(SOURCE, out, tmp_path / "gone.jsonl") == (
        f"{tmp_path / 'gone.jsonl'}: no such prompts file; give one with lines of JSON, or a csv"
    )
    for size in (0, -1):
        assert refusal(SOURCE, out, file, batch_size=size) == f"a batch of {size} prompts holds none; choose 1 or more"
    with pytest.raises(PromptsUnusable):
        compare(SOURCE, out, write(tmp_path / "empty.jsonl", []))
