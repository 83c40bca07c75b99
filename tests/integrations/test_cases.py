"""The cases that every runtime is compared on: anchored in numpy, and able to tell another guard, or none."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_vlm_paths import DECODER, Guarded

import vlmguard
from integrations import results
from integrations.cases import write_cases
from integrations.numpy_vlm import NumpyDecoder
from integrations.onnxruntime.check import graph, graphs
from integrations.replay import Agreement, CaseFolder, mode_folders, replay, write_result
from integrations.tiny_vlm import CHECKPOINT, MODES, SOURCE, plan_of, spec_of
from vlmguard.graphs.modes import Mode

pytest_plugins = ("tiny_vlm_fixtures",)

Cases = Callable[[Mode], Path]
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "integrations" / "onnxruntime" / "answer.py"
# Runs the example with nothing importable that an app does not have.
ALONE = """
import runpy, sys
BLOCKED = ("vlmguard", "integrations", "onnx", "onnx_ir", "torch", "transformers")
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED: raise ImportError(name)
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


IN_EVERY_RUN: tuple[Mode, ...] = ("restore", "combined", "align")
each_mode = pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=() if mode in IN_EVERY_RUN else pytest.mark.long) for mode in MODES]
)


@pytest.fixture(scope="module")
def cases(guarded: Guarded, tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """`cases("restore")`: that mode's cases, as `python -m integrations.cases` writes them."""
    root = tmp_path_factory.mktemp("cases")

    def get(mode: Mode) -> Path:
        folder = root / mode
        if folder.exists():
            return folder
        if mode in ("restore", "supervise", "combined", "align"):
            shutil.copytree(guarded(mode), folder / "model")
        else:
            directions = guarded("combined") / "directions.safetensors"
            vlmguard.export(SOURCE, folder / "model", spec=spec_of(mode, directions), directions=directions)
        write_cases(mode, folder)
        return folder

    return get


@each_mode
def test_plain_onnxruntime_answers_as_guarded_vlm_does(cases: Cases, mode: Mode) -> None:
    """The example, with neither vlmguard nor torch: a picture that the gate opens for, and a text that it does not."""
    folder = CaseFolder(cases(mode))
    vlm = vlmguard.GuardedVLM.open(folder.folder / "model")
    asked = [case for case in folder.content["cases"] if case["name"] in ("image-harmful", "text-harmless")]
    assert len(asked) == 2
    for case in asked:
        picture = None if case["image"] is None else folder.folder / "images" / case["image"]
        command = [sys.executable, "-P", "-c", ALONE, EXAMPLE, folder.folder / "model", case["prompt"]]
        done = subprocess.run(
            [*command, *([] if picture is None else [picture])], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == case["answer"] == vlm.generate(case["prompt"], picture)
        assert [*vlm.chat.tokenizer.encode(case["answer"]).ids, *vlm.chat.eos_ids] == case["tokens"]


def test_the_example_is_short_and_needs_no_more_than_a_runtime() -> None:
    source = EXAMPLE.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 40
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported == {"sys", "numpy", "onnxruntime", "PIL", "tokenizers"}


@each_mode
def test_onnxruntime_replays_the_cases(cases: Cases, mode: Mode) -> None:
    folder = CaseFolder(cases(mode))
    found = replay(folder, *graphs(folder))
    assert found.ok and found.tokens >= 40


def test_a_replay_tells_the_unguarded_model_apart(cases: Cases) -> None:
    restored, unguarded = CaseFolder(cases("restore")), graph(SOURCE / DECODER)
    found = replay(restored, unguarded)
    assert not found.ok and not found.same_tokens and found.largest_difference > 1
    assert not replay(restored, lambda feeds: {n: a * np.nan for n, a in unguarded(feeds).items()}).ok


def test_the_numpy_oracle_tells_another_guard_apart(cases: Cases) -> None:
    """It computes with the numbers of the plan: another target gives other logits than those that were written."""
    folder, plan = CaseFolder(cases("restore")), plan_of(cases("restore") / "model", SOURCE)
    case = next(case for case in folder.content["cases"] if case["gate_open"])
    feeds = case["calls"][0]["feeds"]
    embeds, written = folder.tensor(feeds["inputs_embeds"])[0], folder.tensor(case["calls"][0]["logits"])[0]
    other = replace(
        plan, sites=tuple(replace(s, guard=replace(s.guard, target=s.guard.target + 1)) for s in plan.sites)
    )
    worst = {
        name: np.abs(NumpyDecoder(CHECKPOINT, one).run(embeds, len(embeds))["logits"] - written).max()
        for name, one in {"plan": plan, "other": other}.items()
    }
    assert worst["plan"] < 1e-4 and worst["other"] > 0.1, worst


def test_cases_say_what_they_hold(cases: Cases) -> None:
    """What a runtime without Python relies on: every tensor lies where it is said to, and every call can be made."""
    root = {cases(mode).parent for mode in IN_EVERY_RUN}.pop()
    assert {mode for mode, _ in mode_folders(root)} >= set(IN_EVERY_RUN)
    for _, folder in mode_folders(root):
        size = (folder.folder / "tensors.bin").stat().st_size
        for case in folder.content["cases"]:
            assert case["image"] is None or (folder.folder / "images" / case["image"]).is_file()
            assert [call["token"] for call in case["calls"] if call["token"] is not None] == case["tokens"]
            for number, call in enumerate(case["calls"]):
                assert np.isfinite(folder.tensor(call["logits"])).all()
                for fed in call["feeds"].values():
                    assert fed["call"] < number if "call" in fed else fed["offset"] % 64 == 0 and fed["offset"] <= size


# The table


def test_the_table_says_what_ran_what_differs_and_what_did_not(tmp_path: Path) -> None:
    build, folder = tmp_path / "build", tmp_path / "integrations"
    for name in ("one", "two", "three"):
        (folder / name).mkdir(parents=True)
        (folder / name / "run.sh").touch()
    good, bad = Agreement(1e-6, 12, True), Agreement(0.5, 12, False)
    assert write_result("one", "One", "1.0", dict.fromkeys(MODES, good), build=build) == 0
    assert (
        write_result("two", "Two", "2.0", {"restore": good, "steer": bad}, "text", build, "int8", pictures=False) == 1
    )
    lines = results.table(results.read_results(build, folder))
    assert lines[3:6] == [
        "| One | 1.0 | all six | fp32 | yes | 72 of 72 | 1.0e-06 | `make integration NAME=one` |  |",
        "| three |  | not run |  |  |  |  | `make integration NAME=three` |  |",
        "| Two | 2.0 | `restore`; DIFFERENT: `steer` | int8 | no | 12 of 24 | 5.0e-01 | `make integration NAME=two` | text |",
    ]


@pytest.mark.parametrize("agreement", [Agreement(2e-3, 5, True), Agreement(0.0, 5, False), Agreement(0.0, 0, True)])
def test_what_is_no_agreement(agreement: Agreement) -> None:
    assert Agreement(1e-3, 5, True).ok and not agreement.ok and not replace(agreement, largest_difference=np.nan).ok


def test_the_pages_table_is_of_this_form() -> None:
    """One row per folder that can be run; numbers come from runs, the form is checked here."""
    page = (ROOT / "docs" / "runtimes.md").read_text(encoding="utf-8")
    between = page.split(results.BEGIN)[1].split(results.END)[0]
    for name in results.read_results():
        assert f"`make integration NAME={name}`" in between, f"{name} is not in the table; run make integrations"
    assert "DIFFERENT" not in between
