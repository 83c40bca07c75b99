"""The guard's own inputs and outputs in a rewritten graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from .lowerings.task import Written, WrittenWhole
from .modes import guard_mode
from .node_builder import NodeBuilder
from .pairs import SUPERVISOR_KEY
from .plan import COORDINATES_OUTPUT, SUPERVISOR_INPUTS, GuardPlan, SitePlan, number_input, number_of_input
from .reference import LayerGuard
from .runtime_controls import (
    PRESENT_GATE_OUTPUT,
    SCORES_OUTPUT,
    declare_knob,
)
from .sites import find_node
from .subgraph_edit import SubgraphEdit
from .subgraphs import DecoderSubgraph, find_bodies, surface
from .token_layout import at_every_token, in_rows, of_one_token


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


def numbers_of_tokens(edit: SubgraphEdit, builder: NodeBuilder, stream: ir.Value) -> None:
    """What each layer reads of the text-only coordinates, in the layout of the stream: `Task.numbers` and `Task.aims`."""
    supervisor, layers, guards = supervisor_input(edit), edit.plan.layers, edit.plan.guards
    if supervisor is None:
        return
    rank, mode = guards[0].rank, edit.plan.mode
    coordinates = at_every_token(builder, "coordinates", supervisor, stream, len(layers) * rank)
    aims = coordinates
    if mode == "supervise":
        aims = at_every_token(builder, "aims", _aims(builder, supervisor, guards), stream, len(layers) * rank)
    for place, layer in enumerate(layers):
        edit.numbers[layer] = (in_rows(builder, f"layer_{layer}_first", coordinates, place * rank),)
        if guard_mode(mode).toward_text:
            columns = range(place * rank, (place + 1) * rank)
            edit.aims[layer] = tuple(
                in_rows(builder, f"layer_{layer}_aim_{row}", aims, column) for row, column in enumerate(columns)
            )


def _aims(builder: NodeBuilder, supervisor: ir.Value, guards: Sequence[LayerGuard]) -> ir.Value:
    """`alpha (a - o) + o`, `[batch, layers, m]`: what the coordinates become in mode `supervise`."""
    origins = builder.constant("origins", np.stack([guard.origin for guard in guards]), "float32")
    alphas = builder.constant("alphas", np.array([[guard.alpha] for guard in guards]), "float32")
    strong = builder.op("strength", "Mul", [builder.op("centred", "Sub", [supervisor, origins]), alphas])
    return builder.op("aims", "Add", [strong, origins])


def keep_outputs(edit: SubgraphEdit, written: Written | WrittenWhole) -> None:
    """Keep this layer's part of the outputs, for `add_output`."""
    for output in edit.plan.added_outputs:
        assert isinstance(written, Written), "a guard written as one matrix has no outputs"
        edit.guard_outputs[output].append(written)


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
        given[edit.body] = _WRITERS[output](edit, builder, edit.guard_outputs[output])
        builder.place_last()
        edit.shared += names_of(builder)
        edit.initializers += builder.initializers
    surface(model, given, output, shape)


def _write_coordinates(edit: SubgraphEdit, builder: NodeBuilder, layers: list[Written]) -> ir.Value:
    """`[batch, layers, m]`, in their own unit, not in the power of two that the lowering reads them in."""
    rank = edit.plan.sites[0].guard.rank
    last = _at_last_token(edit, builder, [written.coordinates for written in layers], len(layers), rank)
    units = np.repeat([written.unit for written in layers], rank)
    if edit.plan.calls != "any":
        return _in_own_units(builder, last, units.reshape(-1, rank))
    last = _in_own_units(builder, last, units)
    return builder.op("all_layers", "Reshape", [last, builder.integers(0, len(layers), rank)])


def _write_scores(edit: SubgraphEdit, builder: NodeBuilder, layers: list[Written]) -> ir.Value:
    """`[batch, layers]`, in their own units."""
    gates = [written.gate for written in layers if written.gate is not None]
    scores = [gate.score for gate in gates]
    if guard_mode(edit.plan.mode).decides_by_text and edit.plan.calls == "any":  # one score per row, whatever the token
        return builder.op("all_layers", "Squeeze", [_side_by_side(builder, scores), builder.integers(1)])
    last = _at_last_token(edit, builder, scores, len(layers))
    return _in_own_units(builder, last, np.array([gate.unit for gate in gates]))


def _write_gates(edit: SubgraphEdit, builder: NodeBuilder, layers: list[Written]) -> ir.Value:
    """`[batch, layers]`"""
    return _at_last_token(edit, builder, [written.gate and written.gate.opened for written in layers], len(layers))


_WRITERS = {COORDINATES_OUTPUT: _write_coordinates, SCORES_OUTPUT: _write_scores, PRESENT_GATE_OUTPUT: _write_gates}


def _at_last_token(
    edit: SubgraphEdit, builder: NodeBuilder, values: Sequence[ir.Value | None], *sizes: int
) -> ir.Value:
    """`[batch, layers * k]` at each row's last token, of one `[batch, sequence, k]` per layer;
    `[batch, *sizes]` for calls `whole`."""
    assert edit.ends is not None
    beside = _side_by_side(builder, values)
    if edit.plan.calls != "any":
        return of_one_token(builder, beside, edit.ends, sizes)
    return builder.op("last", "GatherND", [beside, edit.ends])


def _in_own_units(builder: NodeBuilder, value: ir.Value, units: np.ndarray) -> ir.Value:
    """Divided by the powers of two that the columns are in."""
    if (units == 1.0).all():
        return value
    return builder.op("unscaled", "Mul", [value, builder.constant("units", 1 / units, "float32")])


def _side_by_side(builder: NodeBuilder, values: Sequence[ir.Value | None]) -> ir.Value:
    """Values of all layers along the last axis: what follows is then written once, and not once per layer."""
    known = [value for value in values if value is not None]
    assert len(known) == len(values), "a lowering writes every value that the plan outputs"
    return known[0] if len(known) == 1 else builder.op("layers", "Concat", known, axis=-1)


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
