"""The decode loop, on a decoder that is a table of logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from vlmguard.runtime.decode_loop import decode, rows_of_tokens
from vlmguard.runtime.generation import Step

VOCABULARY, END = 7, 6


class Table:
    """Call `n` has the logits `table[n]`; what each call was fed is kept."""

    def __init__(self, table: np.ndarray) -> None:
        self.table, self.fed = table, []

    def last_logits(self, outputs: dict[str, Any]) -> np.ndarray:
        return outputs["logits"]

    def step(self, state: Any, column: np.ndarray, embeds: np.ndarray | None) -> dict[str, Any]:
        self.fed.append((column, embeds))
        return {"logits": self.table[len(self.fed)]}


def one_hot(script: list[list[int]]) -> np.ndarray:
    """Logits `[calls, batch, vocabulary]` whose likeliest tokens are those of the rows of the script."""
    return np.eye(VOCABULARY, dtype=np.float32)[np.array(script).T]


def run(script: list[list[int]], most: int, **hooks: Any) -> tuple[Table, list[Step]]:
    table = Table(one_hot(script))
    hooks = {"choose": lambda logits: logits.argmax(-1), "embeddings": lambda column: None} | hooks
    state: Any = SimpleNamespace(mask=np.ones((len(script), 3), np.int64))
    session: Any = table
    steps = list(decode(session, {"logits": table.table[0]}, state, hooks["choose"], hooks["embeddings"], {END}, most))
    return table, steps


def test_rows_end_by_themselves_and_the_others_go_on() -> None:
    table, steps = run([[1, END, 2, 3], [4, 5, END, 1]], most=4)
    assert [step.tokens for step in steps] == [[1, 4], [None, 5], [None, None]]
    assert rows_of_tokens(steps) == [[1], [4, 5]]
    assert [column.tolist() for column, _ in table.fed] == [[[1], [4]], [[END], [5]]]  # no call follows the last token


def test_an_answer_has_at_most_so_many_tokens_and_a_call_less() -> None:
    table, steps = run([[1, 2, 3, 4]], most=3)
    assert rows_of_tokens(steps) == [[1, 2, 3]] and len(table.fed) == 2
    assert run([[1, 2]], most=0)[1] == []


def test_tokens_are_chosen_and_embedded_by_the_hooks() -> None:
    forced = iter(([3], [0], [END]))
    seen: list[np.ndarray] = []

    def choose(logits: np.ndarray) -> np.ndarray:
        seen.append(logits)
        return np.array(next(forced))

    table, steps = run([[1, 2, 4, 5]], 4, choose=choose, embeddings=lambda column: column[..., None] * 0.5)
    assert rows_of_tokens(steps) == [[3, 0]]
    np.testing.assert_array_equal(np.stack(seen), table.table[:3])
    assert [embeds.tolist() for _, embeds in table.fed] == [[[[1.5]]], [[[0.0]]]]


def test_each_step_has_the_outputs_that_its_tokens_were_chosen_from() -> None:
    table, steps = run([[1, 2, 3]], most=3)
    for number, step in enumerate(steps):
        np.testing.assert_array_equal(step.outputs["logits"], table.table[number])
