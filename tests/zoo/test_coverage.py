"""docs/coverage.md says what the results say, and hides nothing: a missing graph, a missing answer, a failure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from zoo import coverage
from zoo.cases import CASES, expected_checks
from zoo.coverage import bound, document, errors_in, rows_of
from zoo.records import RESULTS, CheckRecord, GraphRecord, Ledger, Results, read_results, versions

GRAPH = GraphRecord("one-fp32", "llama", "torch 2.13", "float32", "float32", ("A",), 4, 4, ("add",), True, "torch")
REFUSED = GraphRecord(
    "two-int8", "llama", "torch 2.13", "float32", expected=4, refusal="the stream is int8; use a float one"
)
NAMES = (GRAPH.model, REFUSED.model)


def answers(graph: GraphRecord) -> list[CheckRecord]:
    if graph.refusal:
        return [CheckRecord(graph.model, "refusal", "", 1, 0.0, 0.0, True, graph.refusal)]
    limits = {"closed": 0.0, "anatomy": 0.0}
    return [
        CheckRecord(graph.model, check, guard, 10, 0.0 if check in limits else 3e-7, limits.get(check, 1e-4), True)
        for check, guard in sorted(expected_checks(graph.truth, graph.cached))
    ]


@pytest.fixture
def results() -> Results:
    return Results(
        {"torch": "2.13"}, {g.model: g for g in (GRAPH, REFUSED)}, {g.model: answers(g) for g in (GRAPH, REFUSED)}
    )


def test_what_holds_is_said_with_bounds(results: Results) -> None:
    text = document(results, NAMES)
    assert "2 graphs of 1 family by 1 exporter: 1 guarded and proved, 1 rejected as expected.\n" in text
    assert "| torch 2.13 | llama | float32 | 1 of 1 |" in text
    assert "| `two-int8` | torch 2.13 | the stream is int8; use a float one |" in text
    assert (
        "| `one-fp32` | A | float32 | float32 | 4 | add | < 1e-6 | < 1e-6 | < 1e-6 | < 1e-6 | bit-exact | 2 of 2 |"
        in text
    )
    assert "Made with torch 2.13." in text and "does not work" not in text
    assert document(results, reversed(NAMES)) == text


def changed(results: Results, name: str, **changes: object) -> None:
    kept = results.checks[GRAPH.model]
    at = next(place for place, check in enumerate(kept) if check.check == name)
    kept[at] = replace(kept[at], **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda r: r.graphs.pop(GRAPH.model), "one-fp32: no record; its test did not run or did not get far"),
        (lambda r: r.checks[GRAPH.model].pop(0), "one-fp32: no answer to anatomy"),
        (lambda r: r.checks.pop(REFUSED.model), "two-int8: no answer to refusal"),
        (lambda r: changed(r, "states", compared=0), "one-fp32: states: nothing was compared"),
        (lambda r: changed(r, "states", ok=False, worst=0.5), "one-fp32: states: 5.0e-01 where 1e-04 is allowed"),
        (
            lambda r: changed(r, "closed", ok=False, worst=1e-5, note="3 of 9 numbers differ"),
            f"one-fp32: closed {min(c.name for c in CASES)}: 1.0e-05 where 0e+00 is allowed; 3 of 9 numbers differ",
        ),
        (
            lambda r: r.graphs.update(old=replace(GRAPH, model="old")),
            "old: not in the zoo's table; empty the results and run `make zoo` again",
        ),
    ],
)
def test_what_does_not_hold_is_said(results: Results, spoil: Callable[[Results], object], error: str) -> None:
    spoil(results)
    assert error in errors_in(results, rows_of(results), NAMES)
    text = document(results, NAMES)
    assert "## What does not work" in text and f"- {error}\n" in text and "error" in text.split("## What works")[0]


def test_a_graph_with_a_failure_does_not_count_as_working(results: Results) -> None:
    changed(results, "decode", ok=False, worst=0.02)
    text = document(results, NAMES)
    assert "0 guarded and proved" in text and "| 0 of 1 |" in text and "**2.0e-02**" in text


def test_rounding_of_the_runtime_is_not_called_bit_exact(results: Results) -> None:
    changed(results, "closed", worst=4e-4, limit=1e-2)
    assert "| as written; < 1e-3 |" in document(results, NAMES)


@pytest.mark.parametrize(("value", "said"), [(0.0, "0"), (1e-6, "< 1e-5"), (9.9e-7, "< 1e-6"), (0.2, "< 1e0")])
def test_bounds_are_rounded_up(value: float, said: str) -> None:
    assert bound(value) == said
    assert not value or value < float(said.removeprefix("< "))


# ------------------------------------------------------------------------------------------------------------- on disk


def write(folder: Path, results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two processes of pytest-xdist would."""
    monkeypatch.setenv(RESULTS, str(folder))
    for worker, graph in zip(("gw0", "gw1"), results.graphs.values(), strict=True):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        ledger = Ledger.of_this_process()
        ledger.graph(graph)
        for check in results.checks[graph.model]:
            ledger.check(check)


def test_what_is_written_is_read(results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, results, monkeypatch)
    assert len(list(tmp_path.iterdir())) == 2
    assert read_results(tmp_path) == replace(results, versions=versions())


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RESULTS, raising=False)
    monkeypatch.chdir(tmp_path)
    Ledger.of_this_process().graph(GRAPH)
    assert list(tmp_path.iterdir()) == []


def test_runs_of_two_environments_are_not_mixed(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="no results; run `make zoo`"):
        read_results(tmp_path)
    write(tmp_path, results, monkeypatch)
    (tmp_path / "other.jsonl").write_text(json.dumps({"versions": {"torch": "1.0"}}) + "\n")
    with pytest.raises(ValueError, match="results of several environments"):
        read_results(tmp_path)


def test_the_script_writes_and_checks(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("zoo.table.ALL_MAKERS", dict.fromkeys(NAMES))
    folder, file = tmp_path / "results", tmp_path / "coverage.md"
    assert coverage.main([str(folder), str(file)]) == 1 and not file.exists()
    write(folder, results, monkeypatch)
    assert coverage.main([str(folder), str(file), "--check"]) == 1 and not file.exists()
    assert coverage.main([str(folder), str(file)]) == 0
    assert coverage.main([str(folder), str(file), "--check"]) == 0
    capsys.readouterr()
    file.write_text(file.read_text().replace("bit-exact", "exact enough"))
    assert coverage.main([str(folder), str(file), "--check"]) == 1
    assert "differs from" in capsys.readouterr().err
