"""Records transformers' own `generate` on prompts and pictures, call by call: the reference for exports."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .family import Arrays
from .generic import decoder_of
from .image_tokens import image_token_id

# Inputs that mark the image tokens, by the name that a model's forward has for them.
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True)
class Recording:
    """A greedy generation.

    Attributes:
        logits: of every call, the prompt first; `[batch, tokens of the call, vocabulary]`.
        tokens: the token that each call chose, `[batch, 1]` each.
        decoder_inputs: what the decoder was called with by name, tensors and others.
        cache: transformers' cache after the last call.
    """

    logits: tuple[np.ndarray, ...]
    tokens: tuple[np.ndarray, ...]
    decoder_inputs: tuple[Mapping[str, Any], ...]
    cache: Any = field(repr=False)


def record(model: Any, ids: np.ndarray, mask: np.ndarray, given: Arrays, steps: int) -> Recording:
    """Run `generate` for `steps` tokens after the prompt's own, greedily and without an end.

    Args:
        model: in float32.
        ids, mask: of the prompts, padded on the left, `[batch, sequence]` int64.
        given: the image processor's output for their pictures; empty for text.
        steps: number of tokens.
    """
    import torch

    inputs = picture_inputs(model, ids, given)
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        inputs["logits_to_keep"] = 0
    calls: list[Mapping[str, Any]] = []
    logits: list[np.ndarray] = []

    def keep_inputs(_: Any, args: Any, named: Mapping[str, Any]) -> None:
        calls.append({name: value.clone() if torch.is_tensor(value) else None for name, value in named.items()})

    def keep_logits(_: Any, args: Any, output: Any) -> None:
        logits.append(output.logits.numpy())

    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(_endless(model))
        stack.callback(decoder_of(model).register_forward_pre_hook(keep_inputs, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(keep_logits).remove)
        answer = model.generate(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            **inputs,
            max_new_tokens=steps + 1,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            return_dict_in_generate=True,
        )
    tokens = answer.sequences[:, -steps - 1 :].numpy()
    return Recording(
        tuple(logits), tuple(tokens[:, step : step + 1] for step in range(steps)), tuple(calls), answer.past_key_values
    )


def picture_inputs(model: Any, ids: np.ndarray, given: Arrays) -> dict[str, Any]:
    """What transformers' own forward takes for pictures besides `input_ids`, as tensors by name.

    Args:
        model: of transformers.
        ids: of the prompts, `[batch, sequence]` int64.
        given: the image processor's output for their pictures; empty for text.
    """
    import torch

    forward = inspect.signature(type(model).forward).parameters
    inputs: dict[str, Any] = {name: torch.from_numpy(array) for name, array in given.items() if name in forward}
    holders = (model, getattr(model, "model", None))
    for name in TOKEN_TYPES:
        if name in forward or (name == TOKEN_TYPES[0] and given and any(hasattr(h, "get_rope_index") for h in holders)):
            inputs[name] = torch.from_numpy((ids == image_token_id(model.config)).astype(np.int64))
    return inputs


@contextmanager
def _endless(model: Any) -> Iterator[None]:
    """Within, no token ends an answer, and nothing of the checkpoint's own generation settings changes the choice."""
    from transformers.generation.configuration_utils import GenerationConfig

    own = model.generation_config
    pad = own.pad_token_id if isinstance(own.pad_token_id, int) else 0
    model.generation_config = GenerationConfig(
        pad_token_id=pad, eos_token_id=None, bos_token_id=deepcopy(own.bos_token_id)
    )
    try:
        yield
    finally:
        model.generation_config = own
