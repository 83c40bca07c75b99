"""What a proof runs on: prompts, inputs that the user gives by name, or inputs made from the graph's own signature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...graphs.errors import ModelUnreadable
from ...graphs.reference import call_mask
from ...runtime.decoder import DecoderSession, PromptBatch
from ...runtime.vlm import Request, VisionLanguageModel
from .npz import read_npz

_CACHE_AXES = 4  # of a KV cache: batch, heads, past, size


@dataclass(frozen=True)
class ProofInputs:
    """What the proof runs on.

    Attributes:
        batches: prompts, ready for the decoder.
        texts: text-only versions of the same rows (for modes with a supervisor), or the same batches.
        origin: where they come from, for the record.
    """

    batches: tuple[PromptBatch, ...]
    texts: tuple[PromptBatch, ...]
    origin: str

    @property
    def given(self) -> bool:
        """Whether they are inputs by name, one call each, instead of prompts."""
        return any(batch.given is not None for batch in self.batches)


def proof_inputs(model: VisionLanguageModel, requests: Sequence[Request], rows: int = 8) -> ProofInputs:
    """Real prompts as proof inputs, at most `rows` a batch, with padding where the decoder can be padded."""
    groups = [[requests[index] for index in indices] for indices in model.groups(requests, rows)]
    batches = tuple(model.batch(group) for group in groups)
    texts = tuple(model.batch([Request(request.prompt) for request in group]) for group in groups)
    return ProofInputs(batches, texts, f"{len(requests)} real prompts")


def random_inputs(session: DecoderSession, width: int, vocabulary: int, pads: bool, why: str) -> ProofInputs:
    """Seeded random inputs, for a graph that no prompt can be given to; `why` not, for the record."""
    random = np.random.default_rng(0)
    batch, length = 2, 12
    ids = random.integers(0, vocabulary, (batch, length))
    mask = np.ones_like(ids)
    if pads:
        mask[0, :3] = 0
    embeds = random.normal(0, 0.5, (batch, length, width)).astype(np.float32) if session.takes_embeds else None
    one = PromptBatch(ids, mask, embeds)
    return ProofInputs((one,), (one,), f"seeded random inputs ({why})")


def given_inputs(paths: Sequence[Path]) -> ProofInputs:
    """Inputs of the decoder by name, one `.npz` per call, for a graph that wants more than tokens.

    Raises:
        ModelUnreadable: a file is no such thing.
    """
    batches = []
    for path in paths:
        given = read_npz(path)
        text = given.get("inputs_embeds", given.get("input_ids"))
        if text is None or text.ndim < 2:
            raise ModelUnreadable(
                f"{path}: holds no input_ids [batch, sequence] or inputs_embeds, but {', '.join(given) or 'nothing'}; add it"
            )
        ids = np.zeros((len(text), len(text[0])), np.int64)
        batches.append(PromptBatch(ids, _own_mask(given, ids), given=given))
    names = ", ".join(path.name for path in paths)
    return ProofInputs(tuple(batches), tuple(batches), f"given inputs ({names})")


def _own_mask(given: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """The given mask of this call's tokens, `[batch, sequence]`: it may be static, and then zeros stand behind them."""
    mask, length = given.get("attention_mask"), ids.shape[1]
    if mask is None or mask.ndim != ids.ndim:
        return np.ones_like(ids)
    past = mask.shape[1] - length
    grows = any(array.ndim >= _CACHE_AXES and past in array.shape[1:] for array in given.values())
    return (call_mask(mask, length, past if grows else 0) != 0).astype(np.int64)
