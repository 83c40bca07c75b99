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
    from transformers.generation.utils import GenerationMixin

    inputs = picture_inputs(model, ids, given)
    mixin: Any = GenerationMixin
    generators = [part for part in model.modules() if isinstance(part, mixin)]
    # BLIP-2 lets its language model generate, and does not run itself
    speakers = generators if type(model).generate is not mixin.generate else [model]
    if any("logits_to_keep" in inspect.signature(type(part).forward).parameters for part in speakers):
        inputs["logits_to_keep"] = 0
    calls: list[Mapping[str, Any]] = []
    logits: dict[Any, list[np.ndarray]] = {part: [] for part in speakers}

    def keep_inputs(_: Any, args: Any, named: Mapping[str, Any]) -> None:
        calls.append({name: value.clone() if torch.is_tensor(value) else None for name, value in named.items()})

    def keep_logits(part: Any, args: Any, output: Any) -> None:
        logits[part].append(output.logits.numpy())

    with torch.no_grad(), ExitStack() as stack:
        for part in speakers:
            stack.enter_context(_endless(part))
            stack.callback(part.register_forward_hook(keep_logits).remove)
        stack.callback(decoder_of(model).register_forward_pre_hook(keep_inputs, with_kwargs=True).remove)
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
        tuple(next(filter(None, logits.values()), [])),
        tuple(tokens[:, step : step + 1] for step in range(steps)),
        tuple(calls),
        answer.past_key_values,
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
    for name in TOKEN_TYPES:
        if name in forward or (given and name in rope_index_inputs(model)):
            inputs[name] = torch.from_numpy((ids == image_token_id(model.config)).astype(np.int64))
    return inputs


def rope_index_inputs(model: Any) -> tuple[str, ...]:
    """Names of what the model's `get_rope_index` takes; none if it has no such function."""
    holders = (model, getattr(model, "model", None))
    functions = (getattr(holder, "get_rope_index", None) for holder in holders)
    return tuple(name for function in functions if function for name in inspect.signature(function).parameters)


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
