"""The embedding graph of onnxruntime-genai's picture pipelines: token embeddings, and image features at the image tokens.

    input_ids [batch, sequence], image_features [image tokens, width] -> inputs_embeds [batch, sequence, width]

Where the features of several layers lie side by side (`genai_deepstack`), embeddings are as wide: zeros follow each.

genai runs it once for the prompt, with the vision encoder's output, and once for each further token, with no features. Where
there are features, there must be one row per image token, in reading order: another number of rows stops the runtime. Without
features an image token, which only the model's own answer can contain, keeps its embedding.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .errors import GuardError
from .node_builder import PREFIX, NodeBuilder
from .proof.strip import strip_guard
from .roles import TOKENS
from .runtime_controls import take_back_inputs

FEATURES = "image_features"
_WIDE = "wide"


def insert_image_features(embed_tokens: ir.Model, image_token: int, features: ir.Value, layers: int = 1) -> None:
    """Give an embedding graph the input `image_features`, in place; `take_out_image_features` undoes it.

    Args:
        embed_tokens: `input_ids` -> embeddings.
        image_token: id of the token that a row of features replaces.
        features: the vision encoder's output; the new input has its type, and its shape if that is a list of rows. An axis of
            pictures is genai's to give or to leave out, as it does without a picture, so then no shape is declared.
        layers: number of layers whose features lie side by side.

    Raises:
        GuardError: the graph has other inputs or outputs.
    """
    graph = embed_tokens.graph
    names = [str(value.name) for value in graph.inputs]
    if names != [TOKENS] or len(graph.outputs) != 1:
        raise GuardError(
            f"the embedding graph takes {', '.join(names)} and gives {len(graph.outputs)} outputs; image features can be "
            "inserted only where it takes input_ids and gives embeddings"
        )
    (ids,), (embeds,) = graph.inputs, graph.outputs
    width = embeds.shape[-1] if embeds.shape is not None else None
    if not isinstance(width, int) or ids.dtype is None or embeds.dtype is None:
        raise GuardError("the embedding graph does not declare the width of its output; export the model again")
    is_list = features.shape is not None and len(features.shape) == 2
    rows = ir.Value(name=FEATURES, type=features.type, shape=features.shape if is_list else None)
    graph.inputs.append(rows)
    builder = NodeBuilder(graph, FEATURES)
    flat = builder.op("rows", "Reshape", [rows, builder.integers(-1, layers * width)])
    if features.dtype != embeds.dtype:
        flat = builder.op("cast", "Cast", [flat], to=int(embeds.dtype))
    token = builder.constant("image_token", np.array(image_token, ids.dtype.numpy()))
    count = builder.op("count", "Gather", [builder.op("shape", "Shape", [flat]), builder.integers(0)])
    given = builder.op("given", "Greater", [count, builder.integers(0)])
    replaced = builder.op("replaced", "And", [builder.op("is_image", "Equal", [ids, token]), given])
    places = builder.op("places", "Transpose", [builder.op("axes", "NonZero", [replaced])], perm=[1, 0])
    text = embeds
    if layers > 1:
        text = builder.op(_WIDE, "Pad", [embeds, builder.integers(0, 0, 0, 0, 0, (layers - 1) * width)])
        text.type, text.shape = embeds.type, ir.Shape([*(embeds.shape or ())[:-1], layers * width])
    inserted = builder.op("inserted", "ScatterND", [text, places, flat], like=text)
    builder.place_last()
    inserted.name, embeds.name = embeds.name, f"{PREFIX}{FEATURES}/text"
    graph.outputs[0] = inserted


def take_out_image_features(embedding: ir.Model) -> None:
    """Undo `insert_image_features` in place.

    Raises:
        GuardIncomplete: its nodes are not there, or do not lead back to embeddings.
    """
    wide = next((node for node in embedding.graph if node.name == f"{PREFIX}{FEATURES}/{_WIDE}"), None)
    if wide is not None and wide.inputs[0] is not None:
        wide.outputs[0].replace_all_uses_with(wide.inputs[0])
    strip_guard(embedding)
    take_back_inputs(embedding.graph, {FEATURES})
