"""A guard that is taken out again leaves the source, node for node; anything else that was done stays in sight."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from hand_graphs import KINDS, Kind, all_guards, copy_of, decoder, directions, guard_model, node_called, value_called

from vlmguard.graphs.errors import GuardIncomplete
from vlmguard.graphs.graph_io import graph_bytes
from vlmguard.graphs.proof.strip import strip_guard
from vlmguard.graphs.proof.structure import same_graph
from vlmguard.graphs.spec import GuardSpec


@pytest.mark.parametrize("hidden", [True, False], ids=["sum-is-output", "sum-is-inside"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stripped_graph_is_the_source(kind: Kind, hidden: bool) -> None:
    for spec in all_guards():
        for mask, dtype in ((True, "float32"), (False, "float16")):
            source = decoder(kind, 3, dtype, mask, hidden=hidden)
            model = decoder(kind, 3, dtype, mask, hidden=hidden)
            guard_model(model, directions((0, 2)), spec)
            stripped = copy_of(model)
            assert not same_graph("guarded", copy_of(source), stripped).ok
            strip_guard(stripped)
            check = same_graph("stripped", copy_of(source), stripped)
            assert check.ok, (spec, check.note)
            assert not any(key.startswith("vlmguard") for key in stripped.metadata_props)
            assert graph_bytes(stripped) == graph_bytes(copy_of(source))
            assert readers(stripped) <= set(stripped.graph)


def readers(model: ir.Model) -> set[ir.Node]:
    """Whoever reads a value of the graph: a guard node that is gone must not be found by that any more."""
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    return {reader for value in values for reader in value.consumers()}


def test_stripping_twice_is_refused() -> None:
    model = decoder()
    sentence = "the decoder carries no guard; it was never guarded, or the guard was removed"
    for _ in range(2):
        with pytest.raises(GuardIncomplete) as refusal:
            strip_guard(model)
        assert str(refusal.value) == sentence
        guard_model(model, directions(), GuardSpec())
        strip_guard(model)


def test_a_guard_that_leads_nowhere_is_not_stripped() -> None:
    model = guard_model(decoder(), directions(), GuardSpec(mode="project", positions="all")).model
    node_called(model, "vlmguard/layer_0/guarded").replace_input_with(0, value_called(model, "vlmguard/layer_0/delta"))
    with pytest.raises(GuardIncomplete) as refusal:
        strip_guard(model)
    assert str(refusal.value) == "guard node 'hidden' does not lead back to the value it guards; export again"


def test_what_the_guard_did_besides_is_not_undone() -> None:
    """Tampering with what is not the guard's stays where a comparison sees it."""
    model = guard_model(decoder(layers=2), directions(), GuardSpec()).model
    node_called(model, "make layer_1_scores").replace_input_with(0, value_called(model, "layer_0_branch"))
    strip_guard(model)
    check = same_graph("stripped", decoder(layers=2), model)
    assert (check.ok, check.note) == (False, "node 'make layer_1_scores' differs")
