"""The graphs for TensorRT's engines compute what the guarded decoder does in the calls that they are for; telemetry too."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx_ir as ir
import pytest
from hand_graphs import WIDTH, decoder, directions, guard_model, run

from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.engine_plans import decode_step_plan, prompt_plan
from vlmguard.graphs.modes import MODES, guard_mode
from vlmguard.graphs.plan import SUPERVISOR_INPUT, number_of_input
from vlmguard.graphs.reference import UNDECIDED
from vlmguard.graphs.rewrite import rewrite
from vlmguard.graphs.runtime_controls import PAST_GATE_INPUT
from vlmguard.graphs.spec import GuardSpec

pytest.importorskip("onnxruntime")

LAYERS, RANK, BATCH, PAST = (0, 1), 2, 4, 3
EXTRAS = {"plain": {}, "telemetry": {"telemetry": True}, "held gate": {"gate": "prompt"}}
PROMPT, STEP = "a prompt", "a decode step"


def cases() -> list[tuple[str, str, str]]:
    """Every mode that edits the last token, with what it can output."""
    scored = [mode for mode in MODES if guard_mode(mode).has_threshold and mode != "align"]
    held = [mode for mode in scored if not guard_mode(mode).decides_by_text]
    return [
        *product(("project", *scored), ("plain",), (PROMPT, STEP)),
        *product(scored, ("telemetry",), (PROMPT, STEP)),
        *product(held, ("held gate",), (PROMPT, STEP)),
    ]


def feeds(model: ir.Model, tokens: int) -> dict[str, np.ndarray]:
    """A call on a cache; rows that begin with padding, end with it, have a gap, and of a mask without zeros."""
    random = np.random.default_rng(5)
    mask = np.ones((BATCH, PAST + tokens), np.int64)
    mask[0, :2] = 0
    if tokens > 1:
        mask[1, -2:] = mask[2, PAST + 1] = 0
    coordinates = random.normal(size=(BATCH, len(LAYERS), RANK)).astype(np.float32)
    coordinates[:, :, 0] = np.array([-0.9, 0.7, 1.5, -0.2])[:, None]  # two of them open the gates
    given = {
        "inputs_embeds": random.normal(size=(BATCH, tokens, WIDTH)).astype(np.float32),
        "attention_mask": mask,
        "past_key_values.0.key": random.normal(size=(BATCH, 1, PAST, WIDTH)).astype(np.float32),
        SUPERVISOR_INPUT: coordinates,
        PAST_GATE_INPUT: np.full((BATCH, len(LAYERS)), UNDECIDED, np.float32),
    }
    numbers = {name: number_of_input(name) for name in (str(value.name) for value in model.graph.inputs)}
    of_numbers = {name: coordinates[:, at[0], at[1], None, None] for name, at in numbers.items() if at is not None}
    return {name: (given | of_numbers)[name] for name in numbers}


@pytest.mark.parametrize("lowering", ["rank1", "lowrank"])
@pytest.mark.parametrize(("mode", "extra", "call"), cases())
def test_every_output_is_the_guarded_decoders(mode: str, extra: str, call: str, lowering: str) -> None:
    found = directions(LAYERS, parts={"threshold": 0.125}, alpha=3.0 if mode == "steer" else None)
    spec = GuardSpec(mode=mode, positions="last", lowering=lowering, **EXTRAS[extra])  # type: ignore[arg-type]
    guarded = guard_model(decoder("add", 2, cache=True), found, spec)
    plan = (prompt_plan if call is PROMPT else decode_step_plan)(guarded.plan)
    assert plan is not None
    derived = decoder("add", 2, cache=True)
    dissect(derived)
    rewrite(derived, plan)
    tokens = 1 if call is STEP else 6
    wanted, shown = (run(model, feeds(model, tokens)) for model in (guarded.model, derived))
    assert {"logits", "present.0.key"} < {*shown} <= {*wanted} and (call is STEP or {*shown} == {*wanted})
    for name in shown:
        assert shown[name].shape == wanted[name].shape
        np.testing.assert_allclose(shown[name], wanted[name], rtol=0, atol=2e-6 * np.abs(wanted["logits"]).max())
