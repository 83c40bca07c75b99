"""Measures the effect of a guard: the unguarded and the guarded model run the same harmful prompts.

A guard has an **effect** on a prompt if the guarded model differs from the unguarded one in one of these:

- the log-probabilities of the answer's first token: their largest difference, relative to their largest magnitude, is above the
  proof's tolerance for the dtype of the residual stream (float32: 1e-4);
- the greedy answer, token by token, up to the given length.

A guard has **no effect** if it has an effect on no harmful prompt in any setting that counts. All settings count except `text`
in the modes `supervise` and `align`, which change nothing there by design at strength 1. Refusals are not part of the
definition: a model that already refuses everything can be changed, and `project` and `steer` may change answers without
changing refusals. `refusal_regression` checks that refusals do not decrease.

The prompts are the model's own, else a sample of the built-in held-out anchors. One decoder session is open at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...graphs.anatomy import DecoderAnatomy
from ...graphs.errors import NoEffect
from ...graphs.modes import guard_mode
from ...graphs.package import ModelPackage
from ...graphs.plan import GuardPlan
from ...graphs.progress import ProgressCallback
from ...graphs.separation import Separation, separation_along
from ...runtime.decoder_place import DecoderPlace
from ...runtime.generation import Request
from ...runtime.refusals import refused
from ...runtime.vlm import VisionLanguageModel
from ..evaluation.logprobs import Said, ask
from ..evaluation.metrics import Tally, count
from ..extraction.extract import collect_states, tapped_graph
from ..prompts.labelled import BUILTIN, AnchorPair, LabelledPrompt, prompts_from_anchors, read_anchors
from ..prompts.thinning import spread, thinned
from .refusal_regression import Refusals, compare_refusals, some_harmful

BUILTIN_TOKENS = 8  # of each answer to a built-in prompt: enough to start a refusal
_FEWEST_PAIRS = 4  # pairs whose halves have different tokens
_MOST_TEXTS = 40  # of each label, for the AUC
_BATCH = 16


@dataclass(frozen=True)
class Sample:
    """The prompts of the measurement.

    Attributes:
        prompts: harmful prompts in every setting of the model; both models answer them.
        harmful, harmless: texts for the AUC of the directions; either may be empty.
        source: their source, for messages and the record.
        tokens: longest answer.
    """

    prompts: tuple[LabelledPrompt, ...]
    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    source: str
    tokens: int


@dataclass(frozen=True)
class Behaviour:
    """Results of one model: its refusals, and per prompt the answer with its first token's log-probabilities."""

    tally: Tally
    said: tuple[Said, ...]


@dataclass(frozen=True)
class Unguarded:
    """The unguarded model's results."""

    sample: Sample
    behaviour: Behaviour


def builtin_sample(model: VisionLanguageModel) -> Sample:
    """Held-out built-in pairs; without prompts if the tokenizer lacks their words."""
    pairs = builtin_pairs(model)
    one_each = thinned(pairs, lambda pair: pair.intent, dict.fromkeys((pair.intent for pair in pairs), 1))
    asked = [p for p in prompts_from_anchors(one_each, model.sees) if p.label == "harmful"]
    harmful, harmless = (tuple(getattr(pair, label) for pair in pairs) for label in ("harmful", "harmless"))
    return Sample(tuple(asked), harmful, harmless, f"{BUILTIN}:calibration", BUILTIN_TOKENS)


def builtin_pairs(model: VisionLanguageModel) -> list[AnchorPair]:
    """Held-out built-in pairs whose halves have different tokens; none if the tokenizer lacks most of their words."""
    pairs = [pair for pair in read_anchors(BUILTIN, "calibration") if _differs(pair, model)]
    return pairs if len(pairs) >= _FEWEST_PAIRS else []


def sample_of(prompts: Sequence[LabelledPrompt], source: str, sees: bool, tokens: int) -> Sample:
    """Some of the prompts that come with a model.

    Args:
        prompts: labelled prompts.
        source: their name.
        sees: whether the model takes images.
        tokens: longest answer.
    """
    usable = [prompt for prompt in prompts if sees or prompt.setting == "text"]
    return Sample(tuple(some_harmful(usable)), _texts(usable, "harmful"), _texts(usable, "harmless"), source, tokens)


def _texts(prompts: Sequence[LabelledPrompt], label: str) -> tuple[str, ...]:
    shown = (prompt.prompt for prompt in prompts if (prompt.setting, prompt.label) == ("text", label))
    return tuple(spread(list(dict.fromkeys(shown)), _MOST_TEXTS))


def ask_unguarded(model: VisionLanguageModel, sample: Sample, report_progress: ProgressCallback) -> Unguarded:
    """The first half; the model may be closed behind it."""
    total = 2 * len(sample.prompts)
    return Unguarded(sample, _behaviour(model, sample, lambda done: report_progress("asking both models", done, total)))


def ask_guarded(
    unguarded: Unguarded,
    guarded: Callable[[], VisionLanguageModel],
    plan: GuardPlan,
    tolerance: float,
    report_progress: ProgressCallback,
) -> Refusals:
    """Run the guarded model on the same prompts.

    Args:
        unguarded: results of the unguarded model.
        guarded: opens the guarded model, after the unguarded one is closed.
        plan: the guard's plan.
        tolerance: largest relative difference of log-probabilities that counts as rounding.
        report_progress: called with `(stage, done, total)`.

    Returns:
        Refusals of both, and per setting the number of prompts on which the guard has an effect.
    """
    prompts = unguarded.sample.prompts
    half = len(prompts)
    after = _behaviour(
        guarded(), unguarded.sample, lambda done: report_progress("asking both models", half + done, 2 * half)
    )
    before = unguarded.behaviour
    changed = {
        prompt.setting: 0 for prompt in prompts if not (guard_mode(plan.mode).toward_text and prompt.setting == "text")
    }
    for prompt, left, right in zip(prompts, before.said, after.said, strict=True):
        if prompt.setting in changed:
            changed[prompt.setting] += has_effect(left, right, tolerance)
    refusals = compare_refusals(before.tally, after.tally, unguarded.sample.source)
    as_text = _refused_as_text(unguarded) if guard_mode(plan.mode).toward_text else {}
    return replace(
        refusals,
        settings=tuple(
            replace(s, changed=changed.get(s.setting), as_text=as_text.get(s.setting)) for s in refusals.settings
        ),
    )


def _refused_as_text(unguarded: Unguarded) -> dict[str, int]:
    """Per setting: number of its texts that the unguarded model refuses alone. Settings with a text that did not run alone
    are omitted."""
    asked = list(zip(unguarded.sample.prompts, unguarded.behaviour.tally.refusals, strict=True))
    alone = {prompt.prompt: declined for prompt, declined in asked if prompt.setting == "text"}
    texts: dict[str, list[str]] = {}
    for prompt, _ in asked:
        texts.setdefault(prompt.setting, []).append(prompt.prompt)
    return {
        setting: sum(alone[text] for text in own)
        for setting, own in texts.items()
        if setting != "text" and alone.keys() >= set(own)
    }


def has_effect(before: Said, after: Said, tolerance: float) -> bool:
    """Whether two answers to one prompt differ beyond rounding (the definition above)."""
    if before.tokens != after.tokens:
        return True
    a, b = before.first.astype(np.float64), after.first.astype(np.float64)
    possible = np.isfinite(a)
    if not np.array_equal(possible, np.isfinite(b)):
        return True
    a, b = a[possible], b[possible]
    scale = max(float(np.abs(a).max(initial=0.0)), 1e-6)
    return float(np.abs(a - b).max(initial=0.0)) > tolerance * scale


def require_effect(found: Refusals, allowed: bool) -> Refusals:
    """Refuse a guard that has no effect, unless that is allowed; the result records that it was.

    Raises:
        NoEffect: on none of the prompts, and it is not allowed.
    """
    if not found.no_effect:
        return found
    if not allowed:
        asked = ", ".join(f"{s.setting} {s.asked}" for s in found.settings if s.changed is not None)
        raise NoEffect(
            f"the guard has no effect on {found.counted} harmful prompts ({found.prompts}: {asked}): the guarded model answers "
            "them exactly as the unguarded one; nothing was written; check thresholds, targets, strength and directions, "
            "calibrate with --anchors, or export it nevertheless with --allow-no-effect"
        )
    return replace(found, allowed_no_effect=True)


def measure_separation(
    package: ModelPackage, anatomy: DecoderAnatomy, plan: GuardPlan, sample: Sample, place: DecoderPlace | None = None
) -> tuple[Separation, ...]:
    """The AUC of every guarded layer on the sample's texts, in the unguarded model.

    Args:
        package: the unguarded model.
        anatomy: of its decoder.
        plan: the guard's plan, with its directions.
        sample: texts of both labels.
        place: opens the decoder.

    Returns:
        One value per guarded layer; empty without both labels.
    """
    harmful, harmless = sample.harmful, sample.harmless
    if not harmful or not harmless:
        return ()
    model = VisionLanguageModel(package, tapped_graph(package, anatomy), place=place)
    states = collect_states(model, [Request(text) for text in (*harmful, *harmless)])
    return tuple(
        separation_along(
            guard.ssd[0], layer, states[: len(harmful), layer], states[len(harmful) :, layer], sample.source
        )
        for layer, guard in zip(plan.layers, plan.guards, strict=True)
    )


def why_not_asked(package: ModelPackage, needs_embeds: bool) -> str | None:
    """Why a model cannot be run, from its files; `None` if it can."""
    if package.companion("tokenizer.json") is None:
        return "the model has no tokenizer.json"
    if needs_embeds and package.embed_tokens is None:
        return "the model has no embed_tokens graph"
    return None


def _behaviour(model: VisionLanguageModel, sample: Sample, report_done: Callable[[int], None]) -> Behaviour:
    requests = [prompt.request(model) for prompt in sample.prompts]
    said: dict[int, Said] = {}
    for indices in model.groups(requests, _BATCH):
        said |= dict(zip(indices, ask(model, [requests[index] for index in indices], sample.tokens), strict=True))
        report_done(len(said))
    in_order = tuple(said[number] for number in range(len(requests)))
    answers = tuple(one.answer for one in in_order)
    refusals = tuple(map(refused, answers))
    return Behaviour(Tally(count(sample.prompts, refusals), answers, refusals), in_order)


def _differs(pair: AnchorPair, model: VisionLanguageModel) -> bool:
    harmful, harmless = (model.chat.encode_turns(Request(text).turns) for text in (pair.harmful, pair.harmless))
    return list(harmful) != list(harmless)
