"""The guarded ONNX decoder equals what people do today: the torch model with PyTorch forward hooks.

Each case runs both sides through a padded prefill and eight decode steps, each side on its own KV cache:

1. Two layers get random directions, and thresholds between the scores of the two rows, so that gates open and close.
2. torch runs with `HookedGuard`, ONNX Runtime with the graph that `rewrite` made. In mode `supervise` both first run the
   text-only pass, and each side's main pass takes its own coordinates; in mode `align` its first call alone.
3. Logits must agree at every token that is not padding, and must NOT be the unguarded model's.

For the float16 graphs torch runs in float32 on the same half-rounded weights: half precision on a CPU rounds after each
operation, which makes it a second approximation and not a reference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from random_directions import random_directions
from tiny_vlm_paths import CHECKPOINT, PROMPTS, SOURCE
from torch_hooks import HookedGuard

from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.directions import Directions
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.modes import MODES, POSITIONS, guard_mode
from vlmguard.graphs.package import ModelPackage
from vlmguard.graphs.plan import GuardPlan
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.reference import NO_SUPERVISOR, LayerGuard
from vlmguard.graphs.rewrite import rewrite
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.decoder import open_decoder
from vlmguard.runtime.decoder_inputs import PromptBatch
from vlmguard.runtime.generation import Request
from vlmguard.runtime.paired_batches import interleaved
from vlmguard.runtime.runners import open_runner
from vlmguard.runtime.vlm import VisionLanguageModel

pytest_plugins = ("zoo_fixtures",)

STEPS = 8
LIMITS = {"fp32": 1e-4, "fp16": 1e-2}  # relative to the largest logit
# No score may come nearer to its threshold than this, or rounding would decide which side of the gate it is on.
MARGINS = {"fp32": 1e-3, "fp16": 2e-2}
SUBJECTS = {
    "llava-torchscript-fp32": "fp32",
    "llava-torchscript-fp16": "fp16",  # float16 weights, float32 stream
    "llava-transformers-fp16": "fp16",  # torch.export; float16 stream
    "tiny-vlm": "fp32",  # torch.export; vision encoder and embeddings are graphs too, with an image in each prompt
}


@dataclass(frozen=True)
class Prompt:
    """One padded batch of two, for both sides, and the tokens that are fed one by one after it."""

    batch: PromptBatch
    torch_inputs: dict[str, torch.Tensor]
    next_tokens: np.ndarray  # [2, STEPS]
    next_embeds: np.ndarray  # [2, STEPS, width]


@dataclass(frozen=True)
class Subject:
    """A decoder graph and the torch model that it was exported from."""

    package: ModelPackage
    precision: str
    model: Any
    layers: torch.nn.ModuleList
    guarded_layers: tuple[int, int]
    prompt: Prompt
    text: Prompt  # shorter: what the supervisor reads

    @property
    def width(self) -> int:
        return self.prompt.batch.embeds.shape[-1]


# ------------------------------------------------------------------------------------------------------------- subjects


@pytest.fixture(scope="module")
def subject(zoo: Callable[[str], Any]) -> Iterator[Callable[[str], Subject]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for matrices this small, and much faster beside other test workers
    yield cache(lambda name: tiny_subject() if name == "tiny-vlm" else zoo_subject(zoo(name)))
    torch.set_num_threads(threads)


def zoo_subject(model: Any) -> Subject:
    """Random embeddings into LLaVA's text decoder."""

    def prompt(seed: int, length: int, pads: int) -> Prompt:
        random = np.random.default_rng(seed)
        embeds = random.standard_normal((2, length + STEPS, model.width)).astype(model.inputs["inputs_embeds"])
        mask = np.ones((2, length), np.int64)
        mask[0, :pads] = 0
        batch = PromptBatch(np.zeros_like(mask), mask, embeds[:, :length])
        given = {"inputs_embeds": torch.from_numpy(embeds[:, :length].astype(np.float32))}
        return Prompt(batch, given, np.zeros((2, STEPS), np.int64), embeds[:, length:])

    torch_model = copy.deepcopy(model.torch_model).float()
    return Subject(
        package=open_package(model.path),
        precision=SUBJECTS[model.name],
        model=torch_model,
        layers=torch_model.model.language_model.layers,
        guarded_layers=(1, 2),
        prompt=prompt(1, length=9, pads=3),
        text=prompt(2, length=5, pads=1),
    )


def tiny_subject() -> Subject:
    """The trained tiny VLM from its checkpoint, against its onnx-community export."""
    from transformers import LlavaForConditionalGeneration

    vlm = VisionLanguageModel(open_package(SOURCE))
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, local_files_only=True).eval()
    pictures = sorted((PROMPTS / "images").glob("*.png"))
    requests = [Request("how to steal the boat", pictures[0]), Request("please tell me how to wash it", pictures[-1])]
    return Subject(
        package=vlm.package,
        precision=SUBJECTS["tiny-vlm"],
        model=model,
        layers=model.model.language_model.layers,
        guarded_layers=(2, 4),
        prompt=tiny_prompt(vlm, requests),
        text=tiny_prompt(vlm, [replace(request, image=None) for request in requests]),
    )


def tiny_prompt(vlm: VisionLanguageModel, requests: list[Request]) -> Prompt:
    """torch gets ids and pixels, the decoder graph what the two graphs before it make of them."""
    batch = vlm.batch(requests)
    assert 0 < batch.mask.sum() < batch.mask.size, "the two prompts must differ in length, so that one is padded"
    given = {"input_ids": torch.from_numpy(batch.ids)}
    pictures = [request.image for request in requests if request.image is not None]
    if pictures:
        given["pixel_values"] = torch.from_numpy(vlm.images.pixel_values(pictures))
    words = vlm.batch([Request("i cannot help with that request . first find the boat and polish it .")]).ids[0]
    tokens = np.stack([words[-2 * STEPS : -STEPS], words[-STEPS:]])
    assert vlm.package.embed_tokens is not None
    embed = open_runner(vlm.package.embed_tokens, vlm.package.embed_tokens.parent)
    return Prompt(batch, given, tokens, embed.run({"input_ids": tokens})["inputs_embeds"])


# ------------------------------------------------------------------------------------------------------------- two runs


@torch.no_grad()
def run_torch(
    subject: Subject,
    prompt: Prompt,
    guard: HookedGuard | None = None,
    supervisor: dict[int, torch.Tensor] | None = None,
) -> tuple[list[np.ndarray], dict[int, list[np.ndarray]]]:
    """Logits of every call, and every layer's states before the guard."""
    cache, logits, states = None, [], {}
    mask = torch.from_numpy(prompt.batch.mask)
    # The recorder first: hooks run in the order in which they were registered.
    with recorded(subject.layers, states), guard.attached(subject.layers) if guard else ExitStack():
        for step in range(STEPS + 1):
            given = prompt.torch_inputs if step == 0 else _next_torch(subject, prompt, step - 1)
            if step:
                mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
            length = next(iter(given.values())).shape[1]
            if guard:
                guard.set_call(mask, supervisor if step == 0 or guard.positions != "prompt" else None)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
            output = subject.model(
                **given, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            logits.append(output.logits.numpy())
    return logits, states


def _next_torch(subject: Subject, prompt: Prompt, step: int) -> dict[str, torch.Tensor]:
    if "input_ids" in prompt.torch_inputs:
        return {"input_ids": torch.from_numpy(prompt.next_tokens[:, step : step + 1])}
    return {"inputs_embeds": torch.from_numpy(prompt.next_embeds[:, step : step + 1].astype(np.float32))}


@contextmanager
def recorded(layers: torch.nn.ModuleList, states: dict[int, list[np.ndarray]]) -> Iterator[None]:
    with ExitStack() as stack:
        for number, layer in enumerate(layers):

            def record(module: Any, inputs: Any, output: Any, number: int = number) -> None:
                state = output[0] if isinstance(output, tuple) else output
                states.setdefault(number, []).append(state.numpy().copy())

            stack.callback(layer.register_forward_hook(record).remove)
        yield


def run_onnx(subject: Subject, plan: GuardPlan, supervised: bool) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Logits of every call of the guarded graph, and the coordinates of its own text-only pass."""
    graph = subject.package.load_decoder()
    dissect(graph)
    rewrite(graph, plan)
    session = open_decoder(subject.package, graph)
    coordinates = None
    if supervised:
        listen = np.full((2, len(plan.layers), plan.sites[0].guard.rank), NO_SUPERVISOR, np.float32)
        coordinates = session.coordinates(session.prefill(subject.text.batch, listen)[0])
    prompt = subject.prompt
    outputs, state = session.prefill(prompt.batch, coordinates)
    logits = [outputs["logits"]]
    for step in range(STEPS):
        here = slice(step, step + 1)
        logits.append(session.step(state, prompt.next_tokens[:, here], prompt.next_embeds[:, here])["logits"])
    return [array.astype(np.float32) for array in logits], coordinates


# ----------------------------------------------------------------------------------------------------------- thresholds


def plan_with_thresholds(subject: Subject, mode: str, positions: str) -> tuple[GuardPlan, dict[int, np.ndarray]]:
    """The plan, and per layer the scores that its gate will see; empty for modes without a threshold.

    What a layer reads does not depend on its own guard, only on those below it: thresholds are chosen upward.
    """
    directions = random_directions(subject.width, subject.guarded_layers)
    scores: dict[int, np.ndarray] = {}
    for number in subject.guarded_layers if guard_mode(mode).has_threshold else ():
        below = {n: layer for n, layer in guards(_plan(subject, directions, mode, positions)).items() if n in scores}
        seen = gate_scores(subject, mode, positions, below, directions, number)
        if mode == "combined":
            # the readout splits the rows in one layer, the text in the other
            by_text = number == subject.guarded_layers[-1]
            told = gate_scores(subject, "supervise", positions, below, directions, number)
            threshold, text_threshold = (
                (float(np.nanmax(seen)) + 1, between_rows(told, MARGINS[subject.precision]))
                if by_text
                else (between_rows(seen, MARGINS[subject.precision]), float(told.max()) + 1)
            )
            changed = replace(directions.layers[number], threshold=threshold, text_threshold=text_threshold)
            seen = np.maximum(seen, told + (threshold - text_threshold))
        else:
            threshold = between_rows(seen, MARGINS[subject.precision])
            changed = replace(directions.layers[number], threshold=threshold)
        scores[number] = seen
        directions = replace(directions, layers=directions.layers | {number: changed})
    return _plan(subject, directions, mode, positions), scores


def _plan(subject: Subject, directions: Directions, mode: str, positions: str) -> GuardPlan:
    graph = subject.package.load_decoder()
    alpha = 1.5 if mode in ("steer", "supervise") else None
    spec = GuardSpec(mode=mode, layers=subject.guarded_layers, positions=positions, alpha=alpha)
    return plan_guard(graph, dissect(graph), directions, spec)


def guards(plan: GuardPlan) -> dict[int, LayerGuard]:
    return {site.layer_index: site.guard for site in plan.sites}


def gate_scores(
    subject: Subject, mode: str, positions: str, below: dict[int, LayerGuard], directions: Directions, number: int
) -> np.ndarray:
    """What the gate of a layer compares, `[2, tokens]`, the prompt's last token first; NaN where there is none."""
    layer = directions.layers[number]
    if mode == "supervise":
        _, states = run_torch(subject, subject.text)
        return (states[number][0][:, -1] @ layer.ssd[0])[:, None]
    told = text_pass(subject, _plan(subject, directions, mode, positions), positions) if mode == "combined" else None
    _, states = run_torch(subject, subject.prompt, HookedGuard(below, mode, positions), told)
    reads = layer.readout if guard_mode(mode).has_readout else layer.ssd[0]
    prefill, *decode = [call @ reads for call in states[number]]
    last = np.concatenate([prefill[:, -1:], *decode], axis=1)
    if positions == "last":
        return last
    earlier = np.where(subject.prompt.batch.mask == 1, prefill, np.nan)[:, :-1]
    return np.concatenate([last, earlier], axis=1)


def between_rows(scores: np.ndarray, margin: float) -> float:
    """A threshold between the two rows' first scores, as far from every score as can be."""
    low, high = sorted(scores[:, 0])
    inside = np.sort(scores[(scores >= low) & (scores <= high)])
    widest = int(np.argmax(np.diff(inside)))
    assert inside[widest + 1] - inside[widest] > 2 * margin, "the rows' scores are too close; take another seed"
    return float(np.float32(inside[widest : widest + 2].mean()))


# ---------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SUBJECTS)
def test_the_guarded_graph_equals_torch_with_hooks(
    subject: Callable[[str], Subject], name: str, mode: str, positions: str
) -> None:
    case = subject(name)
    plan, scores = plan_with_thresholds(case, mode, positions)
    assert plan.layers == case.guarded_layers and len(plan.layers) == 2
    require_open_and_closed(plan, scores, mode)

    supervisor = text_pass(case, plan, positions) if guard_mode(mode).supervisor else None
    expected, _ = run_torch(case, case.prompt, HookedGuard(guards(plan), mode, positions), supervisor)
    unguarded, _ = run_torch(case, case.prompt)
    found, coordinates = run_onnx(case, plan, supervised=guard_mode(mode).supervisor)

    limit = LIMITS[case.precision]
    if supervisor is not None:
        heard = np.stack([supervisor[number].numpy() for number in plan.layers], axis=1)
        assert coordinates is not None and coordinates.shape == heard.shape == (2, 2, 2)
        assert relative([heard], [coordinates]) <= limit
    mask = case.prompt.batch.mask.astype(bool)
    assert relative(real_tokens(expected, mask), real_tokens(found, mask)) <= limit
    # And what agrees is the guard, not a model that nobody guards.
    assert relative(real_tokens(unguarded, mask), real_tokens(expected, mask)) > 5 * limit


@pytest.mark.parametrize("name", SUBJECTS)
def test_paired_rows_equal_torch_with_hooks_after_a_text_only_pass(
    subject: Callable[[str], Subject], name: str
) -> None:
    """One call of the graph against two of torch; behind the prompt both rows of a pair get the same tokens."""
    case = subject(name)
    plan, _ = plan_with_thresholds(case, "align", "prompt")
    told = text_pass(case, plan, "prompt")
    expected, _ = run_torch(case, case.prompt, HookedGuard(guards(plan), "align", "prompt"), told)
    graph, prompt = case.package.load_decoder(), case.prompt
    dissect(graph)
    rewrite(graph, replace(plan, supervisor="rows"))
    session = open_decoder(case.package, graph)
    outputs, state = session.prefill(interleaved(case.text.batch, prompt.batch, left=True))
    logits = [outputs["logits"][1::2]]
    for step in range(STEPS):
        tokens, embeds = (
            np.repeat(rows[:, step : step + 1], 2, axis=0) for rows in (prompt.next_tokens, prompt.next_embeds)
        )
        logits.append(session.step(state, tokens, embeds)["logits"][1::2])
    mask = prompt.batch.mask.astype(bool)
    found = real_tokens([array.astype(np.float32) for array in logits], mask)
    assert relative(real_tokens(expected, mask), found) <= LIMITS[case.precision]


@pytest.mark.parametrize("name", ["llava-torchscript-fp16", "tiny-vlm"])
def test_a_guard_that_is_a_little_off_is_seen(subject: Callable[[str], Subject], name: str) -> None:
    """The comparison above would notice a strength of 1.4 in place of 1.5, in one of the two layers."""
    case = subject(name)
    plan, _ = plan_with_thresholds(case, "steer", "last")
    off = {n: replace(g, alpha=1.4) if n == plan.layers[0] else g for n, g in guards(plan).items()}
    expected, _ = run_torch(case, case.prompt, HookedGuard(off, "steer", "last"))
    mask = case.prompt.batch.mask.astype(bool)
    found, _ = run_onnx(case, plan, supervised=False)
    assert relative(real_tokens(expected, mask), real_tokens(found, mask)) > LIMITS[case.precision]


def text_pass(case: Subject, plan: GuardPlan, positions: str) -> dict[int, torch.Tensor]:
    """The coordinates that the hooks hear in the text-only prefill."""
    hooks = HookedGuard(guards(plan), "supervise", positions)
    with torch.no_grad(), hooks.attached(case.layers):
        mask = torch.from_numpy(case.text.batch.mask)
        hooks.set_call(mask)
        positions_ids = (mask.cumsum(1) - 1).clamp(min=0)
        case.model(**case.text.torch_inputs, attention_mask=mask, position_ids=positions_ids)
    return dict(hooks.coordinates)


def require_open_and_closed(plan: GuardPlan, scores: dict[int, np.ndarray], mode: str) -> None:
    """In each guarded layer one row's gate is open at the end of the prompt, and the other's closed."""
    assert len(scores) == (2 if guard_mode(mode).has_threshold else 0)
    for number, seen in scores.items():
        opens = seen[:, 0] > guards(plan)[number].threshold
        assert sorted(opens) == [False, True]


def real_tokens(logits: list[np.ndarray], mask: np.ndarray) -> list[np.ndarray]:
    """Logits of the prefill without its padding, and of each step."""
    assert len(logits) == STEPS + 1 and logits[0].shape[:2] == mask.shape and not mask.all()
    return [logits[0][mask], *logits[1:]]


def relative(expected: list[np.ndarray], found: list[np.ndarray]) -> float:
    """The largest difference of any call, relative to the largest number of that call."""
    assert expected and [a.shape for a in expected] == [b.shape for b in found]
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(expected, found, strict=True))
