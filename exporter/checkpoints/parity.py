"""Do the graphs together compute what the checkpoint computes? torch answers first, then ONNX Runtime.

Two prompts of real text behind BOS, with an image each where the model takes images, go through the whole model, the shorter
one padded on the left: prefill, then eight greedy steps through the cache. Each side carries its own cache; both are fed the
tokens torch chose, so that a tie between two tokens cannot part them. Padding is not compared: it means nothing, and each
kernel fills it its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...graphs.decoder_state import COMMUNITY_PAST, COMMUNITY_PRESENT
from ...graphs.dtypes import ORT_DTYPES
from ...graphs.errors import ExtraMissing, ProofFailed
from ...graphs.extras import install_command
from ...graphs.proof.structure import Check
from ..families.family import Arrays, Family, Turn, Vision
from ..proof.headroom import WAY_OUT
from .float16_range import Peak, recorded_peaks, why_not_float16
from .parts import DECODER, EMBED_TOKENS, TEXT_DECODER, VISION_ENCODER, tensors

if TYPE_CHECKING:
    import onnxruntime

# Largest difference allowed, as a share of the largest reference value. Sums of thousands of products in another order
# differ by about 1e-6 in fp32 and 1e-3 in fp16. With weights in float16 alone, both sides compute in float32.
LIMITS = {"fp32": 1e-4, "fp16": 1e-2, "w16a32": 1e-4}
GREEDY_STEPS = 8


@dataclass(frozen=True)
class Prompt:
    """Two prompts, the first padded on the left.

    Attributes:
        given: what transformers takes for the images, one in each prompt; empty for a text-only model. The vision encoder
            takes those of it that it names.
        input_ids, attention_mask: `[2, sequence]` int64.
        image_token: stands for a row of image features; `None` for a text-only model.
    """

    given: Arrays
    input_ids: np.ndarray
    attention_mask: np.ndarray
    image_token: int | None


@dataclass(frozen=True)
class Answer:
    """What one side computed: rows for the image tokens, logits of every step (the prefill first), and the last cache."""

    image_features: np.ndarray | None
    logits: tuple[np.ndarray, ...]
    cache: Arrays


@dataclass(frozen=True)
class Reference:
    """torch's side.

    Attributes:
        prompt: what both sides are given.
        tokens: `[2, 1]` each, the tokens that torch chose.
        answer: what it computed.
        peaks: the largest state of each decoder layer at the prompt.
    """

    prompt: Prompt
    tokens: tuple[np.ndarray, ...]
    answer: Answer
    peaks: tuple[Peak, ...]


def sample_prompt(
    vision: Vision | None, config: Any, texts: tuple[list[int], list[int]], given: Arrays, image_tokens: tuple[int, ...]
) -> Prompt:
    """The two texts, with an image in the middle of each where the model takes images."""
    before, after = vision.around(config) if vision is not None else ([], [])

    def with_image(text: list[int], count: int) -> list[int]:
        half = len(text) // 2
        return [*text[:half], *before, *[config.image_token_id] * count, *after, *text[half:]]

    rows = [with_image(text, count) for text, count in zip(texts, image_tokens, strict=True)] if vision else texts
    longest = max(map(len, rows))
    ids = np.stack([np.pad(row, (longest - len(row), 0), constant_values=texts[0][-1]) for row in rows])
    mask = np.stack([np.pad(np.ones(len(row), np.int64), (longest - len(row), 0)) for row in rows])
    return Prompt(given, ids.astype(np.int64), mask, config.image_token_id if vision else None)


def turns(prompt: Prompt, seen: Arrays, tokens: tuple[np.ndarray, ...]) -> Iterator[Turn]:
    """The prefill and one call for each of `tokens [batch, 1]`."""
    ids, mask = prompt.input_ids, prompt.attention_mask
    yield Turn(ids, mask, ids.shape[1], prompt.given, seen)
    for token in tokens:
        ids, mask = np.concatenate([ids, token], axis=1), np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        yield Turn(ids, mask, 1, prompt.given, seen)


def answer_with_torch(family: Family, model: Any, texts: tuple[list[int], list[int]]) -> Reference:
    """The reference: transformers' own forward, and the tokens it chose.

    In float32, with the weights as they were exported. Half precision on a CPU rounds after every operation and would
    be a second approximation, not a reference.

    Args:
        texts: token ids of the two prompts' text (`prompt_texts`).
    """
    import torch

    model, config, vision = model.float(), model.config, family.vision
    given = vision.sample(model, np.random.default_rng(0)) if vision is not None else {}
    pictures = tensors(model, given)
    rest = family.decoder.reference or family.decoder.feeds
    peaks: list[Peak] = []
    with torch.no_grad():
        rows: list[Any] = []
        if vision is not None:
            found = model.get_image_features(**pictures, return_dict=True).pooler_output
            rows = [image.flatten(0, -2) for image in found]
        prompt = sample_prompt(vision, config, texts, given, tuple(map(len, rows)))

        cache: Any = None  # transformers makes one
        chosen: list[np.ndarray] = []
        logits: list[np.ndarray] = []
        turn = next(turns(prompt, {}, ()))
        for step in range(GREEDY_STEPS + 1):
            watching = recorded_peaks(model, turn.ids, turn.mask, peaks) if step == 0 else nullcontext()
            with watching:
                output = model(
                    input_ids=torch.from_numpy(turn.ids[:, -turn.length :]),
                    attention_mask=torch.from_numpy(turn.mask),
                    past_key_values=cache,
                    use_cache=True,
                    **tensors(model, rest(config, turn)),
                    **(pictures if step == 0 else {}),
                )
            cache = output.past_key_values
            logits.append(output.logits.numpy())
            chosen.append(logits[-1][:, -1:].argmax(-1))
            *_, turn = turns(prompt, {}, tuple(chosen))
    states = {
        f"{COMMUNITY_PRESENT}.{index}.{kind}": tensor.numpy()
        for index, layer in enumerate(cache.layers)
        for kind, tensor in (("key", layer.keys), ("value", layer.values))
    }
    features = torch.cat(rows).numpy() if rows else None
    return Reference(prompt, tuple(chosen[:-1]), Answer(features, tuple(logits), states), tuple(peaks))


def answer_with_onnxruntime(
    open_graph: Callable[[str], onnxruntime.InferenceSession],
    family: Family,
    config: Any,
    prompt: Prompt,
    tokens: tuple[np.ndarray, ...],
) -> Answer:
    """The same prompts and tokens through the graphs, wired together the way an app does it."""
    rows, seen, embed = None, {}, None
    if family.vision is not None:
        vision = open_graph(VISION_ENCODER)
        seen = _run(vision, {port.name: prompt.given[port.name] for port in vision.get_inputs()})
        rows = family.vision.place(config, prompt.given, seen)
        embed = open_graph(EMBED_TOKENS)
    decoder = open_graph(DECODER if embed is not None else TEXT_DECODER)

    types = {port.name: ORT_DTYPES[port.type] for port in decoder.get_inputs()}
    states, logits = empty_cache(decoder, batch=len(prompt.input_ids)), []
    for turn in turns(prompt, seen, tokens):
        ids = turn.ids[:, -turn.length :]
        text = {"input_ids": ids}
        if embed is not None:
            embeds = _run(embed, {"input_ids": ids})["inputs_embeds"]
            if not logits:
                embeds[prompt.input_ids == prompt.image_token] = rows
            text = {"inputs_embeds": embeds}
        past = {name.replace(COMMUNITY_PRESENT, COMMUNITY_PAST, 1): state for name, state in states.items()}
        given = {**text, "attention_mask": turn.mask, **family.decoder.feeds(config, turn)} | past
        states = _run(decoder, {name: array.astype(types[name], copy=False) for name, array in given.items()})
        logits.append(states.pop("logits"))
    return Answer(rows, tuple(logits), states)


def empty_cache(decoder: onnxruntime.InferenceSession, batch: int) -> Arrays:
    """A `present` of length 0, in the decoder's own types and shapes."""
    return {
        given.name.replace(COMMUNITY_PAST, COMMUNITY_PRESENT, 1): np.zeros(
            (batch, given.shape[1], 0, given.shape[3]), ORT_DTYPES[given.type]
        )
        for given in decoder.get_inputs()
        if given.name.startswith(f"{COMMUNITY_PAST}.")
    }


def check_parity(
    folder: Path, suffix: str, dtype: str, family: Family, config: Any, reference: Reference
) -> tuple[Check, ...]:
    """Compare the graphs in `folder` with torch's answer.

    Raises:
        ProofFailed: they differ by more than the limit, or float16 cannot hold the decoder's states.
    """
    runtime = require_onnxruntime()

    def open_graph(part: str) -> onnxruntime.InferenceSession:
        return runtime.InferenceSession(str(folder / f"{part}{suffix}.onnx"), providers=["CPUExecutionProvider"])

    if dtype == "fp16" and (reason := why_not_float16(reference.peaks)) is not None:
        raise ProofFailed(f"{reason}; {WAY_OUT}")
    prompt, expected = reference.prompt, reference.answer
    actual = answer_with_onnxruntime(open_graph, family, config, prompt, reference.tokens)
    real = prompt.attention_mask.astype(bool)
    ever_real = np.pad(real, ((0, 0), (0, GREEDY_STEPS)), constant_values=True)
    if expected.cache.keys() != actual.cache.keys() or not expected.cache:
        raise ProofFailed(f"caches differ: torch has {sorted(expected.cache)}, the decoder {sorted(actual.cache)}")
    states = [_same_tokens(expected.cache[name], actual.cache[name], ever_real) for name in expected.cache]
    limit, advice = LIMITS[dtype], WAY_OUT if dtype == "fp16" else _ADVICE
    steps = zip(expected.logits[1:], actual.logits[1:], strict=True)
    features = [(expected.image_features, actual.image_features, None)]
    return (
        *([_compare("image features", features, limit, advice)] if expected.image_features is not None else []),
        _compare("prefill logits", [(expected.logits[0], actual.logits[0], real)], limit, advice),
        _compare("decode logits", [(e, a, None) for e, a in steps], limit, advice),
        _compare("cache", states, limit, advice),
    )


def _same_tokens(expected: np.ndarray, actual: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, ...]:
    """Two states of a cache as [batch, tokens, heads, width], and which tokens are no padding.

    torch forgets what a layer with a sliding window can no longer see; the graph keeps all of it.
    """
    kept = expected.shape[2]
    if actual.shape[2] == real.shape[1] > kept:
        actual = actual[:, :, -kept:]
    return expected.swapaxes(1, 2), actual.swapaxes(1, 2), real[:, -kept:]


def require_onnxruntime() -> Any:
    """The onnxruntime module, or which extra brings it."""
    try:
        import onnxruntime
    except ImportError as missing:
        raise ExtraMissing(
            "checking a converted checkpoint runs it in onnxruntime, which is not installed; "
            f"run: {install_command('cpu')}"
        ) from missing
    return onnxruntime


def _compare(name: str, pairs: Iterable[tuple[Any, ...]], limit: float, advice: str) -> Check:
    """The worst difference over all pairs, of the rows that mean something, as a share of the largest value."""
    compared, worst = 0, 0.0
    for expected, actual, rows in pairs:
        if expected.shape != actual.shape:
            raise ProofFailed(f"{name}: torch gives shape {expected.shape}, the exported graph {actual.shape}")
        if not np.isfinite(actual).all():
            raise ProofFailed(f"{name}: the exported graph gives values that are not finite; {advice}")
        if rows is not None:
            expected, actual = expected[rows], actual[rows]
        compared += expected.size
        difference = np.abs(expected.astype(np.float64) - actual.astype(np.float64)).max()
        worst = max(worst, float(difference / np.abs(expected).max()))
    if not compared:
        raise ProofFailed(f"{name}: nothing was compared")
    if not worst <= limit:
        raise ProofFailed(
            f"{name}: the exported graph differs from torch by {worst:.1e} of the largest value, allowed {limit:.0e} "
            f"({compared:,} values compared); {advice}"
        )
    return Check(name, compared, worst, limit, ok=True)


def _run(session: onnxruntime.InferenceSession, inputs: Arrays) -> Arrays:
    """All outputs of a graph by name."""
    names = [output.name for output in session.get_outputs()]
    return {name: np.asarray(output) for name, output in zip(names, session.run(names, inputs), strict=True)}


_ADVICE = "try another opset, or other versions of torch and transformers"
