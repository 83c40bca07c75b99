"""Tiny Qwen checkpoints in torch: the inputs that transformers' processor gives, greedy answers, the guard as hooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_qwen import IMAGE_TOKEN_ID, MERGE, VOCABULARY
from torch_hooks import HookedGuard
from transformers import Qwen2VLImageProcessorPil

from vlmguard.graphs.directions import Directions
from vlmguard.runtime.generation import Request, Sampling
from vlmguard.runtime.vlm import VisionLanguageModel

ANSWER = Sampling(max_new_tokens=9)


def torch_inputs(checkpoint: Path, vlm: VisionLanguageModel, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
    """What transformers' processor would give: its own image processor, ids of its chat template, padded on the left."""
    pictures = [request.image for request in requests if request.image is not None]
    given: dict[str, torch.Tensor] = {}
    counts = [0] * len(requests)
    if pictures:
        processed = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)(images=pictures, return_tensors="pt")
        given = dict(processed)
        counts = (processed["image_grid_thw"].prod(1) // MERGE**2).tolist()
    rows = [vlm.chat.encode(request.prompt, count) for request, count in zip(requests, counts, strict=True)]
    longest = max(map(len, rows))
    pad = VOCABULARY["<|endoftext|>"]
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    is_image = (ids == IMAGE_TOKEN_ID).int()
    return {"input_ids": ids, "attention_mask": mask, **given, **({"mm_token_type_ids": is_image} if given else {})}


def torch_tokens(model: Any, given: dict[str, torch.Tensor]) -> list[list[int]]:
    """Greedy answers, token ids."""
    with torch.no_grad():
        rows = model.generate(**given, max_new_tokens=ANSWER.max_new_tokens, do_sample=False, use_cache=True)
    return [row[given["input_ids"].shape[1] :] for row in rows.tolist()]


def torch_answers(model: Any, vlm: VisionLanguageModel, given: dict[str, torch.Tensor]) -> list[str]:
    """Greedy answers, text."""
    return [vlm.chat.decode(row).strip() for row in torch_tokens(model, given)]


def hooked_project(directions: Directions) -> HookedGuard:
    """Mode `project` of every token, in the layers of these directions."""
    nothing = np.zeros(0, np.float32)
    numbers = {layer: _Numbers(row.ssd, nothing, nothing, nothing) for layer, row in directions.layers.items()}
    return HookedGuard(numbers, "project", "all")


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """Of a layer, what `project` reads."""

    ssd: np.ndarray
    origin: np.ndarray
    target: np.ndarray
    readout: np.ndarray
    threshold: float = 0.0
    alpha: float = 1.0
    text_shift: float = 0.0
