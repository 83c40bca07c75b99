"""Proves a folded graph without running it: every writer of the stream is orthogonal to the subspace.

The writers are found anew in the shipped graph, by structure, so a missing or additional writer is detected. The error
allowed for rounding to the weight's dtype is computed (`fold.left_over`).
"""

from __future__ import annotations

import onnx_ir as ir

from ..anatomy import DecoderAnatomy
from ..dataflow import is_skip_norm
from ..dtypes import STREAM_DTYPES
from ..errors import GuardError
from ..lowerings.fold import SCOPE, find_writers, left_over, original_name, projected, subspace
from ..lowerings.table import choose_lowering
from ..lowerings.task import Task
from ..node_builder import NodeBuilder
from ..plan import GuardPlan
from ..planner import last_sites
from ..rewrite import GuardReport
from .structure import Check, attribute_bits, exact, same_graph, same_tensor, signature_unchanged


def prove_fold(
    source: ir.Model, folded: ir.Model, anatomy: DecoderAnatomy, plan: GuardPlan, report: GuardReport
) -> tuple[Check, ...]:
    """All static checks of a fold.

    Args:
        source: the graph before the fold.
        folded: the graph after it.
        anatomy: of the source.
        plan: the guard's plan.
        report: of the rewrite.
    """
    return (
        signature_unchanged(source, folded, plan),
        writers_orthogonal(folded, anatomy, plan, report.initializers),
        other_weights_untouched(source, folded, anatomy),
        nodes_unchanged(source, folded),
    )


def writers_orthogonal(
    folded: ir.Model, anatomy: DecoderAnatomy, plan: GuardPlan, expected: tuple[str, ...] | None = None
) -> Check:
    """Check that `|W V^T|` of every weight that writes the stream is within rounding, and that no other weight writes to it.

    Args:
        folded: the shipped graph.
        anatomy: of the source or of the shipped graph; a fold changes no node.
        plan: with the subspace.
        expected: names of the folded initializers, from a report; else all of that name in the graph.
    """
    name = "every weight that writes the stream is orthogonal to the direction"
    try:
        writers = find_writers(folded, last_sites(anatomy), plan.width)
    except GuardError as error:
        return exact(name, 0, [str(error)])
    basis = subspace(plan.sites[0].guard.ssd)
    known = set(expected) if expected is not None else {k for k in folded.graph.initializers if k.startswith(SCOPE)}
    weights = {(writer.weight, writer.axis) for writer in writers}
    wrong = [
        f"{weight.name!r} writes the stream, and was not folded" for weight, _ in weights if weight.name not in known
    ]
    wrong += [f"{absent!r} no longer writes the stream" for absent in sorted(known - {w.name for w, _ in weights})]
    worst = 0.0
    for weight, axis in weights:
        assert weight.const_value is not None
        seen, explained = left_over(weight.const_value.numpy(), axis, basis)
        worst = max(worst, seen / explained)
        if not seen <= explained:  # not a number is not fine either
            wrong.append(f"{weight.name!r} writes {seen:.1e} along the direction, rounding explains {explained:.1e}")
    note = (
        "; ".join(wrong[:3]) or f"{len(weights)} weights; the largest |W V^T| is {worst:.2f} of what rounding explains"
    )
    return Check(name, len(weights), worst, 1.0, bool(weights) and not wrong, note)


def other_weights_untouched(source: ir.Model, folded: ir.Model, anatomy: DecoderAnatomy) -> Check:
    """Every initializer that does not write the stream is there, the same bytes; the folded ones are all that is new."""
    before, after = source.graph.initializers, folded.graph.initializers
    written = {w.weight.name for w in find_writers(source, last_sites(anatomy), anatomy.width)}
    wrong = [key for key in before if key in after and not same_tensor(before[key], after[key])]
    wrong += [key for key in before if key not in after and key not in written]
    wrong += [key for key in after if key not in before and not key.startswith(SCOPE)]
    return exact("weights that do not write the stream are untouched", sum(key in after for key in before), wrong)


def nodes_unchanged(source: ir.Model, folded: ir.Model) -> Check:
    """Node for node the source's; only which weight a writer reads differs, and the folded one bears its name."""
    left, right = list(source.graph.all_nodes()), list(folded.graph.all_nodes())
    wrong = [] if len(left) == len(right) else [f"{len(right)} nodes, the source has {len(left)}"]
    for a, b in zip(left, right, strict=False):
        if _facts(a) != _facts(b):
            wrong.append(f"node {b.name or b.outputs[0].name!r} differs")
    return exact("nodes are the source's", len(left), wrong)


def _facts(node: ir.Node) -> tuple[object, ...]:
    """A node without its folded weights, comparable; nodes of its bodies are compared separately."""
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    attributes = tuple(
        (key, None if value.type in graphs else attribute_bits(value)) for key, value in sorted(node.attributes.items())
    )
    inputs = tuple(None if value is None else original_name(value.name or "") for value in node.inputs)
    return node.op_type, node.domain, inputs, tuple(value.name for value in node.outputs), attributes


def refolded(expected: ir.Model, shipped: ir.Model) -> Check:
    """The source, folded again, bit for bit."""
    return same_graph("the source folded again is the shipped graph, bit for bit", expected, shipped)


def project_explicitly(model: ir.Model, plan: GuardPlan) -> int:
    """Insert the equivalent guard explicitly, in place: a projection by nodes after every writer of the stream.

    A folded graph is compared with it; it is never shipped. Returns the number of projections.
    """
    last = plan.layers[-1]
    ends = [planned.site for planned in plan.sites if planned.layer_index == last]
    guard = plan.sites[0].guard
    writers = find_writers(model, ends, plan.width)
    behind = {writer.node: writer for writer in writers if not is_skip_norm(writer.node)}
    for writer in writers:
        if is_skip_norm(writer.node):  # a bias inside a fused sum: no node can come behind it
            tensor = writer.weight.const_value
            assert tensor is not None
            array = projected(tensor.numpy(), writer.axis, subspace(guard.ssd))
            writer.weight.const_value = ir.Tensor(array, name=writer.weight.name)
    for number, (node, writer) in enumerate(behind.items()):
        raw = node.outputs[0]
        dtype = STREAM_DTYPES.get(raw.dtype or writer.weight.dtype or ir.DataType.UNDEFINED, plan.sites[0].site.dtype)
        assert isinstance(node.graph, ir.Graph)
        builder = NodeBuilder(node.graph, f"reference_{number}", home=model.graph)
        new, _ = choose_lowering("lowrank", "project")[0].guarded(builder, raw, Task("project", guard, dtype))
        own = set(builder.nodes)
        for reader, index in tuple(raw.uses()):
            if reader not in own:
                reader.replace_input_with(index, new)
        builder.place_after(node)
    return len(behind)
