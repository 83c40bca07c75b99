"""The proofs of a guard that reads paired rows pass on the file that was made, and fail on one that was tampered with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hand_graphs import decoder, directions, guard_model, merged
from onnx import numpy_helper
from random_directions import random_directions
from tiny_vlm_paths import SOURCE

from vlmguard.exporter.proof.inputs import ProofInputs, paired_inputs, proof_inputs
from vlmguard.exporter.proof.local_findings import BITS, READS, STATES
from vlmguard.exporter.proof.prove import prove_by_running
from vlmguard.exporter.proof.prove_local import prove_locally
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.graph_io import save_graph
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.proof.structure import Check
from vlmguard.graphs.rewrite import rewrite
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.generation import Request
from vlmguard.runtime.vlm import VisionLanguageModel

pytest.importorskip("onnxruntime")

CLOSED = "closed gate equals the original bit for bit"
TEXTS = "the text-only rows equal the original bit for bit"
REFERENCE = "guarded states equal the numpy reference"
UNEDITED = "tokens outside the positions are untouched bit for bit"
Tamper = Callable[[onnx.ModelProto], None]


def number(name: str, value: int) -> Tamper:
    def tamper(model: onnx.ModelProto) -> None:
        tensor = next(one for one in model.graph.initializer if one.name == f"vlmguard/positions/{name}")
        assert numpy_helper.to_array(tensor) != value
        tensor.CopyFrom(numpy_helper.from_array(np.array(value, np.int64), tensor.name))

    return tamper


def wired(name: str, index: int, source: str) -> Tamper:
    """An input of a guard's node reads another value of the guard."""

    def tamper(model: onnx.ModelProto) -> None:
        node = next(one for one in model.graph.node if one.name == f"vlmguard/{name}")
        assert node.input[index] != f"vlmguard/{source}"
        node.input[index] = f"vlmguard/{source}"

    return tamper


# Every one is a way for the guard to edit other rows or calls, or to read another row.
DAMAGE: dict[str, tuple[Tamper, set[str], set[str]]] = {
    "decode steps are edited": (number("step_tokens", 0), {STATES, BITS}, {REFERENCE, UNEDITED}),
    "no call is a prompt": (number("step_tokens", 1 << 40), {STATES}, {REFERENCE}),
    "pairs of three": (number("two", 3), {STATES, BITS}, {TEXTS, REFERENCE, UNEDITED}),
    "each row reads itself": (wired("positions/text_pairs", 1, "positions/rows"), {STATES}, {REFERENCE}),
    "each row reads another pair": (wired("positions/text_pairs", 1, "positions/half"), {STATES}, {REFERENCE}),
}


def failing(checks: tuple[Check, ...]) -> set[str]:
    return {check.name for check in checks if not check.ok}


def written(model: Any, path: Path, tamper: Tamper | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_graph(model, path)
    if tamper is not None:
        proto = onnx.load(path)
        tamper(proto)
        onnx.save(proto, path)
    return path


# ------------------------------------------------------------------------------------------------------ each guard by itself


def prove(folder: Path, tamper: Tamper | None = None, make: Any = decoder, **options: Any) -> tuple[Check, ...]:
    spec = GuardSpec(mode="align", supervisor="rows", lowering=options.pop("lowering", "auto"))
    spec = replace(spec, knobs=options.pop("knobs", False))
    done = guard_model(make(layers=2, cache=True, **options), directions((0, 1)), spec)
    return prove_locally(written(done.model, folder / "guarded.onnx", tamper), done.plan, done.report)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("lowering", ["lowrank", "rank1"])
def test_an_untouched_guard_is_proved(tmp_path: Path, lowering: str, dtype: str) -> None:
    checks = prove(tmp_path, lowering=lowering, dtype=dtype)
    assert not failing(checks), [check.note for check in checks if not check.ok]
    assert [check.name for check in checks] == [READS, STATES, BITS]


@pytest.mark.parametrize("kind", ["skip_norm", "skip_norm_bias"])
def test_fused_sums_and_knobs_are_proved(tmp_path: Path, kind: Any) -> None:
    assert not failing(prove(tmp_path, kind=kind, knobs=True))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_guard_is_found_by_itself(tmp_path: Path, damage: str) -> None:
    tamper, expected, _ = DAMAGE[damage]
    assert expected <= failing(prove(tmp_path, tamper))


def test_both_branches_of_a_merged_decoder_share_the_numbers(tmp_path: Path) -> None:
    checks = prove(tmp_path, make=_merged)
    assert not failing(checks) and "states of 4 guards in " in checks[1].note


def _merged(cache: bool, **options: Any) -> Any:
    """The hand-made merged decoder has no cache of its own; a state at the top is enough for a plan."""
    import onnx_ir as ir

    model = merged(**options)
    past = ir.Value(
        name="past_key_values.0.key", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 1, "past", 4])
    )
    node = ir.node("Concat", [past, past], {"axis": 2}, name="make present")
    present = node.outputs[0]
    present.name, present.type, present.shape = "present.0.key", past.type, ir.Shape(["batch", 1, "total", 4])
    model.graph.inputs.append(past)
    model.graph.append(node)
    model.graph.outputs.append(present)
    return model


# ----------------------------------------------------------------------------------------------------------- the whole model


@pytest.fixture(scope="module")
def inputs() -> ProofInputs:
    model = VisionLanguageModel(open_package(SOURCE))
    texts = ["how to wash the boat", "please tell me how to steal the lamp", "what color is this image"]
    found = proof_inputs(model, [Request(text) for text in texts] + [Request("how to polish it", model.blank_image())])
    assert len(found.batches) == 2
    return found


def run(folder: Path, inputs: ProofInputs, tamper: Tamper | None = None) -> tuple[Check, ...]:
    package = open_package(SOURCE)
    graph = package.load_decoder()
    anatomy = dissect(graph)
    spec = GuardSpec(mode="align", supervisor="rows", layers=(2, 4))
    plan = plan_guard(graph, anatomy, random_directions(anatomy.width, [2, 4]), spec)
    report = rewrite(graph, plan)
    return prove_by_running(package, written(graph, folder / "onnx" / "guarded.onnx", tamper), plan, report, inputs)


def test_an_untouched_file_is_proved_in_pairs(tmp_path: Path, inputs: ProofInputs) -> None:
    checks = run(tmp_path, inputs)
    assert [check.name for check in checks] == [CLOSED, TEXTS, REFERENCE, UNEDITED]
    assert not failing(checks)
    # one token of each of four prompts, on two layers
    assert checks[2].note.startswith("8 of ") and checks[2].note.endswith("4 real prompts, in pairs")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_found(tmp_path: Path, inputs: ProofInputs, damage: str) -> None:
    tamper, _, expected = DAMAGE[damage]
    assert failing(run(tmp_path, inputs, tamper)) == expected


def test_each_prompt_is_paired_with_the_text_of_another(inputs: ProofInputs) -> None:
    found = paired_inputs(inputs, pads=True)
    assert [batch.size for batch in found.batches] == [6, 2]
    first, second = (batch.ids[:, -5:].tolist() for batch in found.batches)
    texts, image = inputs.texts[0].ids[:, -5:].tolist(), inputs.texts[1].ids[:, -5:].tolist()
    assert first == [image[0], texts[0], image[0], texts[1], image[0], texts[2]]
    assert second[0] == texts[1] and second[1] == inputs.batches[1].ids[0, -5:].tolist()


def test_single_rows_are_refused(inputs: ProofInputs) -> None:
    alone = ProofInputs(inputs.batches[1:], inputs.batches[1:], "given inputs")
    with pytest.raises(GuardError) as error:
        paired_inputs(alone, pads=True)
    assert str(error.value) == (
        "paired rows are proved on batches of two rows and more; give such inputs with --proof-inputs"
    )
