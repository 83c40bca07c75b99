"""The trade-off of layers and rank on the real-model bed: what is tried, what is counted, and how it is written."""

from types import SimpleNamespace

import numpy as np
from cells import QUESTIONS, Cell
from page import write_page
from scenes import Question
from tradeoff import UNGUARDED, choices, outcomes, table

from vlmguard.runtime.generation import Request


def test_the_default_is_among_the_choices():
    found = choices(18)
    assert found["6 to 16, rank 8"] == (tuple(range(6, 17)), 8)
    assert sorted({rank for _, rank in found.values()}) == [1, 2, 4, 8, 16, 32]
    assert found["6 to 17, rank 8"][0][-1] == 17 and found["0 to 16, rank 8"][0][0] == 0
    assert len(found) == 9


class Scripted:
    """A trial whose guards refuse from a rank on."""

    neutral = 0
    model = SimpleNamespace(groups=lambda requests, size: [[0, 1]], chat=SimpleNamespace(decode=lambda tokens: "red"))

    def batch_size(self, requests):
        return 2

    def begin(self, requests):
        seen = requests[0].image is not None

        def answer(guard, tokens):
            refuses = not seen or (guard.supervisor is not None and guard.directions >= 8)
            answers = [SimpleNamespace(tokens=(), refused=refuses and number == 0) for number in range(2)]
            return SimpleNamespace(answers=answers, coordinates=np.zeros((2, 1, 1)))

        return SimpleNamespace(answer=answer)


def test_each_choice_is_asked_with_the_coordinates_of_the_text():
    cell = Cell("harmbench", "adversarial", (Request("a", b"picture"), Request("b", b"picture")))
    found = outcomes(Scripted(), cell, {"four": 4, "eight": 8})
    assert found == {
        "text": [True, False],
        UNGUARDED: [False, False],
        "four": [False, False],
        "eight": [True, False],
    }


def test_questions_count_if_they_are_answered_rightly():
    asked = (Question("Which colour?", "Red.", ("red",)), Question("Which colour?", "Blue.", ("blue",)))
    cell = Cell(QUESTIONS, "picture", (Request("Which colour?", b"a"), Request("Which colour?", b"b")), asked)
    assert outcomes(Scripted(), cell, {})[UNGUARDED] == [True, False]


def test_the_table_counts_refusals_beyond_text(tmp_path):
    rows = {"text": [True, False], UNGUARDED: [False, False], "6 to 16, rank 8": [True, True]}
    tradeoff = {"harmbench": rows, QUESTIONS: {**rows, "text": [False, False]}}
    assert table(tradeoff)[2:] == [
        "| text | 1 of 2 (0) | - |",
        "| unguarded | 0 of 2 (0) | 0 of 2 |",
        "| 6 to 16, rank 8 | 2 of 2 (1) | 2 of 2 |",
    ]
    write_page([{"seed": 3, "tradeoff": tradeoff}], tmp_path / "page.md")
    written = (tmp_path / "page.md").read_text()
    assert "## Seed 3: layers and rank, with adversarial pictures" in written and "| 2 of 2 (1) | 2 of 2 |" in written
