"""The embedding graph of onnxruntime-genai's picture pipelines: token embeddings, and image features at the image tokens.

    input_ids [batch, sequence], image_features [image tokens, width] -> inputs_embeds [batch, sequence, width]

genai runs it once for the prompt, with the vision encoder's output, and once for each further token, with no features. Where
there are features, there must be one row per image token, in reading order: another number of rows stops the runtime. Without
features an image token, which only the model's own answer can contain, keeps its embedding.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .errors import GuardError
from .node_builder import PREFIX, NodeBuilder
from .roles import TOKENS

FEATURES = "image_features"


def insert_image_features(embed_tokens: ir.Model, image_token: int, features: ir.Value) -> None:
    """Give an embedding graph the input `image_features`, in place; `strip_guard` takes out all but the input.

    Args:
        embed_tokens: `input_ids` -> embeddings.
        image_token: id of the token that a row of features replaces.
        features: the vision encoder's output; the new input has its type, and its shape if that is a list of rows. An axis of
            pictures is genai's to give or to leave out, as it does without a picture, so then no shape is declared.

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
    flat = builder.op("rows", "Reshape", [rows, builder.integers(-1, width)])
    if features.dtype != embeds.dtype:
        flat = builder.op("cast", "Cast", [flat], to=int(embeds.dtype))
    token = builder.constant("image_token", np.array(image_token, ids.dtype.numpy()))
    count = builder.op("count", "Gather", [builder.op("shape", "Shape", [flat]), builder.integers(0)])
    given = builder.op("given", "Greater", [count, builder.integers(0)])
    replaced = builder.op("replaced", "And", [builder.op("is_image", "Equal", [ids, token]), given])
    places = builder.op("places", "Transpose", [builder.op("axes", "NonZero", [replaced])], perm=[1, 0])
    inserted = builder.op("inserted", "ScatterND", [embeds, places, flat], like=embeds)
    builder.place_last()
    inserted.name, embeds.name = embeds.name, f"{PREFIX}{FEATURES}/text"
    graph.outputs[0] = inserted
