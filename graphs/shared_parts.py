"""What a guard writes once for all sites of a body, before the first: knobs, the last token, tensors with a part per layer."""

from __future__ import annotations

import onnx_ir as ir

from .call_inputs import CallInputs, call_inputs
from .guard_ports import names_of, numbers_of_tokens, split_supervisor
from .node_builder import NodeBuilder
from .pairs import PairedRows
from .positions import LastToken
from .runtime_controls import OFFSET_INPUT, PAST_GATE_INPUT, STRENGTH_INPUT, write_held, write_offset, write_strength
from .shared_gates import shares_gates, write_shared_gates
from .sites import find_node, sequence_stream
from .subgraph_edit import SubgraphEdit
from .token_layout import in_rows
from .whole_mask import WholeMask


def write_shared_parts(edit: SubgraphEdit) -> None:
    """Write them, and keep in `edit` what the sites read."""
    _read_runtime_controls(edit)
    _find_last_token(edit)
    _split_by_layer(edit)


def _read_runtime_controls(edit: SubgraphEdit) -> None:
    """Nodes that read the guard's own inputs for all layers, written once before the first site."""
    knobs = edit.builder("knobs")
    if (strength := edit.given.get(STRENGTH_INPUT)) is not None:
        edit.selections |= {dtype: write_strength(knobs, strength, dtype) for dtype in _selected_dtypes(edit)}
    if (offset := edit.given.get(OFFSET_INPUT)) is not None:
        edit.offset = write_offset(knobs, offset)
    _share(edit, knobs)
    gate = edit.builder("gate")
    if (past := edit.given.get(PAST_GATE_INPUT)) is not None:
        edit.held = write_held(gate, past, edit.plan.layers)
    _share(edit, gate)


def _find_last_token(edit: SubgraphEdit) -> None:
    """Each row's last token, computed once before the first site: `ends` to read by, `selections` to write by."""
    builder = edit.builder("positions")
    found = call_inputs(edit.model.graph) if edit.plan.mask else CallInputs()
    reads_mask = WholeMask if found.mask is not None and edit.plan.calls == "whole" else LastToken
    last = reads_mask(builder, _stream(edit), found)
    pairs = PairedRows(builder, last) if edit.plan.paired else None
    if edit.plan.edits_last:
        edit.places = last.selected if pairs is None else last.selected_in(pairs.edited)
        for dtype in () if shares_gates(edit) else _selected_dtypes(edit):
            selected = builder.cast(f"selected_{dtype}", edit.places, dtype)
            if edit.plan.calls != "any":
                selected = in_rows(builder, f"selected_{dtype}_in_rows", selected)
            edit.selections[dtype] = _with_strength(edit, builder, selected, dtype)
    if edit.plan.added_outputs:
        edit.ends = last.pairs if edit.plan.calls == "any" else last.selected
    if pairs is not None:
        edit.text_ends = pairs.text_ends
        edit.step_tokens = pairs.step_tokens.name or ""
    _share(edit, builder)


def _split_by_layer(edit: SubgraphEdit) -> None:
    """Each layer's part of what is written once for all of them."""
    supervisors = edit.builder("supervisor")
    if edit.plan.calls != "any" and edit.lowering.takes_numbers:
        numbers_of_tokens(edit, supervisors, _stream(edit))
    else:
        edit.supervisors = split_supervisor(edit, supervisors)
    _share(edit, supervisors)
    gates = edit.builder("gates")
    if shares_gates(edit):
        edit.shared_gates = write_shared_gates(edit, gates, edit.places)
    _share(edit, gates)


def _stream(edit: SubgraphEdit) -> ir.Value:
    """`[batch, sequence, d]`, as the first guarded layer reads it."""
    residual = next(
        value
        for value in _first_node(edit).inputs[:2]
        if value is not None and value.name == edit.sites[0].site.residual
    )
    stream = sequence_stream(residual)
    assert stream is not None, "dissect refuses such a site"
    return stream


def _selected_dtypes(edit: SubgraphEdit) -> list[str]:
    """Dtypes of the selection that the lowering multiplies its weights with."""
    return sorted({edit.lowering.selects(edit.plan.mode, site.site.dtype) for site in edit.sites})


def _with_strength(edit: SubgraphEdit, builder: NodeBuilder, selected: ir.Value, dtype: str) -> ir.Value:
    """The strength goes in with the selection, once: no layer needs a node more for it."""
    strength = edit.selections.get(dtype)
    if strength is None:
        return selected
    return builder.op(f"selected_{dtype}_strength", "Mul", [selected, strength])


def _first_node(edit: SubgraphEdit) -> ir.Node:
    node = find_node(edit.graph, edit.sites[0].site.anchor)
    assert node is not None
    return node


def _share(edit: SubgraphEdit, builder: NodeBuilder) -> None:
    """Nodes that serve all sites of the body go before the first."""
    if builder.nodes:
        builder.place_before(_first_node(edit))
    edit.shared += names_of(builder)
    edit.initializers += builder.initializers
