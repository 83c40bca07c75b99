"""Every graph of the zoo through the matrix (`zoo/matrix.py` says what is asked), each answer recorded.

`make test` runs the graphs of `FAST`, `make zoo` all of them: then `zoo/coverage.py` writes docs/coverage.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from zoo.cases import CASES, EXPORTED, Case
from zoo.model import ZooModel
from zoo.records import CheckRecord, GraphRecord, Ledger
from zoo.table import ALL_MAKERS, parameter

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

import torch
from zoo.matrix import Subject

from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.errors import AnatomyNotFound
from vlmguard.graphs.proof.structure import Check

# One graph after another, each in one process (tests/conftest.py reads the `@`): its torch answers are computed once.
every_graph = pytest.mark.parametrize("name", [parameter(name, id=f"@{name}") for name in ALL_MAKERS], scope="module")
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def subject(zoo: Callable[[str], ZooModel]) -> Iterator[Callable[[str], Subject]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for matrices this small, and much faster beside other test workers

    @lru_cache(maxsize=1)  # the tests come graph by graph
    def get(name: str) -> Subject:
        return Subject(zoo(name))

    yield get
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ledger() -> Ledger:
    return Ledger.of_this_process()


@pytest.fixture
def recorded(ledger: Ledger, name: str) -> Callable[..., None]:
    """`recorded(*checks, guard=...)`: all are written down, failures too, and then required to hold."""

    def keep(*checks: Check, guard: str = "") -> None:
        for check in checks:
            compared, worst, limit, ok = int(check.compared), float(check.worst), float(check.limit), bool(check.ok)
            ledger.check(CheckRecord(name, check.name, guard, compared, worst, limit, ok, check.note))
        assert [check for check in checks if not check.ok or not check.compared] == []

    return keep


def description(asked: Subject, **found: Any) -> GraphRecord:
    model = asked.model
    return GraphRecord(
        model=model.name,
        family=model.family,
        exporter=model.exporter,
        weights=asked.weights,
        patterns=model.patterns,
        expected=model.layers,
        **found,
    )


@every_graph
def test_every_layer_is_found(
    subject: Callable[[str], Subject], name: str, ledger: Ledger, recorded: Callable[..., None]
) -> None:
    """Or, where a refusal is the right answer, that sentence and no other."""
    case = subject(name)
    if case.model.refusal:
        with pytest.raises(AnatomyNotFound) as said:
            dissect(case.load(), case.model.layers)
        ledger.graph(description(case, refusal=str(said.value)))
        recorded(Check("refusal", 1, 0.0, 0.0, str(said.value) == case.model.refusal, str(said.value)))
        return
    try:
        anatomy = case.anatomy
    except AnatomyNotFound as unexpected:
        ledger.graph(description(case))
        recorded(Check("anatomy", 1, 1.0, 0.0, False, str(unexpected)))
        raise
    model = case.model
    kinds = tuple(sorted({site.kind for site in anatomy.sites}))
    stream = "/".join(anatomy.dtypes)
    ledger.graph(
        description(case, stream=stream, layers=anatomy.layer_count, kinds=kinds, cached=case.cached, truth=case.truth)
    )
    wanted = {
        "layers": (anatomy.layer_count, model.layers),
        "numbers": (sorted({site.layer_index for site in anatomy.sites}), list(range(model.layers))),
        "width": (anatomy.width, model.width),
        "stream": (anatomy.dtypes, (model.stream_dtype,)),
        "certainty": (anatomy.certainty, "confirmed"),
        "fused": ("skip_norm" in kinds, any(pattern.startswith("B") for pattern in model.patterns)),
        "without a config": (dissect(case.load()), replace(anatomy, certainty="structural")),
    }
    wrong = [f"{what} is {found}, not {right}" for what, (found, right) in wanted.items() if found != right]
    recorded(Check("anatomy", len(wanted), float(len(wrong)), 0.0, not wrong, "; ".join(wrong)))


def answering(subject: Callable[[str], Subject], name: str) -> Subject:
    case = subject(name)
    if case.model.refusal:
        pytest.skip("refused, as it should be")
    return case


@every_graph
def test_states_equal_torchs(subject: Callable[[str], Subject], name: str, recorded: Callable[..., None]) -> None:
    case = answering(subject, name)
    if case.truth != "torch":
        pytest.skip("quantized: torch has no truth for it")
    recorded(case.check_states())


@every_graph
@every_case
def test_a_guard_does_what_it_says(
    subject: Callable[[str], Subject], name: str, case: Case, recorded: Callable[..., None]
) -> None:
    asked = answering(subject, name)
    guarded = asked.guarded(case)
    checks = [asked.check_reference(guarded), asked.check_closed(guarded)]
    if asked.truth == "torch":
        checks += asked.check_logits(guarded)
    recorded(*checks, guard=case.name)


@every_graph
@pytest.mark.parametrize("case", EXPORTED, ids=lambda case: case.name)
def test_export_proves_its_own_guard(
    subject: Callable[[str], Subject], name: str, case: Case, recorded: Callable[..., None], tmp_path: Path
) -> None:
    asked = answering(subject, name)
    recorded(asked.check_export(asked.guarded(case), tmp_path), guard=case.name)


# ----------------------------------------------------------------------------------------------- the matrix can say no


def test_a_guard_with_other_numbers_is_seen(subject: Callable[[str], Subject]) -> None:
    """The graph carries the right rows in the wrong order of columns; torch and the reference know the plan."""
    asked, case = subject("llava-torchscript-fp32"), CASES[0]
    right = asked.guarded(case)
    (layer,) = right.directions.layers
    rolled = replace(right.directions.layers[layer], ssd=np.roll(right.directions.layers[layer].ssd, 1, axis=1))
    wrong = asked.guard(replace(right.directions, layers={layer: rolled}), right.spec)
    checks = [
        asked.check_reference(replace(wrong, plan=right.plan)),
        *asked.check_logits(replace(wrong, plan=right.plan)),
    ]
    assert [check.name for check in checks if not check.ok] == ["reference", "prefill", "decode"]


def test_a_guard_in_the_next_layer_is_seen(subject: Callable[[str], Subject]) -> None:
    """Its own states are guarded as they should be: only torch can tell."""
    asked, case = subject("llava-torchscript-fp32"), CASES[0]
    right = asked.guarded(case)
    ((layer, numbers),) = right.directions.layers.items()
    wrong = asked.guard(replace(right.directions, layers={layer + 1: numbers}), right.spec)
    assert asked.check_reference(wrong).ok
    assert [check.name for check in asked.check_logits(replace(wrong, plan=right.plan)) if not check.ok] == [
        "prefill",
        "decode",
    ]


def test_a_guard_that_does_nothing_is_seen(subject: Callable[[str], Subject]) -> None:
    asked = subject("llava-torchscript-fp32")
    case = next(case for case in CASES if case.mode == "restore")
    right = asked.guarded(case)
    never = asked.guard(right.directions, replace(right.spec, tau=1e6))
    checks = [asked.check_reference(never), *asked.check_logits(never)]
    assert [check.ok for check in checks] == [False] * 3
    assert checks[0].note == "the rows of the first prompt are all on one side of the gate; no row was edited"


def test_one_changed_weight_is_seen(subject: Callable[[str], Subject]) -> None:
    asked = subject("llava-torchscript-fp32")
    guarded = asked.guarded(CASES[0])
    name, weight = next(
        (name, value)
        for name, value in guarded.graph.graph.initializers.items()
        if not name.startswith("vlmguard/") and value.shape is not None and len(value.shape) == 2
    )
    array = weight.const_value.numpy().copy()
    array[3, 4] += 0.01
    weight.const_value = ir.Tensor(array, name=name)
    assert not asked.check_closed(guarded).ok
