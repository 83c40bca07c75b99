"""Runs the embedding graph: token ids to embeddings, with a picture's rows at its image tokens.

There are two kinds of graph. One takes `input_ids` alone, and the app puts the rows in. The other, of onnxruntime-genai's
picture pipelines, takes the rows too; for text it takes none.
"""

from __future__ import annotations

import numpy as np

from ..graphs.errors import GuardError
from .runner_protocol import Port, Runner


def embed(
    graph: Runner, ids: np.ndarray, at: np.ndarray | None = None, features: np.ndarray | None = None
) -> np.ndarray:
    """Embeddings `[batch, sequence, width]`.

    Args:
        graph: the embedding graph.
        ids: token ids `[batch, sequence]`.
        at: positions of the image tokens, `[batch, sequence]` bool; `None` for text.
        features: their rows in reading order, `[image tokens, width]`.

    Raises:
        GuardError: the prompt has another number of image tokens than there are rows.
    """
    tokens, *others = sorted(graph.inputs.values(), key=lambda port: port.dtype.kind not in "iu")
    if at is not None and features is not None and at.sum() != len(features):
        raise GuardError(
            f"the prompt has {at.sum()} image tokens for {len(features)} image features; check image_token"
        )
    feeds = {tokens.name: ids.astype(tokens.dtype)}
    width = next(iter(graph.outputs.values())).shape[-1] or 1
    feeds |= {port.name: _rows(port, features if at is not None else None, width) for port in others}
    embeds = next(iter(graph.run(feeds).values()))
    if at is None or features is None or others:
        return embeds
    embeds = embeds.copy()
    embeds[at] = features.astype(embeds.dtype)
    return embeds


def _rows(port: Port, features: np.ndarray | None, width: int) -> np.ndarray:
    """The rows in the shape that the graph takes; of three axes, the first one counts pictures."""
    rows = features.astype(port.dtype) if features is not None else np.zeros((0, width), port.dtype)
    if len(port.shape) != 3:  # or no shape is declared, and any will do
        return rows
    each = port.shape[-2] or len(rows)
    return rows.reshape(-1 if each else 0, each, rows.shape[-1])
