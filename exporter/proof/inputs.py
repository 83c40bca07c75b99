"""Inputs of the proof: prompts, the user's inputs by name, or inputs made from the graph's signature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...graphs.errors import GuardError, ModelUnreadable
from ...graphs.package import ModelPackage
from ...graphs.reference import call_mask
from ...graphs.roles import EMBEDS, MASK, TOKENS, InputRoles
from ...runtime.decoder import DecoderSession, open_decoder
from ...runtime.decoder_inputs import PromptBatch, can_pad
from ...runtime.generation import Request
from ...runtime.paired_batches import interleaved
from ...runtime.vlm import VisionLanguageModel
from .npz import read_npz
from .signature import made_batches

_CACHE_AXES = 4  # of a KV cache: batch, heads, past, size


@dataclass(frozen=True)
class ProofInputs:
    """Inputs of the proof.

    Attributes:
        batches: batches for the decoder.
        texts: text-only versions of the same rows (for modes with a supervisor), or the same batches.
        origin: their source, for the record.
    """

    batches: tuple[PromptBatch, ...]
    texts: tuple[PromptBatch, ...]
    origin: str

    @property
    def given(self) -> bool:
        """Whether some were given or made by name, so that the graph may take others than a prompt fills."""
        return any(batch.given is not None or batch.further is not None for batch in self.batches)


def proof_inputs(model: VisionLanguageModel, requests: Sequence[Request], rows: int = 8) -> ProofInputs:
    """Real prompts as proof inputs, at most `rows` a batch, with padding where the decoder can be padded."""
    groups = [[requests[index] for index in indices] for indices in model.groups(requests, rows)]
    batches = tuple(model.batch(group) for group in groups)
    texts = tuple(model.batch([Request(request.prompt) for request in group]) for group in groups)
    return ProofInputs(batches, texts, f"{len(requests)} real prompts")


def paired_inputs(inputs: ProofInputs, pads: bool) -> ProofInputs:
    """Batches of paired rows: the text of another prompt in front of each prompt, so that every pair has something to copy.

    Batches without texts of their own (given or made from the signature) are taken as they are: their rows are the pairs.

    Args:
        pads: whether the decoder takes padding on the left; else the shorter row of a pair is padded on the right.

    Raises:
        GuardError: no batch has two rows.
    """
    batches = []
    for number, batch in enumerate(inputs.batches):
        texts = inputs.texts[(number + 1) % len(inputs.texts)]
        if batch is inputs.texts[number]:
            batches.append(batch)
        else:
            batches.append(interleaved(_some_rows(texts, np.arange(1, batch.size + 1) % texts.size), batch, left=pads))
    if all(batch.size < 2 for batch in batches):
        raise GuardError("paired rows are proved on batches of two rows and more; give such inputs with --proof-inputs")
    return ProofInputs(tuple(batches), tuple(batches), f"{inputs.origin}, in pairs")


def _some_rows(batch: PromptBatch, rows: np.ndarray) -> PromptBatch:
    """The given rows of a text-only batch."""
    embeds = None if batch.embeds is None else batch.embeds[rows]
    return PromptBatch(batch.ids[rows], batch.mask[rows], embeds)


def random_inputs(session: DecoderSession, width: int, vocabulary: int, pads: bool, why: str) -> ProofInputs:
    """Seeded random inputs, for a graph that cannot run prompts.

    Args:
        session: the decoder.
        width: of its embeddings.
        vocabulary: number of tokens.
        pads: whether rows may have padding.
        why: the reason, for the record.
    """
    random = np.random.default_rng(0)
    batch, length = 2, 12
    ids = random.integers(0, vocabulary, (batch, length))
    mask = np.ones_like(ids)
    if pads:
        mask[0, :3] = 0
    embeds = random.normal(0, 0.5, (batch, length, width)).astype(np.float32) if session.takes_embeds else None
    one = PromptBatch(ids, mask, embeds)
    return ProofInputs((one,), (one,), f"seeded random inputs ({why})")


def signature_inputs(package: ModelPackage, width: int, why: str) -> ProofInputs:
    """Seeded inputs of the sizes that the graph takes; `why` not prompts, for the record.

    Raises:
        InputsUnknown: the graph runs on none that could be made; names the input.
    """
    session = open_decoder(package, given=True)
    graph = package.load_decoder().graph
    batches = tuple(made_batches(session, package, width, _vocabulary(session, package), can_pad(graph)))
    kinds = f", {len(batches)} kinds of values" if len(batches) > 1 else ""
    once = "" if session.can_step else "; the graph takes one call alone"
    return ProofInputs(batches, batches, f"seeded random inputs{kinds} ({why}{once})")


def _vocabulary(session: DecoderSession, package: ModelPackage) -> int:
    """Size of the vocabulary, from the shape of the logits or the config."""
    size = session.runner.outputs[session.logits_output].shape[-1]
    config = package.config
    return size or config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 100


def given_inputs(paths: Sequence[Path], roles: InputRoles | None = None) -> ProofInputs:
    """The user's decoder inputs, one `.npz` per call, for a graph that takes more than tokens.

    Args:
        paths: the files, with arrays by input name.
        roles: of the graph's inputs.

    Raises:
        ModelUnreadable: a file is invalid, or lacks tokens.
    """
    texts = [roles.text] if roles is not None and roles.text not in ("", TOKENS, EMBEDS) else [EMBEDS, TOKENS]
    masked = roles.mask if roles is not None and roles.mask else MASK
    batches = []
    for path in paths:
        given = read_npz(path)
        text = next((given[name] for name in texts if name in given), None)
        if text is None or text.ndim < 2:
            wanted = f"{texts[0]} [batch, sequence]" if len(texts) == 1 else f"{TOKENS} [batch, sequence] or {EMBEDS}"
            raise ModelUnreadable(f"{path}: has no {wanted}, but {', '.join(given) or 'nothing'}; add it")
        ids = np.zeros((len(text), len(text[0])), np.int64)
        batches.append(PromptBatch(ids, _own_mask(given, ids, masked), given=given))
    names = ", ".join(path.name for path in paths)
    return ProofInputs(tuple(batches), tuple(batches), f"given inputs ({names})")


def _own_mask(given: Mapping[str, np.ndarray], ids: np.ndarray, masked: str) -> np.ndarray:
    """The given mask of this call's tokens, `[batch, sequence]`: it may be static, and then zeros stand behind them."""
    mask, length = given.get(masked), ids.shape[1]
    if mask is None or mask.ndim != ids.ndim:
        return np.ones_like(ids)
    past = mask.shape[1] - length
    grows = any(array.ndim >= _CACHE_AXES and past in array.shape[1:] for array in given.values())
    return (call_mask(mask, length, past if grows else 0) != 0).astype(np.int64)
