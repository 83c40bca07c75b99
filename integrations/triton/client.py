"""Asking a running Triton server: one graph by its tensors, and the front model as an app does, in a stream."""

from __future__ import annotations

import queue
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient import grpc
from tritonclient.utils import np_to_triton_dtype

_PATIENCE = 120  # seconds, for one answer


@dataclass(frozen=True)
class Piece:
    """One response of the front model."""

    text: str
    tokens: list[int]
    finish_reason: str


def run_model(client: grpc.InferenceServerClient, model: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All outputs of one graph."""
    result = client.infer(model, [_input(name, array) for name, array in feeds.items()])
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def ask(client: grpc.InferenceServerClient, model: str = "vlmguard", **inputs: Any) -> list[Piece]:
    """The answer in pieces; one piece without `stream=True`.

    Args:
        inputs: of the front model by name; text, bytes, or numbers of numpy's types.

    Raises:
        InferenceServerException: the server refused.
    """
    came: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
    client.start_stream(lambda result, error: came.put((result, error)))
    try:
        client.async_stream_infer(model, [_one(*item) for item in inputs.items()], enable_empty_final_response=True)
        pieces: list[Piece] = []
        while True:
            result, error = came.get(timeout=_PATIENCE)
            if error is not None:
                raise error
            response = result.get_response()
            if response.outputs:
                text, reason = (result.as_numpy(name)[0].decode() for name in ("text_output", "finish_reason"))
                pieces.append(Piece(text, result.as_numpy("token_ids").tolist(), reason))
            if response.parameters["triton_final_response"].bool_param:
                return pieces
    finally:
        client.stop_stream()


def _one(name: str, value: Any) -> grpc.InferInput:
    if isinstance(value, str | bytes):
        return _input(name, np.array([value.encode() if isinstance(value, str) else value], np.object_))
    return _input(name, np.array([value]))


def _input(name: str, array: np.ndarray) -> grpc.InferInput:
    given = grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    given.set_data_from_numpy(np.ascontiguousarray(array))
    return given
