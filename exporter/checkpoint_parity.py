"""Do the three graphs together compute what the checkpoint computes? torch answers first, then ONNX Runtime.

Two prompts with an image each go through the whole model, the shorter one padded on the left: prefill, then eight
greedy steps through the cache. Each side carries its own cache; both are fed the tokens torch chose, so that a tie
between two tokens cannot part them. Padding is not compared: it means nothing, and each kernel fills it its own way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..graphs.errors import ExtraMissing, ProofFailed
from ..graphs.static_proof import Check
from .checkpoint_families import DECODER, EMBED_TOKENS, VISION_ENCODER, Family, image_shape

if TYPE_CHECKING:
    import onnxruntime

# Largest difference allowed, as a share of the largest reference value. Sums of thousands of products in another order
# differ by about 1e-6 in fp32 and 1e-3 in fp16.
LIMITS = {"fp32": 1e-4, "fp16": 1e-2}
GREEDY_STEPS = 8

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Prompt:
    """Two prompts with one image each, the first padded on the left."""

    pixel_values: np.ndarray
    input_ids: np.ndarray
    attention_mask: np.ndarray
    image_token: int


@dataclass(frozen=True)
class Answer:
    """What one side computed: features of the images, logits of every step (the prefill first), and the last cache."""

    image_features: np.ndarray
    logits: tuple[np.ndarray, ...]
    cache: Arrays


def sample_prompt(model: Any, image_tokens: int, image_token: int) -> Prompt:
    """Text, image, text; seeded, so that a failure can be seen twice."""
    random = np.random.default_rng(0)
    words = np.delete(np.arange(model.config.get_text_config().vocab_size), image_token)
    long, short = (
        np.concatenate([random.choice(words, before), np.full(image_tokens, image_token), random.choice(words, after)])
        for before, after in ((5, 7), (2, 4))
    )
    padding = len(long) - len(short)
    mask = np.ones((2, len(long)), np.int64)
    mask[0, :padding] = 0
    return Prompt(
        pixel_values=random.standard_normal((2, *image_shape(model))).astype(np.float32),
        input_ids=np.stack([np.concatenate([np.full(padding, words[0]), short]), long]).astype(np.int64),
        attention_mask=mask,
        image_token=image_token,
    )


def positions(attention_mask: np.ndarray, length: int) -> np.ndarray:
    """Position of each of the last `length` tokens within its own prompt, padding not counted."""
    return np.maximum(attention_mask.cumsum(-1) - 1, 0)[:, -length:]


def answer_with_torch(family: Family, model: Any) -> tuple[Prompt, tuple[np.ndarray, ...], Answer]:
    """The reference: transformers' own forward, and the tokens it chose.

    In float32, with the weights as they were exported. Half precision on a CPU rounds after every operation and would
    be a second approximation, not a reference.
    """
    import torch

    model = model.float()
    channels_height_width = image_shape(model)
    with torch.no_grad():
        tokens_per_image = family.image_features(model, torch.zeros(1, *channels_height_width)).shape[1]
        prompt = sample_prompt(model, tokens_per_image, model.config.image_token_id)
        pixel_values = torch.from_numpy(prompt.pixel_values)
        features = torch.stack(tuple(model.get_image_features(pixel_values, return_dict=True).pooler_output))

        ids, mask = prompt.input_ids, prompt.attention_mask
        cache: Any = None  # transformers makes one
        chosen: list[np.ndarray] = []
        logits: list[np.ndarray] = []
        for step in range(GREEDY_STEPS + 1):
            output = model(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                position_ids=torch.from_numpy(positions(mask, ids.shape[1])),
                pixel_values=pixel_values if step == 0 else None,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            logits.append(output.logits.numpy())
            ids = logits[-1][:, -1:].argmax(-1)
            chosen.append(ids)
            mask = _one_more(mask)
    states = {
        f"present.{index}.{kind}": tensor.numpy()
        for index, layer in enumerate(cache.layers)
        for kind, tensor in (("key", layer.keys), ("value", layer.values))
    }
    return prompt, tuple(chosen[:-1]), Answer(features.numpy(), tuple(logits), states)


def answer_with_onnxruntime(
    open_graph: Callable[[str], onnxruntime.InferenceSession], prompt: Prompt, tokens: tuple[np.ndarray, ...]
) -> Answer:
    """The same prompts and tokens through the three graphs, wired together the way an app does it."""
    vision, embed, decoder = (open_graph(part) for part in (VISION_ENCODER, EMBED_TOKENS, DECODER))
    features = _run(vision, {"pixel_values": prompt.pixel_values})["image_features"]
    embeds = _run(embed, {"input_ids": prompt.input_ids})["inputs_embeds"]
    embeds[prompt.input_ids == prompt.image_token] = features.reshape(-1, features.shape[-1])

    mask, states, logits = prompt.attention_mask, empty_cache(decoder, batch=len(embeds)), []
    for token in (None, *tokens):
        if token is not None:
            embeds = _run(embed, {"input_ids": token})["inputs_embeds"]
            mask = _one_more(mask)
        past = {name.replace("present.", "past_key_values."): state for name, state in states.items()}
        given = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions(mask, embeds.shape[1])}
        states = _run(decoder, given | past)
        logits.append(states.pop("logits"))
    return Answer(features, tuple(logits), states)


def empty_cache(decoder: onnxruntime.InferenceSession, batch: int) -> Arrays:
    """A `present` of length 0, in the decoder's own types and shapes."""
    return {
        given.name.replace("past_key_values.", "present."): np.zeros(
            (batch, given.shape[1], 0, given.shape[3]), _NUMPY_TYPES[given.type]
        )
        for given in decoder.get_inputs()
        if given.name.startswith("past_key_values.")
    }


def check_parity(folder: Path, suffix: str, dtype: str, reference: tuple[Prompt, Any, Answer]) -> tuple[Check, ...]:
    """Compare the graphs in `folder` with torch's answer; raises where they differ by more than the limit."""
    runtime = require_onnxruntime()

    def open_graph(part: str) -> onnxruntime.InferenceSession:
        return runtime.InferenceSession(str(folder / f"{part}{suffix}.onnx"), providers=["CPUExecutionProvider"])

    prompt, tokens, expected = reference
    actual = answer_with_onnxruntime(open_graph, prompt, tokens)
    real = prompt.attention_mask.astype(bool)
    ever_real = np.pad(real, ((0, 0), (0, GREEDY_STEPS)), constant_values=True)
    if expected.cache.keys() != actual.cache.keys() or not expected.cache:
        raise ProofFailed(f"caches differ: torch has {sorted(expected.cache)}, the decoder {sorted(actual.cache)}")
    states = [(expected.cache[name], actual.cache[name]) for name in expected.cache]
    limit = LIMITS[dtype]
    return (
        _compare("image features", [(expected.image_features, actual.image_features)], limit),
        _compare("prefill logits", [(expected.logits[0], actual.logits[0])], limit, real),
        _compare("decode logits", list(zip(expected.logits[1:], actual.logits[1:], strict=True)), limit),
        # [batch, heads, tokens, width] -> [batch, tokens, heads, width], so that the mask picks tokens
        _compare("cache", [(e.swapaxes(1, 2), a.swapaxes(1, 2)) for e, a in states], limit, ever_real),
    )


def require_onnxruntime() -> Any:
    """The onnxruntime module, or which extra brings it."""
    try:
        import onnxruntime
    except ImportError as missing:
        raise ExtraMissing(
            "checking a converted checkpoint runs it in onnxruntime, which is not installed: install vlmguard[cpu]"
        ) from missing
    return onnxruntime


def _compare(
    name: str, pairs: list[tuple[np.ndarray, np.ndarray]], limit: float, rows: np.ndarray | None = None
) -> Check:
    """The worst difference over all pairs, of the rows that mean something, as a share of the largest value."""
    compared, worst = 0, 0.0
    for expected, actual in pairs:
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


def _one_more(mask: np.ndarray) -> np.ndarray:
    """The mask with one more real token in every row."""
    return np.pad(mask, ((0, 0), (0, 1)), constant_values=1)


_ADVICE = "try dtype fp32, another opset, or other versions of torch and transformers"
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
