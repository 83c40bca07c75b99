"""Operators that hide a decoder: unknown ones, which may be its attention, and search loops, which contain all of it."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

# Domains of ONNX, onnxruntime and onnxruntime-extensions; operators of the first are looked up in its schemas.
_ONNX = ("", "ai.onnx")
_KNOWN_DOMAINS = frozenset(
    {
        "ai.onnx.ml",
        "ai.onnx.training",
        "ai.onnx.preview",
        "ai.onnx.preview.training",
        "ai.onnx.contrib",
        "com.microsoft",
        "com.microsoft.extensions",
        "com.microsoft.nchwc",
        "com.ms.internal.nhwc",
    }
)
# onnxruntime writes these into ONNX's own domain, whose standard lacks them.
_WRITTEN_BY_ONNXRUNTIME = frozenset(
    {"SimplifiedLayerNormalization", "Affine", "Scale", "MemcpyFromHost", "MemcpyToHost"}
)
# onnxruntime's `convert_generation` puts the whole decoder into an attribute of one of these.
_SEARCHES = frozenset({"BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch"})


def operator_of(node: ir.Node) -> str:
    """`domain::name`; ONNX's own without the domain."""
    return node.op_type if node.domain in _ONNX else f"{node.domain}::{node.op_type}"


def unknown_operators(model: ir.Model) -> list[ir.Node]:
    """Nodes whose operator is neither ONNX's nor onnxruntime's nor a function of the model, in the graph's order."""
    from onnx import defs

    functions = {(function.domain, function.name) for function in model.functions.values()}
    known: dict[tuple[str, str], bool] = {}
    found = []
    for node in model.graph.all_nodes():
        key = node.domain, node.op_type
        if key not in known:
            if node.domain in _ONNX:
                known[key] = node.op_type in _WRITTEN_BY_ONNXRUNTIME or defs.has(node.op_type)
            else:
                known[key] = node.domain in _KNOWN_DOMAINS
            known[key] = known[key] or key in functions
        if not known[key]:
            found.append(node)
    return found


def hidden_decoder(model: ir.Model, reason: str) -> str | None:
    """Why no decoder was found, where an operator is the cause; `None` where none is.

    Args:
        reason: what the search for the residual stream reported.
    """
    search = next((n for n in model.graph if n.op_type in _SEARCHES and n.domain == "com.microsoft"), None)
    if search is not None:
        return (
            f"the decoder is inside node {search.name!r} (com.microsoft::{search.op_type}), which generates whole answers by "
            "itself and cannot be guarded; give the decoder's own graph, as it was before onnxruntime's convert_generation, "
            "or export the model with onnxruntime-genai's model builder"
        )
    unknown = unknown_operators(model)
    if not unknown:
        return None
    without = reason.split("; ")[0]
    return (
        f"{_named(unknown)}, and without it no decoder is found ({without}); export the model with ONNX or onnxruntime "
        "operators, for example with onnxruntime-genai's model builder"
    )


def uncertain_layers(model: ir.Model, layers: int) -> str | None:
    """Why a layer count that no config confirms is not certain: an unknown operator may be attention too."""
    unknown = unknown_operators(model)
    if not unknown:
        return None
    shown = f"{layers} layer{'s' * (layers > 1)}"
    return (
        f"{_named(unknown)} and may be attention, so that the graph has {shown} is not certain; put the model's config.json, "
        "which has the number of layers, beside the graph"
    )


def _named(nodes: list[ir.Node]) -> str:
    """The commonest of the unknown operators."""
    operator, count = Counter(map(operator_of, nodes)).most_common(1)[0]
    first = next(node for node in nodes if operator_of(node) == operator)
    return f"operator {operator} is unknown ({count} node{'s' * (count > 1)}, first {first.name!r})"
