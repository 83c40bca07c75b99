"""The benchmarks run, on shapes too small to measure anything, and the page says what the result files say and nothing else.

No test here looks at a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS, DOCS = ROOT / "benchmarks", ROOT / "docs"
PAGE, GPU_PAGE, SERVING_PAGE = "performance.md", "tensorrt.md", "serving.md"
SCRIPTS = {
    "rewriting": ["--compare"],
    "inference": [],
    "hooks": ["--tokens", "2"],
    "supervisors": [],
    "extraction": [],
    "spellings": ["--rank", "2"],
    "gpu": ["--runtime", "onnxruntime-cpu", "--runtime", "torch", "--only", "restore rank1 last"],
    "kernels": [],
    "serving": [],
}

pytest.importorskip("torch")
pytest.importorskip("onnxruntime_genai")


def run(script: str, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every script once, quickly, on its tiny shape."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for name, more in SCRIPTS.items():
        common = ["--quick", "--shape", "tiny", "--threads", "1", "--models", folder / "models"]
        run(name, *common, "--out", folder / "results" / f"{name}.json", *more)
    return folder / "results"


@pytest.mark.long
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_result_says_where_it_comes_from(results: Path, name: str) -> None:
    found = json.loads((results / f"{name}.json").read_text())
    assert found["schema"] == "vlmguard.benchmark/1"
    for part in found["parts"].values():
        assert part["quick"] is True and part["threads"] == 1
        assert part["machine"]["cpu"] and part["machine"]["cores"] >= 1 and part["machine"]["ram_gib"] > 0
        assert {"python", "vlmguard", "onnxruntime", "onnx"} <= part["versions"].keys()


@pytest.mark.long
def test_hooked_torch_and_the_guarded_graph_are_the_same_model(results: Path) -> None:
    part = json.loads((results / "hooks.json").read_text())["parts"]["hooks"]
    assert part["logits_apart"] < 1e-4


@pytest.mark.long
def test_a_rewrite_adds_its_own_files_alone(results: Path) -> None:
    part = json.loads((results / "rewriting.json").read_text())["parts"]["export"]
    assert 0 < part["written"] < 2 * part["bytes"]


def pages_of(folder: Path) -> tuple[Path, Path]:
    """A folder for the two pages; the second exists and is written into."""
    folder.mkdir()
    (folder / GPU_PAGE).write_bytes((DOCS / GPU_PAGE).read_bytes())
    return folder / PAGE, folder / GPU_PAGE


@pytest.mark.long
def test_the_pages_are_the_same_each_time_and_name_every_goal(results: Path, tmp_path: Path) -> None:
    page, gpu_page = pages_of(tmp_path / "docs")
    report = ("report", "--quick", "--results", results, "--docs", page.parent)
    told = []
    for _ in range(2):
        run(*report)
        told.append((page.read_text(), gpu_page.read_text()))
    assert told[0] == told[1]
    goals = 3 + 4 * 3 + 2 + 2 + 2  # rewriting; each part of inference, and opening; whole requests; extraction
    assert told[0][0].count("**Met**") + told[0][0].count("**Missed**") == goals
    assert run(*report, "--check").returncode == 0
    for one, text in ((page, told[0][0]), (gpu_page, told[0][1])):
        one.write_text(text.replace("Measured on 2", "Measured on 3", 1))
        changed = run(*report, "--check", check=False)
        assert changed.returncode == 1
        assert changed.stderr == f"{one}: differs from {results}; run python benchmarks/report.py\n"
        one.write_text(text)


@pytest.mark.long
def test_the_gpu_page_tells_agreement_cost_and_what_does_not_run(results: Path, tmp_path: Path) -> None:
    _, page = pages_of(tmp_path / "docs")
    run("report", "--quick", "--results", results, "--docs", page.parent)
    text = page.read_text()
    parts = json.loads((results / "gpu.json").read_text())["parts"]
    here = parts["onnxruntime-cpu/tiny"]
    assert [one["mode"] for one in here["agreement"]] == ["restore"] and here["agreement"][0]["ok"]
    assert [row["phase"] for row in here["rows"]] == ["decode", "prefill"]
    assert text.count("| restore rank1 last |") == 1 + len(here["rows"]) and "Not yet run" not in text
    if not parts["torch/tiny"]["runs"]:  # no GPU here
        assert "**Does not run here:** torch finds no CUDA device" in text


@pytest.mark.long
def test_a_dry_run_of_the_gpu_benchmark_stops_in_time_and_goes_on_where_it_stopped(
    results: Path, tmp_path: Path
) -> None:
    """Engines are really built; without a GPU, ONNX Runtime on the CPU runs in their place, and no page takes that."""
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "gpu.json"
    common = ["--quick", "--shape", "tiny", "--threads", "1", "--models", results.parent / "models", "--out", out]
    dry = (*common, "--dry-run", "--runtime", "tensorrt_rtx", "--only", "supervise rank1 last")
    stopped = run("gpu", *dry, "--minutes", "0", check=False)
    assert stopped.returncode == 1 and "run the same command again for 1 more" in stopped.stderr and not out.exists()
    assert run("gpu", *dry).returncode == 0
    part = json.loads(out.read_text())["parts"]["tensorrt_rtx/tiny"]
    assert part["runs"] and part["dry_run"] and [one["ok"] for one in part["agreement"]] == [True]
    assert [row["kernels_added"][1] for row in part["rows"]] == [0, 0]  # of the decode engine
    again = run("gpu", *dry)
    assert "kept; --again measures it again" in again.stderr
    here = run("gpu", *common, "--runtime", "tensorrt_rtx", "--only", "supervise rank1 last")  # no GPU, no dry run
    found = json.loads(out.read_text())["parts"]["tensorrt_rtx/tiny"]
    assert found["runs"] or "tensorrt_rtx was left out: " in here.stderr


@pytest.mark.long
def test_the_serving_page_tells_every_load_and_what_became_of_it(results: Path, tmp_path: Path) -> None:
    page = pages_of(tmp_path / "docs")[0].with_name(SERVING_PAGE)
    page.write_text("before\n<!-- begin: load -->\nold\n<!-- end: load -->\nafter\n")
    run("report", "--quick", "--results", results, "--docs", page.parent)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    parts = json.loads((results / "serving.json").read_text())["parts"]
    assert [sum(part["outcomes"].values()) for part in parts.values()] == [8, 16, 8]
    for name, part in parts.items():
        assert f"| {name}, queue {part['queue']} |" in text
        assert part["outcomes"].keys() <= {"answered", "429"} and part["outcomes"]["answered"] > 0
    assert "429" not in parts["one client"]["outcomes"] and "429" not in parts["all clients"]["outcomes"]


@pytest.mark.long
def test_without_a_result_the_gpu_page_says_so(results: Path, tmp_path: Path) -> None:
    _, page = pages_of(tmp_path / "docs")
    page.write_text(page.read_text().replace("**Not yet run.**", "Fast."))
    kept = tmp_path / "results"
    kept.mkdir()
    for path in results.glob("*.json"):
        if path.stem != "gpu":
            (kept / path.name).write_bytes(path.read_bytes())
    run("report", "--quick", "--results", kept, "--docs", page.parent)
    assert "**Not yet run.**" in page.read_text()
    page.write_text("no marks")
    refused = run("report", "--quick", "--results", kept, "--docs", page.parent, check=False)
    assert refused.returncode == 1 and refused.stderr.startswith(f"{page}: has no lines <!-- begin")


@pytest.mark.long
def test_quick_results_are_no_report(results: Path, tmp_path: Path) -> None:
    page, _ = pages_of(tmp_path / "docs")
    refused = run("report", "--results", results, "--docs", page.parent, check=False)
    assert refused.returncode == 1 and not page.exists()
    assert refused.stderr == (
        f"{results / 'rewriting.json'}: part 'export' is from --quick or the tiny shape; "
        "run python benchmarks/rewriting.py without them\n"
    )


@pytest.mark.long
def test_a_missing_part_is_named(results: Path, tmp_path: Path) -> None:
    for path in results.glob("*.json"):
        content: dict[str, Any] = json.loads(path.read_text())
        if path.stem == "inference":
            del content["parts"]["fp32/prefill"]
        (tmp_path / path.name).write_text(json.dumps(content))
    page, _ = pages_of(tmp_path / "docs")
    report = ("report", "--quick", "--results", tmp_path, "--docs", page.parent)
    refused = run(*report, check=False)
    assert refused.returncode == 1 and not page.exists()
    assert refused.stderr == (
        f"{tmp_path / 'inference.json'}: has no part 'fp32/prefill'; run python benchmarks/inference.py\n"
    )
    (tmp_path / "hooks.json").write_text('{"schema": "another/1"}')
    (tmp_path / "inference.json").write_bytes((results / "inference.json").read_bytes())
    refused = run(*report, check=False)
    assert refused.stderr == (
        f"{tmp_path / 'hooks.json'}: has schema 'another/1', expected vlmguard.benchmark/1; measure again\n"
    )


def test_the_pages_in_the_repository_are_what_the_results_in_it_say() -> None:
    if (BENCHMARKS / "results").is_dir():
        assert run("report", "--check", check=False).stderr == ""
    else:
        assert not (DOCS / PAGE).exists(), "docs/performance.md without the results that it was made from"


def test_two_subjects_alternate_and_more_have_no_favoured_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from measure import Budget, interleaved

    def order(names: str, rounds: int) -> str:
        called: list[str] = []
        subjects = {name: lambda name=name: called.append(name) for name in names}
        times = interleaved(subjects, names[0], Budget(rounds, rounds, 0.0), warm_up=0)
        assert all(len(taken) == 2 * rounds for taken in times.values())
        return "".join(called)

    assert order("AB", 2) == "ABBAABBA"
    called = order("ABCD", 100)
    assert not any(first == second for first, second in pairwise(called))
    first_places = [called[start] for start in range(0, len(called), 4)]
    assert all(30 <= first_places.count(name) <= 75 for name in "ABCD")


def test_a_spread_is_the_median_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import numpy as np
    from measure import Spread, ratio

    times = {"a": np.array([1.0, 2.0, 4.0]), "b": np.array([2.0, 4.0, 8.0])}
    assert ratio(times, "b", "a") == Spread(2.0, 2.0, 2.0, 2.0, 2.0, 3)  # drift in both, none in the ratio
    assert ratio(times, "b", "a").narrow and not Spread.of(np.array([1.0, 1.0, 2.0, 2.0])).narrow
