"""DeepStack in a picture pipeline of onnxruntime-genai, which hands on one tensor of features and one of embeddings.

    vision encoder  image_features, deepstack_features_i [image tokens, width] -> image_features [image tokens, all widths]
    decoder         inputs_embeds [batch, sequence, all widths] -> inputs_embeds, deepstack_embeds_i [batch, sequence, width]

The features of all layers lie side by side in one row. Between the two, the embedding graph puts zeros beside each embedding
(`genai_embedding`). Each graph gets one node, `Concat` or `Split`, and what it computes stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from .errors import GuardError, GuardIncomplete
from .node_builder import PREFIX, NodeBuilder
from .roles import EMBEDS
from .subgraphs import take_out
from .whole_numbers import whole_number

_SCOPE = "deepstack"
_OWN = f"{PREFIX}{_SCOPE}/"
PLACES = "vlmguard.deepstack"  # metadata of a decoder: where its inputs were that are parts of `inputs_embeds` now


def join_features(vision: ir.Model) -> None:
    """Make one output of a vision encoder's features, in place, named as the first; `take_apart_features` undoes it.

    Raises:
        GuardError: the outputs are no rows of one width.
    """
    graph = vision.graph
    builder = NodeBuilder(graph, _SCOPE)
    features = list(graph.outputs)
    joined = builder.op("joined", "Concat", features, axis=-1)
    _declare(joined, features, "the vision encoder's outputs")
    builder.place_last()
    joined.name, features[0].name = features[0].name, f"{_OWN}{features[0].name}"
    graph.outputs[:] = [joined]


def take_apart_features(vision: ir.Model) -> None:
    """Undo `join_features` in place; nothing happens in an encoder without its node.

    Raises:
        GuardIncomplete: the node is not as it was inserted.
    """
    graph = vision.graph
    node = _own_node(graph, "Concat")
    if node is None:
        return
    features = [value for value in node.inputs if value is not None]
    name = str(features[0].name)
    if len(graph.outputs) != 1 or graph.outputs[0] is not node.outputs[0] or not name.startswith(_OWN):
        raise GuardIncomplete(_changed("joins the features"))
    graph.outputs[:] = features
    take_out(graph, [node])
    features[0].name = name.removeprefix(_OWN)


def split_embeds(decoder: ir.Model, rows: Sequence[str]) -> None:
    """Make inputs of a decoder parts of `inputs_embeds`, in place; `take_out_split` undoes it.

    Args:
        decoder: takes `inputs_embeds` and the inputs `rows`, `[batch, sequence, width]` each.
        rows: names of these inputs, in the order of the vision encoder's outputs.

    Raises:
        GuardError: they are not of one width and type.
    """
    graph = decoder.graph
    places = {str(value.name): place for place, value in enumerate(graph.inputs)}
    inputs = [graph.inputs[places[name]] for name in (EMBEDS, *rows)]
    wide = ir.Value(name=EMBEDS)
    _declare(wide, inputs, "the decoder's inputs")
    builder = NodeBuilder(graph, _SCOPE)
    parts = builder.split("split", wide, [EMBEDS, *rows], axis=-1)
    for value, part in zip(inputs, parts, strict=True):
        part.type, part.shape = value.type, value.shape
        value.replace_all_uses_with(part)
    graph.inputs[places[EMBEDS]] = wide
    for value in inputs[1:]:
        graph.inputs.remove(value)
    builder.place_before(graph[0])
    decoder.metadata_props[PLACES] = ",".join(str(places[name]) for name in rows)


def take_out_split(decoder: ir.Model) -> None:
    """Undo `split_embeds` in place; nothing happens in a decoder without its node.

    Raises:
        GuardIncomplete: the node is not as it was inserted.
    """
    graph = decoder.graph
    node = _own_node(graph, "Split")
    written = decoder.metadata_props.pop(PLACES, "")
    if node is None:
        return
    places = [place for text in written.split(",") if (place := whole_number(text)) is not None]
    names = [value.name for value in graph.inputs]
    source = node.inputs[0]
    if (
        source is None
        or source.name != EMBEDS
        or EMBEDS not in names
        or len(places) != len(node.outputs) - 1
        or not all(str(part.name).startswith(_OWN) for part in node.outputs)
    ):
        raise GuardIncomplete(_changed("splits inputs_embeds"))
    values = []
    for part in node.outputs:
        values.append(ir.Value(name=str(part.name).removeprefix(_OWN), type=part.type, shape=part.shape))
        part.replace_all_uses_with(values[-1])
    take_out(graph, [node])
    graph.inputs[names.index(EMBEDS)] = values[0]
    for place, value in zip(places, values[1:], strict=True):
        graph.inputs.insert(place, value)


def _declare(wide: ir.Value, parts: Sequence[ir.Value], what: str) -> None:
    """The type and shape of parts beside one another.

    Raises:
        GuardError: they have none in common.
    """
    shapes = [part.shape for part in parts]
    first = shapes[0]
    if (
        first is None
        or not isinstance(width := first[-1], int)
        or any(shape is None or len(shape) != len(first) or shape[-1] != width for shape in shapes)
        or len({part.dtype for part in parts}) != 1
    ):
        names = ", ".join(str(part.name) for part in parts)
        raise GuardError(
            f"{what} {names} are no rows of one width and type, which lie side by side for onnxruntime-genai; keep the layout "
            "that it has"
        )
    wide.type, wide.shape = parts[0].type, ir.Shape([*first[:-1], len(parts) * width])


def _own_node(graph: ir.Graph, op_type: str) -> ir.Node | None:
    """The node of this module, if there is one.

    Raises:
        GuardIncomplete: there are others with its name.
    """
    own = [node for node in graph if (node.name or "").startswith(_OWN)]
    if own and [node.op_type for node in own] != [op_type]:
        raise GuardIncomplete(_changed("has features side by side"))
    return own[0] if own else None


def _changed(does: str) -> str:
    return f"the node that {does} was changed; package the guarded folder again"
