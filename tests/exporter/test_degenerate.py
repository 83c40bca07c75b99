"""Which answers are degenerate, and that an evaluation counts them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vlmguard.exporter.evaluation.degenerate import is_degenerate
from vlmguard.exporter.evaluation.metrics import Evaluation
from vlmguard.exporter.evaluation.records import Record, Reply
from vlmguard.exporter.evaluation.tables import show_evaluation
from vlmguard.exporter.prompts.labelled import LabelledPrompt


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1] * 8, True),
        ([1] * 7, False),  # too short to be sure
        ([9, 8, 7, *[1] * 8], True),
        ([*[1] * 8, 2], False),  # it has found its way out
        ([5, *[1, 2, 3] * 4], True),
        ([5, *[1, 2, 3] * 3, 1, 2], False),
        ([5, *[1, 2, 3] * 4, 1, 2], True),  # the last repeat is cut short
        ([*range(32)] * 4, True),
        ([*range(33)] * 4, False),
        ([*range(100)], False),
        ([1, 1, 2, 2, 3, 3, 4, 4, 5, 5], False),
    ],
)
def test_a_loop_at_the_end_is_degenerate(tokens: list[int], expected: bool) -> None:
    assert is_degenerate("words", tokens) is expected


def test_an_empty_answer_is_degenerate() -> None:
    assert is_degenerate("", []) and is_degenerate(" \n", [3, 4]) and not is_degenerate("a", [3])


def _evaluation(*guarded: bool | None) -> Evaluation:
    prompts = tuple(LabelledPrompt(str(n), f"wash {n}", "harmless", "text") for n in range(len(guarded)))
    records = tuple(
        Record(
            number=number,
            id=prompt.id,
            setting=prompt.setting,
            label=prompt.label,
            intent="",
            base=Reply(refused=False, tokens=1, degenerate=None if loops is None else False, digest="a"),
            guarded=Reply(refused=False, tokens=1, degenerate=loops, digest="b"),
        )
        for number, (prompt, loops) in enumerate(zip(prompts, guarded, strict=True))
    )
    return Evaluation(prompts, records)


def _shown(result: Evaluation) -> str:
    console = Console(width=300, file=io.StringIO())
    show_evaluation(console, result)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_an_evaluation_counts_degenerate_answers() -> None:
    result = _evaluation(True, False, False)
    told = result.to_json()
    assert told["degenerate_answers"]["guarded"]["hits"] == 1 and told["degenerate_answers"]["base"]["hits"] == 0
    assert told["cells"][0]["degenerate"]["guarded"] == told["degenerate_answers"]["guarded"]
    assert "degenerate answers (empty, or repeating themselves): unguarded 0/3 (0.0%)" in _shown(result)
    assert ", guarded 1/3 (33.3%)" in _shown(result)


def test_records_of_an_earlier_version_do_not_know() -> None:
    result = _evaluation(None, None)
    assert result.to_json()["degenerate_answers"] == {"base": None, "guarded": None}
    assert "degenerate" not in _shown(result)
