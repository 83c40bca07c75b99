"""Do the graphs together compute what the checkpoint computes? torch answers first, then ONNX Runtime.

Two prompts of real text behind BOS, with an image each where the model takes images, go through the whole model, the shorter
one padded on the left: prefill, then eight greedy steps through the cache. Each side carries its own cache; both are fed the
tokens torch chose, so that a tie between two tokens cannot part them. Padding is not compared: it means nothing, and each
kernel fills it its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...graphs.dtypes import ORT_DTYPES
from ...graphs.errors import ExtraMissing, ProofFailed
from ...graphs.extras import install_command
from ...graphs.graph_io import in_memory, load_graph
from ...graphs.proof.structure import Check
from ..families.family import BATCH, IMAGE_FEATURES, PAST, Arrays, Family, Vision
from ..families.generic_vision import image_features
from ..families.recorded import record
from ..proof.headroom import WAY_OUT
from .float16_range import Peak, recorded_peaks, why_not_float16
from .parity_prompts import Prompt, sample_prompt, turns
from .parts import DECODER, EMBED_TOKENS, TEXT_DECODER, VISION_ENCODER, tensors
from .traced_state import is_past, leaves, names_of, present_of

if TYPE_CHECKING:
    import onnxruntime

# Largest difference allowed, as a share of the largest reference value. Sums of thousands of products in another order
# differ by about 1e-6 in fp32 and 1e-3 in fp16. With weights in float16 alone, both sides compute in float32.
LIMITS = {"fp32": 1e-4, "fp16": 1e-2, "w16a32": 1e-4}
GREEDY_STEPS = 8


@dataclass(frozen=True)
class Answer:
    """Results of one side.

    Attributes:
        image_features: rows for the image tokens.
        logits: of every step, the prefill first.
        cache: the last state, by the names of the decoder's outputs.
        growing: of the state, the axes that tokens are on; others have a fixed size. Only the graph declares them.
    """

    image_features: np.ndarray | None
    logits: tuple[np.ndarray, ...]
    cache: Arrays
    growing: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """torch's side.

    Attributes:
        prompt: what both sides are given.
        tokens: `[2, 1]` each, the tokens that torch chose.
        answer: what it computed.
        peaks: the largest state of each decoder layer at the prompt.
        others: what the vision encoder gives for the row's other pictures.
    """

    prompt: Prompt
    tokens: tuple[np.ndarray, ...]
    answer: Answer
    peaks: tuple[Peak, ...]
    others: tuple[Arrays, ...] = ()


def answer_with_torch(
    family: Family, model: Any, texts: tuple[list[int], list[int]], measure_peaks: bool = True
) -> Reference:
    """The reference: transformers' own forward, and the tokens it chose.

    In float32, with the weights as they were exported. Half precision on a CPU rounds after every operation and would
    be a second approximation, not a reference.

    Args:
        family: the row of the checkpoint.
        model: the transformers model.
        texts: token ids of the two prompts' text (`prompt_texts`).
        measure_peaks: whether to measure the largest state of each decoder layer, which float16 may not hold.
    """
    import torch

    model, config, vision = model.float(), model.config, family.vision
    vision_inputs = vision.sample(model, np.random.default_rng(0)) if vision is not None else {}
    pictures = tensors(model, vision_inputs)
    rest = family.decoder.reference or family.decoder.feeds
    peaks: list[Peak] = []
    with torch.no_grad():
        rows: list[Any] = []
        if vision is not None and family.generic:
            rows = [_features(vision, model, call)[IMAGE_FEATURES] for call in vision.calls(vision_inputs)]
        elif vision is not None:
            found = model.get_image_features(**pictures, return_dict=True).pooler_output
            rows = [image.flatten(0, -2) for image in found]
        prompt = sample_prompt(vision, config, texts, vision_inputs, tuple(map(len, rows)))
        features = torch.cat(rows).numpy() if rows else None
        if family.generic:
            with (
                recorded_peaks(model, prompt.input_ids, prompt.attention_mask, peaks)
                if measure_peaks
                else nullcontext()
            ):
                recording = record(model, prompt.input_ids, prompt.attention_mask, vision_inputs, GREEDY_STEPS)
            answer = Answer(features, recording.logits, _states(recording.cache))
            return Reference(prompt, recording.tokens, answer, tuple(peaks), _others(model, vision))

        cache: Any = None  # transformers makes one
        chosen: list[np.ndarray] = []
        logits: list[np.ndarray] = []
        turn = next(turns(prompt, {}, ()))
        for step in range(GREEDY_STEPS + 1):
            watching = (
                recorded_peaks(model, turn.ids, turn.mask, peaks) if step == 0 and measure_peaks else nullcontext()
            )
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
    return Reference(prompt, tuple(chosen[:-1]), Answer(features, tuple(logits), _states(cache)), tuple(peaks))


def _states(cache: Any) -> Arrays:
    """The tensors of a cache, by the names that the graph's outputs have."""
    return {present_of(names_of(leaf)[0]): tensor.numpy() for leaf, tensor in leaves(cache).items()}


def _others(model: Any, vision: Vision | None) -> tuple[Arrays, ...]:
    """torch's results for further pictures, by name."""
    if vision is None:
        return ()
    return tuple({n: t.numpy() for n, t in _features(vision, model, p).items()} for p in vision.others)


def _features(vision: Vision, model: Any, picture: Arrays) -> Mapping[str, Any]:
    """What transformers computes for one picture."""
    return (vision.reference or image_features)(model, **tensors(model, picture))


def answer_with_onnxruntime(
    open_graph: Callable[[str], onnxruntime.InferenceSession],
    family: Family,
    config: Any,
    prompt: Prompt,
    tokens: tuple[np.ndarray, ...],
) -> Answer:
    """Run the same prompts and tokens through the graphs, connected as in an app.

    Args:
        open_graph: opens a part by name.
        family: the row of the checkpoint.
        config: transformers' config of the model.
        prompt: the prompts.
        tokens: torch's tokens of each decode step.
    """
    rows, seen, embed = None, {}, None
    if family.vision is not None:
        vision = open_graph(VISION_ENCODER)
        takes = [port.name for port in vision.get_inputs()]
        calls = [_run(vision, {name: call[name] for name in takes}) for call in family.vision.calls(prompt.given)]
        seen = {name: np.concatenate([call[name] for call in calls]) for name in calls[0]}
        rows = family.vision.place(config, prompt.given, seen)
        embed = open_graph(EMBED_TOKENS)
    decoder = open_graph(DECODER if embed is not None else TEXT_DECODER)

    types = {port.name: ORT_DTYPES[port.type] for port in decoder.get_inputs()}
    states, logits = empty_cache(decoder, batch=len(prompt.input_ids)), []
    for turn in turns(prompt, seen, tokens):
        ids = turn.ids[:, -turn.length :]
        text = {"input_ids": ids}
        if embed is not None:
            text = _run(embed, {"input_ids": ids})
            if not logits:
                text["inputs_embeds"][prompt.input_ids == prompt.image_token] = rows
        past = {name: states[present_of(name)] for name in types if is_past(name)}
        feeds = {**text, "attention_mask": turn.mask, **family.decoder.feeds(config, turn)} | past
        states = _run(decoder, {name: feeds[name].astype(kind, copy=False) for name, kind in types.items()})
        logits.append(states.pop("logits"))
    growing = {
        present_of(port.name): list(port.shape).index(PAST)
        for port in decoder.get_inputs()
        if is_past(port.name) and PAST in port.shape
    }
    return Answer(rows, tuple(logits), states, growing)


def empty_cache(decoder: onnxruntime.InferenceSession, batch: int) -> Arrays:
    """State before the first token, by the outputs' names, in the decoder's own types and shapes."""
    sizes: dict[str | int, int] = {BATCH: batch, PAST: 0}
    return {
        present_of(port.name): np.zeros([int(sizes.get(size, size) or 0) for size in port.shape], ORT_DTYPES[port.type])
        for port in decoder.get_inputs()
        if is_past(port.name)
    }


def check_parity(
    folder: Path, suffix: str, dtype: str, family: Family, config: Any, reference: Reference
) -> tuple[Check, ...]:
    """Compare the graphs in `folder` with torch's answer.

    Args:
        folder: the graphs.
        suffix: of their file names.
        dtype: their precision.
        family: the row of the checkpoint.
        config: transformers' config of the model.
        reference: torch's answer.

    Raises:
        ProofFailed: they differ by more than the limit, or float16 cannot hold the decoder's states.
    """
    runtime = require_onnxruntime()

    def open_graph(part: str) -> onnxruntime.InferenceSession:
        path = (folder / f"{part}{suffix}.onnx").absolute()
        # Weights are mapped from the file, and not laid out a second time: either takes as much memory as the weights.
        content, home = in_memory(load_graph(path), path.parent)
        options = runtime.SessionOptions()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(home))
        options.add_session_config_entry("session.disable_prepacking", "1")
        return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    if dtype == "fp16" and (reason := why_not_float16(reference.peaks)) is not None:
        raise ProofFailed(f"{reason}; {WAY_OUT}")
    prompt, expected = reference.prompt, reference.answer
    actual = answer_with_onnxruntime(open_graph, family, config, prompt, reference.tokens)
    real = prompt.attention_mask.astype(bool)
    ever_real = np.pad(real, ((0, 0), (0, GREEDY_STEPS)), constant_values=True)
    if expected.cache.keys() != actual.cache.keys() or not expected.cache:
        raise ProofFailed(f"caches differ: torch has {sorted(expected.cache)}, the decoder {sorted(actual.cache)}")
    states = [
        _same_tokens(expected.cache[name], actual.cache[name], actual.growing.get(name), ever_real)
        for name in expected.cache
    ]
    limit, advice = LIMITS[dtype], WAY_OUT if dtype == "fp16" else _ADVICE
    steps = zip(expected.logits[1:], actual.logits[1:], strict=True)
    features = [(expected.image_features, actual.image_features, None)]
    if family.vision is not None and reference.others:
        vision = open_graph(VISION_ENCODER)
        for picture, rows in zip(family.vision.others, reference.others, strict=True):
            outputs = _run(vision, {port.name: picture[port.name] for port in vision.get_inputs()})
            features += [(rows[name], outputs[name], None) for name in rows]
    return (
        *([_compare("image features", features, limit, advice)] if expected.image_features is not None else []),
        _compare("prefill logits", [(expected.logits[0], actual.logits[0], real)], limit, advice),
        _compare("decode logits", [(e, a, None) for e, a in steps], limit, advice),
        _compare("cache", states, limit, advice),
    )


def _same_tokens(
    expected: np.ndarray, actual: np.ndarray, axis: int | None, real: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Two states with their tokens, which are on `axis`, on the second one; and which tokens are no padding.

    A state of fixed size (no axis) is returned as it is.
    torch forgets what a layer with a sliding window can no longer see; the graph keeps all of it.
    """
    if axis is None:
        return expected, actual, None
    kept = expected.shape[axis]
    if kept < real.shape[1]:
        actual = actual.take(range(real.shape[1] - kept, real.shape[1]), axis)
    return np.moveaxis(expected, axis, 1), np.moveaxis(actual, axis, 1), real[:, -kept:]


def require_onnxruntime() -> Any:
    """The onnxruntime module; the error names the extra that installs it."""
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
        if not expected.size:  # a state of no width, as of layers without positions
            continue
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
