"""What a proof records is what was done: calls are counted by a spy, and NaN is named with its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_graphs import WIDTH, decoder, directions

from vlmguard.exporter.proof.compare import Comparison, padded, relative
from vlmguard.exporter.proof.inputs import ProofInputs
from vlmguard.exporter.proof.prove import prove_by_running
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.graph_io import save_graph
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.proof.structure import Check
from vlmguard.graphs.rewrite import rewrite
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.decoder_inputs import PromptBatch
from vlmguard.runtime.onnxruntime_runner import OnnxRuntimeRunner

pytest.importorskip("onnxruntime")

CLOSED = "closed gate equals the original bit for bit"
REFERENCE = "guarded states equal the numpy reference"
UNEDITED = "tokens outside the positions are untouched bit for bit"


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each call of any session."""
    calls: list[str] = []
    run = OnnxRuntimeRunner.run

    def counted(self: OnnxRuntimeRunner, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls.append("run")
        return run(self, feeds)

    monkeypatch.setattr(OnnxRuntimeRunner, "run", counted)
    return calls


def proved(
    folder: Path, inputs: ProofInputs, spec: GuardSpec, change: Callable[[Any], None] | None = None
) -> list[Check]:
    """A guarded decoder of two layers, proved by running; `change` is done to the staged graph."""
    save_graph(decoder(layers=2), folder / "model.onnx")
    package = open_package(folder / "model.onnx")
    graph = package.load_decoder()
    anatomy = dissect(graph)
    plan = plan_guard(graph, anatomy, directions((0, 1), alpha=2.0), spec)
    report = rewrite(graph, plan)
    if change is not None:
        change(graph)
    save_graph(graph, folder / "guarded.onnx")
    return list(prove_by_running(package, folder / "guarded.onnx", plan, report, inputs))


def inputs(given: bool, batches: int = 2) -> ProofInputs:
    """Prompts of five tokens, the first row padded; or the same by name."""
    random, made = np.random.default_rng(0), []
    for _ in range(batches):
        mask = np.ones((3, 5), np.int64)
        mask[0, :2] = 0
        embeds = random.normal(size=(3, 5, WIDTH)).astype(np.float32)
        named = {"inputs_embeds": embeds, "attention_mask": mask} if given else None
        made.append(PromptBatch(np.zeros((3, 5), np.int64), mask, None if given else embeds, given=named))
    return ProofInputs(tuple(made), tuple(made), "prompts of nothing")


@pytest.mark.parametrize("given", [True, False], ids=["given inputs", "prompts"])
@pytest.mark.parametrize("mode", ["restore", "project", "combined"])
def test_every_call_is_recorded_and_no_more(tmp_path: Path, spied: list[str], mode: Any, given: bool) -> None:
    checks = proved(tmp_path, inputs(given), GuardSpec(mode, knobs=True))
    assert all(check.ok for check in checks)
    recorded = sum(
        int(number) for check in checks for number in re.findall(r"(\d+) (?:calls\b|of the guarded model)", check.note)
    )
    text_only = 2 if mode == "combined" else 0
    assert recorded == len(spied) - text_only
    each = 1 if given else 5
    (closed,) = (check for check in checks if check.name == CLOSED)
    assert f" numbers in {2 * each} calls of the original and {2 * each} of the guarded model, " in closed.note


def test_positions_all_have_no_vacuous_check(tmp_path: Path) -> None:
    checks = proved(tmp_path, inputs(given=False), GuardSpec("restore", positions="all"))
    assert UNEDITED not in {check.name for check in checks}
    assert all(check.compared > 1 for check in checks)


# --------------------------------------------------------------------------------------------------------------------- NaN


def batch_with(value: float, row: int, token: int) -> ProofInputs:
    """One prompt whose state is no number at one token."""
    (batch,) = inputs(given=False, batches=1).batches
    batch.embeds[row, token] = value  # type: ignore[index]
    return ProofInputs((batch,), (batch,), "one prompt")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_named_with_its_place(tmp_path: Path, value: float) -> None:
    """Attention carries it to every token of its row."""
    checks = {check.name: check for check in proved(tmp_path, batch_with(value, 1, 3), GuardSpec("restore"))}
    assert not checks[CLOSED].ok and not checks[REFERENCE].ok
    assert checks[CLOSED].note.startswith(
        f"{BROKEN}: logits of batch 0, call 0, row 1, token 0, at 0: NaN in the guarded model, NaN in "
    )
    assert checks[REFERENCE].note.startswith(
        "the state before layer 0's guard, batch 0, call 0: NaN at row 1, token 0, at 0"
    )
    assert checks[CLOSED].worst == checks[REFERENCE].worst == float("inf")


def one(before: Any, after: Any, mask: list[list[int]]) -> Comparison:
    found = Comparison()
    found.see("call 0", np.array(mask), {"x": np.array(before, np.float64)}, {"x": np.array(after, np.float64)})
    return found


NAN, INF = float("nan"), float("inf")
MASK = [[0, 1]]
BROKEN = (
    "the original itself outputs NaN for tokens that are no padding, so nothing can be shown of them; export it again with "
    "attention that ignores padding"
)
ODD = {
    "NaN after alone": (
        [[[1.0], [1.0]]],
        [[[1.0], [NAN]]],
        "x of call 0, row 0, token 1, at 0: NaN in the guarded model, 1 in the original",
    ),
    "NaN before alone": (
        [[[1.0], [NAN]]],
        [[[1.0], [1.0]]],
        "x of call 0, row 0, token 1, at 0: 1 in the guarded model, NaN in the original",
    ),
    "NaN in both, at a token": (
        [[[1.0], [NAN]]],
        [[[1.0], [NAN]]],
        f"{BROKEN}: x of call 0, row 0, token 1, at 0: NaN in the guarded model, NaN in the original",
    ),
    "NaN after alone, at padding": (
        [[[1.0], [1.0]]],
        [[[NAN], [1.0]]],
        "x of call 0, row 0, token 0, at 0: NaN in the guarded model, 1 in the original",
    ),
    "infinity against NaN": (
        [[[1.0], [INF]]],
        [[[1.0], [NAN]]],
        "x of call 0, row 0, token 1, at 0: NaN in the guarded model, inf in the original",
    ),
    "infinities of two signs": (
        [[[1.0], [INF]]],
        [[[1.0], [-INF]]],
        "x of call 0, row 0, token 1, at 0: -inf in the guarded model, inf in the original",
    ),
    "no place for a token": (
        [NAN],
        [NAN],
        f"{BROKEN}: x of call 0, row 0: NaN in the guarded model, NaN in the original",
    ),
    "another shape": (
        [[[1.0]]],
        [[[1.0], [1.0]]],
        "x of call 0 has shape [1, 2, 1] in the guarded model, [1, 1, 1] in the original",
    ),
}


@pytest.mark.parametrize("what", ODD)
def test_each_kind_of_no_number_fails_and_is_named(what: str) -> None:
    before, after, sentence = ODD[what]
    found = one(before, after, MASK)
    assert found.note == sentence and found.worst == INF


def test_nan_of_padded_rows_in_both_is_nothing_to_compare() -> None:
    found = one([[[NAN], [1.0]]], [[[NAN], [1.0]]], MASK)
    assert (found.compared, found.differing, found.worst, found.odd) == (1, 0, 0.0, [])
    assert found.note == "1 NaN in padded rows of both, not compared"
    cache = np.array([[[[NAN], [1.0]]]])  # [batch, heads, tokens, size]
    assert one(cache, cache, MASK).odd == [] and one(cache, cache, [[1, 1]]).odd


def test_the_same_infinity_is_equal() -> None:
    assert one([[[INF], [1.0]]], [[[INF], [1.0]]], [[1, 1]]).worst == 0.0


def test_only_what_has_a_place_for_each_token_has_padding() -> None:
    mask = np.array([[0, 1, 1]])
    assert padded(np.zeros((1, 3, 7)), mask).any() and padded(np.zeros((1, 2, 3, 7)), mask).any()
    for shape in ((1, 2, 7), (1, 7), (2, 3, 7), (1, 2, 2, 7)):
        assert not padded(np.zeros(shape), mask).any()


def test_a_relative_difference_from_nan_is_infinite() -> None:
    one, nan = np.array([1.0]), np.array([NAN])
    assert relative(one, nan) == relative(nan, one) == relative(nan, nan) == INF
    assert relative(np.array([INF]), np.array([-INF])) == INF
    assert relative(np.array([INF, 2.0]), np.array([INF, 1.0])) == 0.5
