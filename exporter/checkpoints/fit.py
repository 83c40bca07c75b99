"""The generic row for one model: runs it on pictures, and chooses what its graphs compute, take and give (`fit`).

Everything is chosen by what reproduces transformers: `get_image_features` for the vision encoder, `generate` for the decoder.
What nothing reproduces is refused, with the name of the piece, before any graph is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...graphs.errors import ModelUnreadable, first_line
from ...graphs.progress import ProgressCallback, ignore_progress
from ...runtime.images.deepstack import is_features, layer_number
from ..families.encoder_texts import with_texts
from ..families.family import IMAGE_FEATURES, Arrays, Decoder, Family, Shapes, Turn, Vision
from ..families.generic import PER_LAYER, GenericDecoder
from ..families.generic_vision import (
    FIXED,
    feature_holder,
    feature_inputs,
    feature_shapes,
    graph_inputs,
    image_features,
    run_one_picture,
    traced_shapes,
)
from ..families.image_tokens import image_token_id
from ..families.position_rules import Rule, find_rule
from ..families.random_pixels import random_pixels, required_inputs
from ..families.recorded import TOKEN_TYPES, Recording, record, rope_index_inputs
from ..families.sample_pictures import joined, sample_pictures
from .parity_prompts import sample_prompt, turns
from .parts import tensors
from .traced_state import fresh_cache

# Share of the largest value within which two ways to compute the same count as equal; half precision rounds after every
# operation.
_EQUAL = {"float32": 1e-4, "float16": 5e-2}
_STEPS = 2  # tokens of the generation that decides


def fit(
    family: Family,
    model: Any,
    folder: Path,
    texts: tuple[list[int], list[int]],
    report_progress: ProgressCallback = ignore_progress,
) -> Family:
    """The row with what this model's graphs compute, take and give.

    Args:
        family: the generic row.
        model: loaded.
        folder: of the checkpoint.
        texts: token ids of two texts (`prompt_texts`).
        report_progress: called with `(stage, done, total)`.

    Raises:
        ModelUnreadable: a piece that cannot be made to compute what transformers computes.
    """
    where = f"{folder}: {family.model_type}"
    if feature_holder(model) is None:
        raise ModelUnreadable(f"{where} has no get_image_features, so its vision encoder cannot be cut out of it")
    token = image_token_id(model.config)
    if token is None:
        raise ModelUnreadable(f"{where} names no image token; add image_token_id to its config.json")
    model.config.image_token_id = token
    pictures = _pictures(model, folder, report_progress)
    vision, seen = _fit_vision(model, pictures, where)
    try:
        decoder = _fit_decoder(model, vision, seen, texts, where)
    except ModelUnreadable as refusal:
        try:
            vision, seen = _on_token(model, token, vision, seen)
            decoder = _fit_decoder(model, vision, seen, texts, where)
        except (ModelUnreadable, IndexError):  # or the token is beyond the table
            raise refusal from None
    return replace(
        family,
        vision=vision,
        decoder=Decoder(inputs=decoder.inputs, feeds=decoder.feeds, run=decoder.run, embeds=decoder.embeds),
    )


def _fit_vision(model: Any, pictures: Sequence[Arrays], where: str) -> tuple[Vision, list[Arrays]]:
    """The vision encoder, and what it gives for the pictures of the two prompts."""
    import torch

    names = feature_inputs(feature_holder(model))
    pictures = _pair(model, pictures)
    given = joined(pictures[:2])
    singles = [{n: a for n, a in picture.items() if n in names} for picture in pictures]
    fixed = {n: a.tolist() for n, a in singles[0].items() if n in FIXED}

    def run(model: Any, **inputs: Any) -> dict[str, Any]:
        return run_one_picture(model, fixed, **inputs)

    features: list[dict[str, Any]] = []
    with torch.no_grad():
        for single in singles:
            inputs = tensors(model, single)
            features.append(image_features(model, **inputs))
            taken = tensors(model, graph_inputs(model, single))
            _require_same(features[-1], run(model, **taken), model, f"{where}: its vision encoder")
    taken = [graph_inputs(model, single) for single in singles]
    shapes, outputs = traced_shapes(taken), feature_shapes(features)
    vision = Vision(
        inputs=lambda model: shapes,
        outputs=lambda model: outputs,
        run=run,
        around=lambda config: _around(model),
        sample=lambda model, random: given,
        calls=lambda given: singles[:2],
        traced=max(taken, key=lambda single: _shortest(single, shapes)),
        others=tuple(singles[2:]),
        held=False,
    )
    return vision, [{name: rows.float().numpy() for name, rows in given.items()} for given in features[:2]]


def _pair(model: Any, pictures: Sequence[Arrays]) -> Sequence[Arrays]:
    """The pictures, the first two of them such that a batch of both gives what each of them gives alone.

    Emu3's codes of a picture depend on the padding to the size of the largest one in its batch. PerceptionLM takes the tiles
    that fill up a batch for tiles of the picture. Then the first picture is there twice.
    """
    import torch

    names = feature_inputs(feature_holder(model))
    first, second = ({n: a for n, a in picture.items() if n in names} for picture in pictures[:2])
    if all(first[name].shape[1:] == second[name].shape[1:] for name in first):
        return pictures
    with torch.no_grad():
        alone = torch.cat(
            [image_features(model, **tensors(model, single))[IMAGE_FEATURES] for single in (first, second)]
        )
        together = image_features(model, **tensors(model, joined([first, second])))[IMAGE_FEATURES]
    if alone.shape == together.shape and float((alone - together).abs().max()) <= 1e-3 * float(together.abs().max()):
        return pictures
    return [pictures[0], *pictures]


def _around(model: Any) -> tuple[list[int], list[int]]:
    """The tokens before and after a picture where positions depend on them (Qwen's Omni models); else none."""
    taken = rope_index_inputs(model)
    names = ("vision_start_token_id", "vision_end_token_id")
    before, after = (getattr(model.config, name, None) for name in names)
    if not taken or TOKEN_TYPES[0] in taken or not isinstance(before, int):
        return [], []
    return [before], [after] if isinstance(after, int) else []


def _on_token(model: Any, token: int, vision: Vision, seen: list[Arrays]) -> tuple[Vision, list[Arrays]]:
    """The same with the image token's embedding added to every row: Molmo 2 adds features to it, and puts none in its place."""
    import torch

    with torch.no_grad():
        row = model.get_input_embeddings()(torch.tensor([token])).clone()

    def run(model: Any, **inputs: Any) -> dict[str, Any]:
        outputs = dict(vision.run(model, **inputs))
        return {**outputs, IMAGE_FEATURES: outputs[IMAGE_FEATURES] + row}

    rows = row.float().numpy()
    return replace(vision, run=run), [{**given, IMAGE_FEATURES: given[IMAGE_FEATURES] + rows} for given in seen]


def _shortest(single: Arrays, shapes: Shapes) -> int:
    """The shortest axis of those whose length differs between pictures: one of length 1 would be baked by the tracer."""
    lengths = (
        array.shape[axis]
        for name, array in single.items()
        for axis, size in enumerate(shapes[name])
        if isinstance(size, str)
    )
    return min(lengths, default=0)


def _pictures(model: Any, folder: Path, report_progress: ProgressCallback) -> list[Arrays]:
    """Pictures as the checkpoint's image processor prepares them; random pixels where it cannot be run here."""
    import torch

    def run(arrays: Arrays) -> None:
        with torch.no_grad():
            image_features(model, **tensors(model, arrays))

    try:
        pictures = with_texts(model, sample_pictures(folder))
        if absent := required_inputs(model) - pictures[0].keys():
            raise ModelUnreadable(
                f"{folder}: its image processor does not return {', '.join(sorted(absent))}, which its vision encoder takes; "
                "prepare its inputs elsewhere, or use text-only prompts"
            )
        return pictures
    except ModelUnreadable as reason:
        pixels = random_pixels(model, run)
        if pixels is None:
            raise
        report_progress(f"comparing on random pixels: {reason}", 0, 1)
        return pixels


def _fit_decoder(
    model: Any, vision: Vision, seen: Sequence[Arrays], texts: tuple[list[int], list[int]], where: str
) -> GenericDecoder:
    """The first way to run the decoder that gives the logits of transformers' own generation."""
    counts = tuple(len(features[IMAGE_FEATURES]) for features in seen)
    given = vision.sample(model, np.random.default_rng(0))
    prompt = sample_prompt(vision, model.config, texts, given, counts)
    recording = record(model, prompt.input_ids, prompt.attention_mask, given, _STEPS)
    together = {name: np.concatenate([features[name] for features in seen]) for name in seen[0]}
    calls = list(turns(prompt, together, recording.tokens))
    positions = [_array(call.get("position_ids")) for call in recording.decoder_inputs]
    rule = find_rule(model.config, list(zip(calls, positions, strict=True)))
    reasons: list[str] = []
    for decoder in _ways(model, rule, tuple(layer_number(name) for name in together if is_features(name))):
        try:
            difference = _difference(model, decoder, calls, recording)
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError, KeyError) as failure:
            reasons.append(f"fails in transformers ({first_line(failure)})")
            continue
        if difference <= _EQUAL[str(model.dtype).removeprefix("torch.")]:
            return decoder
        reasons.append(f"differs from transformers' generate by {difference:.1e} of the largest logit")
    if rule is None and any(found is not None for found in positions):
        raise ModelUnreadable(
            f"{where}: its decoder's positions follow no known rule (exporter/families/position_rules.py)"
        )
    raise ModelUnreadable(f"{where}: its decoder, run from embeddings, {reasons[0]}")


def _ways(model: Any, rule: Rule | None, deepstack: tuple[int, ...]) -> Iterator[GenericDecoder]:
    forward = inspect.signature(type(model).forward).parameters
    per_layer = PER_LAYER in forward and bool(model.config.get_text_config().hidden_size_per_layer_input)
    if deepstack:
        yield GenericDecoder(rule, inner=True, deepstack=deepstack)
        yield GenericDecoder(rule, deepstack=deepstack)  # whose head scales or caps the logits
    marks = next((name for name in TOKEN_TYPES if name in forward), "")
    for positions in (rule, None) if rule else (None,):
        yield GenericDecoder(positions, per_layer=per_layer)
        if marks:
            yield GenericDecoder(positions, marks, per_layer=per_layer)
        yield GenericDecoder(positions, inner=True, per_layer=per_layer)


def _difference(model: Any, decoder: GenericDecoder, calls: Sequence[Turn], recording: Recording) -> float:
    """Largest difference of the logits over all calls, as a share of the largest logit."""
    import torch

    cache, worst = fresh_cache(model), 0.0
    for turn, expected in zip(calls, recording.logits, strict=True):
        now = slice(-turn.length, None)
        with torch.no_grad():
            embedded = dict(decoder.embeds(model, torch.from_numpy(turn.ids[:, now])))
            if turn.length == turn.ids.shape[1]:
                rows = torch.from_numpy(turn.seen[IMAGE_FEATURES]).to(model.dtype)
                embedded["inputs_embeds"][torch.from_numpy(turn.of_image)] = rows
            outputs = decoder.run(
                model,
                **embedded,
                attention_mask=torch.from_numpy(turn.mask),
                past_key_values=cache,
                **tensors(model, decoder.feeds(model.config, turn)),
            )
        cache = outputs.past_key_values
        actual, real = outputs.logits[:, -expected.shape[1] :].float().numpy(), turn.mask[:, now].astype(bool)
        worst = max(worst, _relative(expected, actual, real[:, -expected.shape[1] :]))
    return worst


def _require_same(expected: dict[str, Any], actual: dict[str, Any], model: Any, piece: str) -> None:
    for name, rows in expected.items():
        if name not in actual or actual[name].shape != rows.shape:
            raise ModelUnreadable(f"{piece} gives other outputs for a picture of its own; it cannot be cut out")
        difference = _relative(rows.float().numpy(), actual[name].float().numpy(), np.ones(len(rows), bool))
        if not difference <= _EQUAL[str(model.dtype).removeprefix("torch.")]:
            raise ModelUnreadable(
                f"{piece}, without loops over pictures, differs from transformers by {difference:.1e}"
            )


def _relative(expected: np.ndarray, actual: np.ndarray, rows: np.ndarray) -> float:
    """Largest difference in these rows as a share of the largest value."""
    expected, actual = expected[rows].astype(np.float64), actual[rows].astype(np.float64)
    return float(np.abs(expected - actual).max() / max(np.abs(expected).max(), 1e-30))


def _array(tensor: Any) -> np.ndarray | None:
    return None if tensor is None else tensor.numpy()
