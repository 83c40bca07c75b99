"""Token types in a decoder for onnxruntime-genai, where the tokens of a picture see one another (Gemma 3).

    input_ids [batch, sequence] -> token_type_ids [batch, sequence]: 1 for the tokens of a picture, 0 for all others

genai does not feed `token_type_ids`. It feeds `input_ids` beside `inputs_embeds` to a decoder that takes both (seen with 0.18).
A token is a picture's if it is the image token, as where a runtime feeds `token_type_ids` itself. An image token in an answer
changes nothing: it comes in a call of its own, where there is no other token of a picture to see.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .errors import GuardError, GuardIncomplete
from .node_builder import PREFIX, NodeBuilder
from .roles import TOKEN_TYPES, TOKENS
from .subgraphs import take_out

_SCOPE = "token_types"
_OWN = f"{PREFIX}{_SCOPE}/"


def insert_token_types(decoder: ir.Model, image_token: int) -> None:
    """Make `token_type_ids` of `input_ids`, in place; `take_out_token_types` undoes it.

    Args:
        decoder: a decoder with the input `token_type_ids`; `input_ids` takes its place, with its type and shape.
        image_token: id of the token that stands for a row of image features.

    Raises:
        GuardError: the decoder takes `input_ids` already, or its token types are no integers.
    """
    graph = decoder.graph
    names = [value.name for value in graph.inputs]
    types = graph.inputs[names.index(TOKEN_TYPES)]
    if TOKENS in names or types.dtype is None or types.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        raise GuardError(
            f"the decoder takes {', '.join(map(str, names))}; token types can be made of {TOKENS} only where they are integers "
            f"and {TOKENS} is no input; keep the layout that it has"
        )
    ids = ir.Value(name=TOKENS, type=types.type, shape=types.shape)
    graph.inputs[names.index(TOKEN_TYPES)] = ids
    builder = NodeBuilder(graph, _SCOPE)
    token = builder.constant("image_token", np.array(image_token, types.dtype.numpy()))
    made = builder.op("types", "Cast", [builder.op("is_image", "Equal", [ids, token])], like=types, to=int(types.dtype))
    types.replace_all_uses_with(made)
    made.name = TOKEN_TYPES
    builder.place_before(graph[0])


def take_out_token_types(decoder: ir.Model) -> None:
    """Undo `insert_token_types` in place; nothing happens in a decoder without its nodes.

    Raises:
        GuardIncomplete: the nodes are not as they were inserted.
    """
    graph = decoder.graph
    own = [node for node in graph if (node.name or "").startswith(_OWN)]
    if not own:
        return
    made = next((value for node in own for value in node.outputs if value.name == TOKEN_TYPES), None)
    names = [value.name for value in graph.inputs]
    if made is None or TOKENS not in names or TOKEN_TYPES in names:
        raise GuardIncomplete(f"the nodes that make {TOKEN_TYPES} were changed; package the guarded folder again")
    types = ir.Value(name=TOKEN_TYPES, type=made.type, shape=made.shape)
    graph.inputs[names.index(TOKENS)] = types
    made.replace_all_uses_with(types)
    take_out(graph, own)
    for name in [name for name in graph.initializers if name.startswith(_OWN)]:
        graph.initializers.pop(name)
