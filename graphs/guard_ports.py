"""The guard's own inputs and outputs in a rewritten graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from .lowerings.task import Written, WrittenWhole
from .modes import guard_mode
from .node_builder import NodeBuilder
from .pairs import SUPERVISOR_KEY
from .plan import COORDINATES_OUTPUT, SUPERVISOR_INPUTS, GuardPlan, SitePlan, number_input, number_of_input
from .runtime_controls import (
    PRESENT_GATE_OUTPUT,
    SCORES_OUTPUT,
    declare_knob,
)
from .sites import find_node
from .subgraph_edit import SubgraphEdit
from .subgraphs import DecoderSubgraph, find_bodies, surface


def declare_inputs(model: ir.Model, plan: GuardPlan, shapes: Mapping[str, ir.Shape]) -> dict[str, ir.Value]:
    """The inputs that the plan adds, by name."""
    given = {}
    for name in plan.added_inputs:
        if name in plan.knobs:
            given[name] = declare_knob(model.graph, name)
        else:
            given[name] = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=shapes[name])
            model.graph.inputs.append(given[name])
    return given


def port_shapes(model: ir.Model, plan: GuardPlan) -> dict[str, ir.Shape]:
    """`[batch, layers, m]` of coordinates, `[batch, 1, 1]` of a single one, `[batch, layers]` of gates and scores."""
    names = [name for name in (*plan.added_inputs, *plan.added_outputs) if name not in plan.knobs]
    if not names:
        return {}
    batch = _batch(model, plan)
    of_gates: list[ir.SymbolicDim | int | str] = [batch, len(plan.layers)]
    ranked = {*SUPERVISOR_INPUTS, COORDINATES_OUTPUT}
    shapes = {name: ir.Shape([*of_gates, plan.sites[0].guard.rank] if name in ranked else of_gates) for name in names}
    return shapes | {name: ir.Shape([batch, 1, 1]) for name in names if number_of_input(name) is not None}


def _batch(model: ir.Model, plan: GuardPlan) -> ir.SymbolicDim | int | str:
    """The stream's batch dimension in the graph: with it, TensorRT can prove that supervisor and stream have equal sizes,
    and keeps
    fusing the nodes after the guard."""
    (body, *_) = find_bodies(model, plan.bodies)
    node = find_node(body.graph, plan.sites[0].site.anchor)
    assert node is not None and node.inputs[0] is not None
    stream = node.inputs[0].shape
    batch = stream[0] if stream else None
    known = [value.shape[0] for value in model.graph.inputs if value.shape]
    return (
        batch if isinstance(batch, int) or (batch is not None and batch.value and batch in known) else "vlmguard_batch"
    )


def supervisor_input(edit: SubgraphEdit) -> ir.Value | None:
    """The text-only coordinates of all layers, `[batch, layers, m]`; `None` in a mode that has no such input."""
    return next((edit.given[name] for name in SUPERVISOR_INPUTS if name in edit.given), None)


def split_supervisor(edit: SubgraphEdit, builder: NodeBuilder) -> dict[int, ir.Value]:
    """Each layer's row of the input, `[batch, 1, m]`: it meets every token."""
    supervisor, layers = supervisor_input(edit), edit.plan.layers
    if supervisor is None:
        return {}
    rows = builder.split("supervisor", supervisor, [f"layer_{layer}" for layer in layers], axis=1)
    return dict(zip(layers, rows, strict=True))


def supervisor_numbers(edit: SubgraphEdit, planned: SitePlan) -> tuple[ir.Value, ...]:
    """This layer's coordinates as single inputs, `[batch, 1, 1]` each; empty for a graph that takes them stacked."""
    if edit.plan.supervisor != "numbers":
        return ()
    rows = range(edit.plan.text_rows(planned.guard))
    return tuple(edit.given[number_input(planned.layer_index, row)] for row in rows)


def keep_outputs(edit: SubgraphEdit, builder: NodeBuilder, written: Written | WrittenWhole) -> None:
    """Write this layer's outputs at the last token: coordinates `[batch, 1, m]`, scores and gates `[batch, 1]`."""
    for output in edit.plan.added_outputs:
        assert isinstance(written, Written), "a guard written as one matrix has no outputs"
        if output == COORDINATES_OUTPUT:
            value = _own_coordinates(edit, builder, written)
        elif output == SCORES_OUTPUT:
            value = _score(edit, builder, written)
        else:
            assert output == PRESENT_GATE_OUTPUT and written.gate is not None, output
            value = builder.op("present_gate", "GatherND", [written.gate.opened, edit.ends])
        edit.guard_outputs[output].append(value)


def _own_coordinates(edit: SubgraphEdit, builder: NodeBuilder, written: Written) -> ir.Value:
    assert written.coordinates is not None and edit.ends is not None
    c = builder.op("own_last", "GatherND", [written.coordinates, edit.ends])
    return builder.op("own", "Unsqueeze", [c, builder.integers(1)])


def _score(edit: SubgraphEdit, builder: NodeBuilder, written: Written) -> ir.Value:
    """The gate's score in its own unit, not in the power of two that the lowering reads it in."""
    made = written.gate
    assert made is not None and edit.ends is not None
    assert made.score is not None, "shared gates keep the scores that are an output"
    if guard_mode(edit.plan.mode).decides_by_text:  # one score per row, whatever the token
        return builder.op("score_unscaled", "Squeeze", [made.score, builder.integers(-1)])
    value = builder.op("score_last", "GatherND", [made.score, edit.ends])
    if made.unit == 1.0:
        return value
    return builder.op(
        "score_unscaled", "Mul", [value, builder.constant("score_unscaled_unit", np.array(1 / made.unit), "float32")]
    )


def add_output(model: ir.Model, edits: list[SubgraphEdit], output: str, shape: ir.Shape) -> None:
    """Add one output with the values of all guarded layers, `[batch, layers, ...]`.

    Args:
        model: the graph being rewritten.
        edits: one per subgraph, with the values of its layers.
        output: name of the output.
        shape: of the output.
    """
    given: dict[DecoderSubgraph, ir.Value] = {}
    for edit in edits:
        builder = edit.builder(output.removeprefix("vlmguard."))
        given[edit.body] = builder.op("all_layers", "Concat", edit.guard_outputs[output], axis=1)
        builder.place_last()
        edit.shared += names_of(builder)
        edit.initializers += builder.initializers
    surface(model, given, output, shape)


def record_guard(model: ir.Model, plan: GuardPlan) -> None:
    """Record the guard in the metadata of the graph."""
    model.metadata_props.update(
        {
            "vlmguard.schema": "vlmguard.guarded/1",
            "vlmguard.mode": plan.mode,
            "vlmguard.layers": ",".join(map(str, plan.layers)),
            "vlmguard.positions": plan.positions,
            "vlmguard.lowering": plan.lowering,
            **({SUPERVISOR_KEY: "rows"} if plan.paired else {}),
        }
    )


def names_of(builder: NodeBuilder) -> tuple[str, ...]:
    return tuple(node.name or "" for node in builder.nodes)
