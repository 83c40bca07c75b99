"""Gates of all layers, written together before the first guarded layer: fewer nodes per layer.

A gate by itself compares a score with a threshold, and the edit is multiplied with the selection of tokens. Here the
thresholds of all layers are one tensor that the selection is part of: at a token that is not edited it is more than any score.
The gate is then closed there, and no layer multiplies with the selection. Where the gate reads the text-only query alone, it
is not just the threshold but the decision that all layers share.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from .guard_ports import supervisor_input
from .lowerings.gate import columns, threshold_of
from .lowerings.task import Gate, SharedGate
from .modes import guard_mode
from .node_builder import NodeBuilder
from .runtime_controls import SCORES_OUTPUT
from .subgraph_edit import SubgraphEdit

# Beyond every score and every threshold, the forced ones of the proof included; finite, so that nothing becomes NaN.
BEYOND = float(np.finfo(np.float32).max)


def shares_gates(edit: SubgraphEdit) -> bool:
    """Whether this guard's gates are written together.

    Not where a gate is held: what the prompt decided is open at every token, so there the selection stays a factor. Not where
    every token is edited by its own state: nothing is shared then but a constant.
    """
    row = guard_mode(edit.plan.mode)
    if tuple(site.layer_index for site in edit.sites) != edit.plan.layers:
        return False  # this body holds some of the layers: the guard's inputs have rows for all
    if edit.lowering.score_unit is None or row.gate is None or edit.held or edit.plan.paired:
        return False
    return row.toward_text or edit.plan.edits_last


def write_shared_gates(edit: SubgraphEdit, builder: NodeBuilder, selected: ir.Value | None) -> dict[int, SharedGate]:
    """What the gates of all layers compute together, by layer.

    Args:
        edit: the body, with the guard's inputs.
        builder: adds the nodes.
        selected: the tokens to edit, `[batch, sequence, 1]` bool; `None` for all.
    """
    thresholds, units = _thresholds(edit)
    level = _stacked(builder, thresholds, units, edit.offset)
    if guard_mode(edit.plan.mode).toward_text:
        return _decided(edit, builder, selected, level, thresholds)
    assert selected is not None, "shares_gates asks for a selection"
    ends = [builder.constant(name, np.array(end), "float32") for name, end in (("below", -BEYOND), ("beyond", BEYOND))]
    floor = builder.op("floor", "Where", [selected, *ends])
    levels = _by_layer(builder, "level", builder.op("levels_selected", "Max", [level, floor]), thresholds, axis=-1)
    return {
        layer: SharedGate(threshold, part) for (layer, threshold), part in zip(thresholds.items(), levels, strict=True)
    }


def _decided(
    edit: SubgraphEdit,
    builder: NodeBuilder,
    selected: ir.Value | None,
    level: ir.Value,
    thresholds: dict[int, ir.Value],
) -> dict[int, SharedGate]:
    """Gates that read the text-only query alone: one decision per row and layer, at the tokens to edit."""
    supervisor = supervisor_input(edit)
    assert supervisor is not None, "such a mode has the input"
    score = columns(builder, "first", supervisor, 0, 1) if edit.plan.sites[0].guard.rank > 1 else supervisor
    row = builder.op("row", "Transpose", [score], perm=[0, 2, 1])  # [batch, 1, layers]
    opened = builder.cast("gates", builder.op("opens", "Greater", [row, level]), "float32")
    if selected is not None:
        opened = builder.op("gates_selected", "Mul", [opened, builder.cast("selection", selected, "float32")])
    gates = _by_layer(builder, "gate", opened, thresholds, axis=-1)
    scores: list[ir.Value] | list[None] = [None] * len(thresholds)
    if SCORES_OUTPUT in edit.plan.added_outputs:
        scores = _by_layer(builder, "score", score, thresholds, axis=1)
    return {
        layer: SharedGate(threshold, decided=Gate(own, gate, threshold))
        for (layer, threshold), own, gate in zip(thresholds.items(), scores, gates, strict=True)
    }


def _by_layer(builder: NodeBuilder, name: str, value: ir.Value, layers: Iterable[int], axis: int) -> list[ir.Value]:
    return builder.split(name, value, [f"{name}_of_layer_{layer}" for layer in layers], axis)


def _thresholds(edit: SubgraphEdit) -> tuple[dict[int, ir.Value], list[float]]:
    """Each layer's threshold as an initializer of its own `[1]`, by layer; and the unit of each layer's score."""
    assert edit.lowering.score_unit is not None
    thresholds, units = {}, []
    for planned in edit.sites:
        units.append(edit.lowering.score_unit(edit.plan.mode, planned.guard, planned.site.dtype))
        own = edit.builder(f"layer_{planned.layer_index}")
        thresholds[planned.layer_index] = threshold_of(own, planned.guard, units[-1])
        edit.initializers += own.initializers
    return thresholds, units


def _stacked(
    builder: NodeBuilder, thresholds: dict[int, ir.Value], units: list[float], offset: ir.Value | None
) -> ir.Value:
    """`[layers]` float32: each threshold in its layer's unit, with the offset that a caller gives."""
    level, *others = thresholds.values()
    if others:  # of constants only: a runtime folds it when it loads the graph
        level = builder.op("thresholds", "Concat", [level, *others], axis=0)
    if offset is None:
        return level
    if set(units) != {1.0}:
        offset = builder.op("offsets", "Mul", [offset, builder.constant("units", np.array(units), "float32")])
    return builder.op("levels", "Add", [level, offset])
