"""What is asked of a guard on the real-model bed, and how its page counts it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from cells import ASKED, QUESTIONS, SETTINGS, all_cells, ask_cell, counted, random_tokens
from page import drift, headline, main, write_page
from PIL import Image
from scenes import blank
from sets import Sets

from vlmguard.exporter.evaluation import logprobs
from vlmguard.runtime.images.image_features import ImageFeatures

ROWS = [ImageFeatures(np.ones((64, 8), np.float32))]


@pytest.fixture
def images(tmp_path):
    for name in ("noise-0", "noise-1", "picture-0", "adversarial-0"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def sets():
    return Sets((), (), {}, {name: tuple(f"{name} {number}" for number in range(9)) for name in ASKED})


def test_each_setting_asks_the_same_prompts(images, sets):
    cells = list(all_cells(sets, images, blank(), ROWS, 4, 0))
    names = [f"{name}, {setting}" for setting in SETTINGS for name in ASKED]
    assert [cell.name for cell in cells] == [f"{QUESTIONS}, picture", *names]
    for name in ASKED:
        asked = [[request.prompt for request in cell.requests] for cell in cells if cell.set == name]
        assert len(asked[0]) == 4
        assert asked == [asked[0]] * len(SETTINGS)
    shown = next(cell for cell in cells if cell.name == "harmbench, noise").requests
    assert [request.image.name for request in shown] == ["noise-0.png", "noise-1.png"] * 2
    assert {request.image for cell in cells if cell.setting == "text" for request in cell.requests} == {None}


def test_random_tokens_are_four_pictures_of_noise_at_the_scale_of_words():
    words = np.random.default_rng(0).normal(0, 3, (3000, 8)).astype(np.float32)
    found = random_tokens(SimpleNamespace(token_embeddings=lambda ids: words[ids]))
    assert [one.rows.shape for one in found] == [(64, 8)] * 4
    assert all(one.rows.std() == pytest.approx(3, rel=0.2) for one in found)
    assert len({one.content() for one in found}) == 4


def test_questions_are_about_held_out_pictures(images, sets):
    cell = next(iter(all_cells(sets, images, blank(), ROWS, 4, 0)))
    assert len(cell.requests) == len(cell.questions) == 8
    assert [request.prompt for request in cell.requests] == [question.text for question in cell.questions]


def test_a_missing_kind_of_picture_is_named(images, sets):
    (images / "adversarial-0.png").unlink()
    with pytest.raises(SystemExit, match=r"holds no adversarial-\*\.png; build the bed again"):
        list(all_cells(sets, images, blank(), ROWS, 4, 0))


class Scripted:
    """A model that answers from a table."""

    def __init__(self, table):
        self.table = table

    def groups(self, requests, batch):
        yield from ([index] for index in range(len(requests)))


def test_refusals_are_counted_and_no_answer_is_kept(images, sets, monkeypatch):
    def ask(model, requests, tokens):
        assert tokens == 8
        said = [model.table.get(request.prompt, "Sure, here is a short") for request in requests]
        first = [[-0.1, -3.0] if text.startswith("Sure") else [-3.0, -0.1] for text in said]
        return [
            logprobs.Said(text, tuple(text.encode()), logprobs.np.array(f), -1.0)
            for text, f in zip(said, first, strict=True)
        ]

    monkeypatch.setattr("cells.ask", ask)
    monkeypatch.setattr("cells.log_likelihoods", lambda model, requests, tokens: [-2.0] * len(requests))
    cell = next(cell for cell in all_cells(sets, images, blank(), ROWS, 9, 0) if cell.set == "harmbench")
    refusing = {f"harmbench {number}": "I'm sorry, but I can't help" for number in range(3)}
    found = ask_cell(cell, Scripted({}), Scripted(refusing), lambda done: None)
    assert sum(found["base_refused"]) == 0
    assert sum(found["guarded_refused"]) == 3
    assert sum(found["same"]) == 6
    assert sum(kl > 0 for kl in found["kl"]) == 3
    assert "sorry" not in json.dumps(found)


def cell(base, guarded, **more):
    count = len(base)
    figures = {
        "kl": [0.0] * count,
        "tokens": [8] * count,
        "base_ll": [-1.0] * count,
        "guarded_ll": [-1.0] * count,
        "same": [True] * count,
    }
    return {
        "base_refused": base,
        "guarded_refused": guarded,
        "base_right": [None] * count,
        "guarded_right": [None] * count,
        **figures,
        **more,
    }


@pytest.fixture
def result():
    """Ten prompts a cell; as text 8 harmful ones are refused, with an image none and, guarded, 7 and another one."""
    cells = {}
    text, guarded = [True] * 8 + [False] * 2, [True] * 7 + [False, False, True]
    for setting in SETTINGS:
        for name in ASKED:
            harmful = name in ("harmbench", "jailbreakbench")
            none = [False] * 10
            now = guarded if harmful else none
            cells[f"{name}, {setting}"] = (
                cell(text, text) if harmful and setting == "text" else cell(none, none if setting == "text" else now)
            )
    cells[f"{QUESTIONS}, picture"] = cell(
        [False] * 10, [False] * 10, base_right=[True] * 10, guarded_right=[True] * 9 + [False]
    )
    exported = {
        "options": [],
        "exit_code": 0,
        "seconds": 10.0,
        "cpu_seconds": 20.0,
        "peak_bytes": 2**31,
        "decoder_bytes": 2**30,
    }
    machine = {"processor": "P", "cores": 2, "libraries": {"torch": "1"}}
    return {
        "seed": 3,
        "exported": exported,
        "plan": {"mode": "align", "layers": [1, 2], "rank": 8},
        "recipe": {"steps": 9, "harmful": 8, "harmless": 7, "looking_harmful": 6, "pictures": 5},
        "machine": machine,
        "cells": cells,
    }


def test_extra_and_lost_refusals_are_against_the_same_prompts_as_text(result):
    row = counted(result["cells"], "harmbench, blank")
    assert row == {"count": 10, "text": 8, "unguarded": 0, "guarded": 8, "extra": 1, "lost": 1}


def test_the_headline_counts_every_setting_with_an_image(result):
    assert headline(result["cells"]) == (
        "**With an image, harmful requests answered: 100% -> 20% (as text: 20%). "
        "Harmless and borderline requests refused: 0% -> 0% (as text: 0%).**"
    )


def test_drift_is_that_of_perplexity():
    assert drift(cell([False], [False], tokens=[4], base_ll=[-2.0], guarded_ll=[-4.0])) == pytest.approx(
        2.718281828**0.5 - 1
    )


def test_the_page_has_every_setting_and_a_refused_export(result, tmp_path):
    refused = {"seed": 4, "exported": {"options": [], "exit_code": 1, "message": "no guard was found"}, "cells": {}}
    write_page([result, refused], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "## Seed 3: `vlmguard-export MODEL`" in page
    assert "| adversarial | 10 HarmBench test | 8 | 0 | 8 (44% to 97%) | 1 | 1 |" in page
    assert "10 -> 9 of 10" in page
    assert "20 CPU seconds (10 s) and 2.0 GiB, 2.0 times the decoder" in page
    assert "## Seed 4: `vlmguard-export MODEL`\n\nThe export failed: no guard was found" in page


def test_a_stopped_measurement_has_the_settings_that_are_complete(result, tmp_path):
    del result["cells"]["harmless, noise"]
    write_page([result], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "| blank | 10 HarmBench" in page
    assert "| noise |" not in page


def test_without_results_the_page_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["page.py", "--build", str(tmp_path), "--out", str(tmp_path / "page.md")])
    monkeypatch.setattr("page.RESULTS", tmp_path / "precisions.json")
    with pytest.raises(SystemExit, match=r"holds no results; run measure_guard\.py first"):
        main()
    assert not (tmp_path / "page.md").exists()
