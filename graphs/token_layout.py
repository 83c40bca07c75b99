"""Numbers of the guard in the layout that TensorRT computes a decoder's layers in: one row per token, `[batch * sequence]`.

TensorRT fuses the guard of a layer into the kernel of the next norm, which runs on such rows. A computed
`[batch, sequence, 1]`, or a `[batch, 1, 1]` of an input, is in another layout. The guard then needs two kernels: one reads the
stream, one edits it. A `Gather` of the only column gives the value in rows; it changes no number (docs/tensorrt.md).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .node_builder import NodeBuilder


def in_rows(builder: NodeBuilder, name: str, value: ir.Value, column: int = 0) -> ir.Value:
    """One column of a value, `[batch, sequence, 1]`.

    Args:
        builder: adds the node.
        name: of the node.
        value: `[batch, sequence, k]`.
        column: which of the `k`.
    """
    return builder.op(name, "Gather", [value, builder.integers(column)], axis=2)


def at_every_token(builder: NodeBuilder, name: str, value: ir.Value, stream: ir.Value, numbers: int) -> ir.Value:
    """Each row's numbers at each of its tokens, `[batch, sequence, numbers]`.

    Args:
        builder: adds the nodes.
        name: of the nodes.
        value: `[batch, ...]`, `numbers` in each row.
        stream: `[batch, sequence, d]`.
        numbers: of each row.
    """
    shape = builder.op(f"{name}_stream_shape", "Shape", [stream])
    # the stream's own number of rows: TensorRT cannot know that an input has as many
    batch = builder.op(f"{name}_batch", "Slice", [shape, builder.integers(0), builder.integers(1)])
    sizes = builder.op(f"{name}_row_sizes", "Concat", [batch, builder.integers(1, numbers)], axis=0)
    of_row = builder.op(f"{name}_of_row", "Reshape", [value, sizes])
    leading = builder.op(f"{name}_leading_sizes", "Slice", [shape, builder.integers(0), builder.integers(2)])
    sizes = builder.op(f"{name}_sizes", "Concat", [leading, builder.integers(numbers)], axis=0)
    return builder.op(f"{name}_of_tokens", "Expand", [of_row, sizes])


def of_one_token(builder: NodeBuilder, value: ir.Value, selected: ir.Value, sizes: tuple[int, ...]) -> ir.Value:
    """The numbers of one token of each row, `[batch, *sizes]`: sums in which every other token is zero, so no number changes.

    A Gather by the token's index would need a kernel more, which computes the index from the whole row.

    Args:
        builder: adds the nodes.
        value: `[batch, sequence or 1, k]` float32, `k` the product of `sizes`.
        selected: `[batch, sequence, 1]` bool, one token in each row.
        sizes: of the result.
    """
    turned = builder.op("turned", "Transpose", [value], perm=[0, 2, 1])
    place = builder.op("place", "Transpose", [selected], perm=[0, 2, 1])
    nothing = builder.constant("nothing", np.array(0), "float32")
    at_token = builder.op("at_last", "Where", [place, turned, nothing])
    # in the result's shape before the sum: a Reshape behind it would be a kernel more
    shaped = builder.op("at_last_shaped", "Reshape", [at_token, builder.integers(0, *sizes, -1)])
    return builder.op("last", "ReduceSum", [shaped, builder.integers(-1)], keepdims=0)
