"""Do the three graphs together compute what the checkpoint computes? torch answers first, then ONNX Runtime.

Two prompts with an image each go through the whole model, the shorter one padded on the left: prefill, then eight
greedy steps through the cache. Each side carries its own cache; both are fed the tokens torch chose, so that a tie
between two tokens cannot part them. Padding is not compared: it means nothing, and each kernel fills it its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...graphs.decoder_state import COMMUNITY_PAST, COMMUNITY_PRESENT
from ...graphs.errors import ExtraMissing, ProofFailed
from ...graphs.extras import install_command
from ...graphs.static_proof import Check
from ..families.family import Arrays, Family, Turn
from .parts import DECODER, EMBED_TOKENS, VISION_ENCODER, tensors

if TYPE_CHECKING:
    import onnxruntime

# Largest difference allowed, as a share of the largest reference value. Sums of thousands of products in another order
# differ by about 1e-6 in fp32 and 1e-3 in fp16.
LIMITS = {"fp32": 1e-4, "fp16": 1e-2}
GREEDY_STEPS = 8


@dataclass(frozen=True)
class Prompt:
    """Two prompts with one image each, the first padded on the left.

    `given` is what transformers takes for the images; the vision encoder takes those of it that it names.
    """

    given: Arrays
    input_ids: np.ndarray
    attention_mask: np.ndarray
    image_token: int


@dataclass(frozen=True)
class Answer:
    """What one side computed: rows for the image tokens, logits of every step (the prefill first), and the last cache."""

    image_features: np.ndarray
    logits: tuple[np.ndarray, ...]
    cache: Arrays


def sample_prompt(family: Family, config: Any, given: Arrays, image_tokens: tuple[int, int]) -> Prompt:
    """Text, image, text; seeded, so that a failure can be seen twice."""
    random = np.random.default_rng(0)
    # Tokens with a meaning (image, video, start of an image, ...) would be read as what they mean.
    meant = [number for name, number in _flat(config.to_dict()) if name.endswith(("_token_id", "_token_index"))]
    vocabulary = np.arange(config.get_text_config().vocab_size)
    words = vocabulary[~np.isin(vocabulary, meant)]
    before, after = family.vision.around(config)

    def prompt(first: int, last: int, count: int) -> np.ndarray:
        image = [*before, *[config.image_token_id] * count, *after]
        return np.concatenate([random.choice(words, first), image, random.choice(words, last)]).astype(np.int64)

    rows = prompt(2, 4, image_tokens[0]), prompt(5, 7, image_tokens[1])
    longest = max(map(len, rows))
    ids = np.stack([np.pad(row, (longest - len(row), 0), constant_values=words[0]) for row in rows])
    mask = np.stack([np.pad(np.ones_like(row), (longest - len(row), 0)) for row in rows])
    return Prompt(given, ids, mask, config.image_token_id)


def turns(prompt: Prompt, seen: Arrays, tokens: tuple[np.ndarray, ...]) -> Iterator[Turn]:
    """The prefill and one call for each of `tokens [batch, 1]`."""
    ids, mask = prompt.input_ids, prompt.attention_mask
    yield Turn(ids, mask, ids.shape[1], prompt.given, seen)
    for token in tokens:
        ids, mask = np.concatenate([ids, token], axis=1), np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        yield Turn(ids, mask, 1, prompt.given, seen)


def answer_with_torch(family: Family, model: Any) -> tuple[Prompt, tuple[np.ndarray, ...], Answer]:
    """The reference: transformers' own forward, and the tokens it chose.

    In float32, with the weights as they were exported. Half precision on a CPU rounds after every operation and would
    be a second approximation, not a reference.
    """
    import torch

    model, config = model.float(), model.config
    given = family.vision.sample(model, np.random.default_rng(0))
    pictures = tensors(model, given)
    rest = family.decoder.reference or family.decoder.feeds
    with torch.no_grad():
        found = model.get_image_features(**pictures, return_dict=True).pooler_output
        first, second = (image.flatten(0, -2) for image in found)
        prompt = sample_prompt(family, config, given, (len(first), len(second)))

        cache: Any = None  # transformers makes one
        chosen: list[np.ndarray] = []
        logits: list[np.ndarray] = []
        turn = next(turns(prompt, {}, ()))
        for step in range(GREEDY_STEPS + 1):
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
    return prompt, tuple(chosen[:-1]), Answer(torch.cat([first, second]).numpy(), tuple(logits), states)


def answer_with_onnxruntime(
    open_graph: Callable[[str], onnxruntime.InferenceSession],
    family: Family,
    config: Any,
    prompt: Prompt,
    tokens: tuple[np.ndarray, ...],
) -> Answer:
    """The same prompts and tokens through the three graphs, wired together the way an app does it."""
    vision, embed, decoder = (open_graph(part) for part in (VISION_ENCODER, EMBED_TOKENS, DECODER))
    seen = _run(vision, {port.name: prompt.given[port.name] for port in vision.get_inputs()})
    rows = family.vision.place(config, prompt.given, seen)

    types = {port.name: _NUMPY_TYPES[port.type] for port in decoder.get_inputs()}
    states, logits = empty_cache(decoder, batch=len(prompt.input_ids)), []
    for turn in turns(prompt, seen, tokens):
        embeds = _run(embed, {"input_ids": turn.ids[:, -turn.length :]})["inputs_embeds"]
        if not logits:
            embeds[prompt.input_ids == prompt.image_token] = rows
        past = {name.replace(COMMUNITY_PRESENT, COMMUNITY_PAST, 1): state for name, state in states.items()}
        given = {"inputs_embeds": embeds, "attention_mask": turn.mask, **family.decoder.feeds(config, turn)} | past
        states = _run(decoder, {name: array.astype(types[name], copy=False) for name, array in given.items()})
        logits.append(states.pop("logits"))
    return Answer(rows, tuple(logits), states)


def empty_cache(decoder: onnxruntime.InferenceSession, batch: int) -> Arrays:
    """A `present` of length 0, in the decoder's own types and shapes."""
    return {
        given.name.replace(COMMUNITY_PAST, COMMUNITY_PRESENT, 1): np.zeros(
            (batch, given.shape[1], 0, given.shape[3]), _NUMPY_TYPES[given.type]
        )
        for given in decoder.get_inputs()
        if given.name.startswith(f"{COMMUNITY_PAST}.")
    }


def check_parity(
    folder: Path, suffix: str, dtype: str, family: Family, config: Any, reference: tuple[Prompt, Any, Answer]
) -> tuple[Check, ...]:
    """Compare the graphs in `folder` with torch's answer; raises where they differ by more than the limit."""
    runtime = require_onnxruntime()

    def open_graph(part: str) -> onnxruntime.InferenceSession:
        return runtime.InferenceSession(str(folder / f"{part}{suffix}.onnx"), providers=["CPUExecutionProvider"])

    prompt, tokens, expected = reference
    actual = answer_with_onnxruntime(open_graph, family, config, prompt, tokens)
    real = prompt.attention_mask.astype(bool)
    ever_real = np.pad(real, ((0, 0), (0, GREEDY_STEPS)), constant_values=True)
    if expected.cache.keys() != actual.cache.keys() or not expected.cache:
        raise ProofFailed(f"caches differ: torch has {sorted(expected.cache)}, the decoder {sorted(actual.cache)}")
    states = [_same_tokens(expected.cache[name], actual.cache[name], ever_real) for name in expected.cache]
    limit = LIMITS[dtype]
    steps = zip(expected.logits[1:], actual.logits[1:], strict=True)
    return (
        _compare("image features", [(expected.image_features, actual.image_features, None)], limit),
        _compare("prefill logits", [(expected.logits[0], actual.logits[0], real)], limit),
        _compare("decode logits", [(e, a, None) for e, a in steps], limit),
        _compare("cache", states, limit),
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


def _compare(name: str, pairs: Iterable[tuple[Any, ...]], limit: float) -> Check:
    """The worst difference over all pairs, of the rows that mean something, as a share of the largest value."""
    compared, worst = 0, 0.0
    for expected, actual, rows in pairs:
        if expected.shape != actual.shape:
            raise ProofFailed(f"{name}: torch gives shape {expected.shape}, the exported graph {actual.shape}")
        if not np.isfinite(actual).all():
            raise ProofFailed(f"{name}: the exported graph gives values that are not finite; {_ADVICE}")
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
            f"({compared:,} values compared); {_ADVICE}"
        )
    return Check(name, compared, worst, limit, ok=True)


def _run(session: onnxruntime.InferenceSession, inputs: Arrays) -> Arrays:
    """All outputs of a graph by name."""
    names = [output.name for output in session.get_outputs()]
    return {name: np.asarray(output) for name, output in zip(names, session.run(names, inputs), strict=True)}


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every entry of a config that is no table itself."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        elif isinstance(value, int):
            yield name, value


_ADVICE = "try dtype fp32, another opset, or other versions of torch and transformers"
_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
