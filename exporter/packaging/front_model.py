"""The model that clients of this Triton repository call: prompt and picture in, answer out, complete or streamed.

Triton runs it in a separate process per instance ("Python backend"). Every graph is another model of the repository, called by
request ("business logic scripting"). The decode loop is here because its length is known only at its end; the KV cache stays in
this process between tokens. In the modes `supervise` and `combined`, `steps` starts each answer with a text-only pass, which no
request can skip.

To extend the requests, copy this folder to a repository of your own: Triton serves several repositories, and a model may call
models of another. Requires `pip install vlmguard` beside Triton; neither ONNX Runtime nor torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # Triton's own, there in its Python processes only
from PIL import Image

from vlmguard.graphs.errors import GuardError
from vlmguard.runtime.generation import Request, Sampling
from vlmguard.runtime.images.open_picture import open_image
from vlmguard.runtime.triton_runner import open_in_triton

_LARGEST_IMAGE = 20 << 20  # bytes, encoded


class TritonPythonModel:
    """One instance: one answer at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the repository; Triton does not serve the model if this raises."""
        config = json.loads(args["model_config"])
        self.longest = int(config["parameters"]["max_tokens"]["string_value"])
        repository = Path(args["model_repository"]).parent
        try:
            self.vlm = open_in_triton(repository, pb_utils)
        except GuardError as error:
            raise pb_utils.TritonModelException(str(error)) from None

    def execute(self, requests: list[Any]) -> None:
        """Each request gets its responses, the last of them marked as such."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._answer(request, sender)
            except GuardError as error:  # about the request
                self._refuse(sender, pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
            except Exception as error:  # a bug: the client gets a general error, Triton logs the details
                self._refuse(sender, pb_utils.TritonError(f"the model failed ({type(error).__name__})"))
                raise
            finally:
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _refuse(self, sender: Any, error: Any) -> None:
        sender.send(pb_utils.InferenceResponse(output_tensors=[], error=error))

    def _answer(self, request: Any, sender: Any) -> None:
        """The decode loop: a step per token, until the model ends, the limit is reached, or the client is gone."""
        stream = bool(_given(request, "stream", False))
        question = Request(_text(request, "text_input"), _image(request))
        text, tokens = "", []  # not sent yet
        for piece in self.vlm.pieces(question, self._sampling(request)):
            if sender.is_cancelled():
                return
            text += piece.text
            tokens += [token for token in piece.step.tokens if token is not None]
            if piece.finish is not None or (stream and piece.text):
                sender.send(_response(text if stream else text.strip(), tokens, piece.finish or ""))
                text, tokens = "", []

    def _sampling(self, request: Any) -> Sampling:
        wanted = int(_given(request, "max_tokens", min(64, self.longest)))
        if wanted > self.longest:
            raise GuardError(f"max_tokens {wanted} is above this server's limit of {self.longest}; choose less")
        temperature, top_p = float(_given(request, "temperature", 0.0)), float(_given(request, "top_p", 1.0))
        return Sampling(wanted, temperature, top_p, int(_given(request, "seed", 0)))


def _given(request: Any, name: str, otherwise: Any) -> Any:
    """The one value of an input, or what stands for it."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return otherwise if tensor is None else tensor.as_numpy().reshape(-1)[0]


def _text(request: Any, name: str) -> str:
    try:
        return _given(request, name, b"").decode("utf-8")
    except UnicodeDecodeError:
        raise GuardError(f"{name} is no UTF-8; encode the prompt as such") from None


def _image(request: Any) -> Image.Image | None:
    """An encoded picture (PNG, JPEG, ...); the bytes themselves, never a name of a file."""
    content = bytes(_given(request, "image", b""))
    if len(content) > _LARGEST_IMAGE:
        raise GuardError(f"image has {len(content)} bytes, more than {_LARGEST_IMAGE}; scale it down first")
    return open_image(content) if content else None


def _response(text: str, tokens: list[int], reason: str) -> Any:
    tensors = {
        "text_output": np.array([text.encode()], np.object_),
        "token_ids": np.array(tokens, np.int64),
        "finish_reason": np.array([reason.encode()], np.object_),
    }
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(name, array) for name, array in tensors.items()])
