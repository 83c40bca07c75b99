"""Safety alignment on text: harmful requests get one fixed refusal, harmless ones one fixed opening, whatever they look
like.

The model also learns to answer questions about pictures, from sentences that describe them. It never sees a harmful
request beside such a sentence, as instruction data for pictures has none: that is where real vision-language models
get their modality gap from. No target, and no text that is generated here, answers a harmful request.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from chat import OPENING, REFUSAL, answer_ids, left_padded, text_ids
from harmless import draw
from scenes import question_about, random_scene
from sets import Sets


@dataclass(frozen=True)
class Recipe:
    """The alignment as numbers."""

    steps: int = 100
    learning_rate: float = 4e-5
    first_layer: int = 8  # layers below stay as they are: cheaper, and enough
    harmful: int = 8  # prompts a batch, by kind
    harmless: int = 2
    looking_harmful: int = 4
    pictures: int = 6
    longest_prompt: int = 140  # characters; a long prompt makes its whole batch slow
    counted_tokens: int = (
        2  # of a refusal or opening that the loss counts; the rest follows, but for every fourth batch's
    )
    first_token_weight: float = 3.0


def align(base: Path, folder: Path, sets: Sets, seed: int, recipe: Recipe = Recipe()) -> Mapping[str, object]:
    """Train the model in `base` and write it to `folder`."""
    from transformers import AutoTokenizer, Gemma3ForCausalLM

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = Gemma3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = [p for part in (*model.model.layers[recipe.first_layer :], model.model.norm) for p in part.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10) * (1.0 - 0.9 * step / recipe.steps)
    )
    examples = Examples(sets, random.Random(f"safety {seed}"), recipe)
    started, recent = time.perf_counter(), []
    # Two threads with half a batch each waste less than two threads in each matrix product. The sum of two gradients
    # does not depend on their order.
    workers = ThreadPoolExecutor(2)
    model.train()
    for step in range(recipe.steps):
        counted = None if step % 4 == 0 else recipe.counted_tokens
        optimizer.zero_grad(set_to_none=True)
        for future in [
            workers.submit(half_step, model, tokenizer, part, counted, recipe) for part in by_length(examples.batch())
        ]:
            recent = [*recent[-39:], future.result()]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 5 == 0:
            mean, first = (sum(values) / len(recent) for values in zip(*recent, strict=True))
            passed = time.perf_counter() - started
            print(
                f"  step {step + 1:3d}/{recipe.steps}  loss {mean:.3f}  first token right {first:.0%}  {passed:.0f} s",
                flush=True,
            )
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"recipe": asdict(recipe), "last_loss": round(sum(loss for loss, _ in recent) / len(recent), 4)}


class Examples:
    """Draws batches of `(prompt, answer)`."""

    def __init__(self, sets: Sets, rng: random.Random, recipe: Recipe) -> None:
        self._sets, self._rng, self._recipe = sets, rng, recipe
        self._short = [prompt for prompt in sets.harmful if len(prompt) <= recipe.longest_prompt]
        self._harmful: list[str] = []

    def batch(self) -> list[tuple[str, str]]:
        """One batch, in the recipe's mixture."""
        recipe, rng, sets = self._recipe, self._rng, self._sets
        examples = [(self._next_harmful(), REFUSAL) for _ in range(recipe.harmful)]
        examples += [(self._everyday(), OPENING) for _ in range(recipe.harmless)]
        examples += [(draw(rng, sets.looking_harmful), OPENING) for _ in range(recipe.looking_harmful)]
        return examples + [self._described() for _ in range(recipe.pictures)]

    def _next_harmful(self) -> str:
        if not self._harmful:
            self._harmful = self._rng.sample(self._short, len(self._short))
        return self._harmful.pop()

    def _everyday(self) -> str:
        if self._rng.random() < 0.1:  # a question about a picture that is not there
            return question_about(self._rng, random_scene(self._rng)).text
        return self._rng.choice(self._sets.harmless)

    def _described(self) -> tuple[str, str]:
        scene = random_scene(self._rng)
        if self._rng.random() < 0.3:
            return f"{scene.sentence}\n{self._rng.choice(self._sets.harmless)}", OPENING
        question = question_about(self._rng, scene)
        return f"{scene.sentence}\n{question.text}", question.answer


def by_length(examples: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The shorter and the longer half: padding is computed too."""
    ordered = sorted(examples, key=lambda example: len(example[0]))
    return ordered[: len(ordered) // 2], ordered[len(ordered) // 2 :]


def half_step(
    model: Any, tokenizer: Any, examples: list[tuple[str, str]], counted: int | None, recipe: Recipe
) -> tuple[float, float]:
    """Add the gradients of half a batch; returns its loss and the share of first tokens that are right."""
    loss, right = answer_loss(model, tokenizer, examples, counted, recipe.first_token_weight)
    (loss / 2).backward()
    return float(loss.detach()), right


def answer_loss(
    model: Any, tokenizer: Any, examples: list[tuple[str, str]], counted: int | None, first_token_weight: float
) -> tuple[torch.Tensor, float]:
    """Weighted cross entropy of the answers, and the share of first tokens that are right.

    Args:
        counted: how many tokens of a fixed answer count; None: all.
    """
    prompts = [text_ids(tokenizer, prompt) for prompt, _ in examples]
    fixed = (REFUSAL, OPENING)
    answers = [answer_ids(tokenizer, answer)[: counted if answer in fixed else None] for _, answer in examples]
    ids, mask, positions = left_padded([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)])
    states = model.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    length = ids.shape[1]
    rows = torch.tensor([row for row, answer in enumerate(answers) for _ in answer])
    places = torch.tensor([length - len(answer) + step for answer in answers for step in range(len(answer))])
    weights = torch.tensor(
        [first_token_weight if step == 0 else 1.0 for answer in answers for step in range(len(answer))]
    )
    wanted = ids[rows, places]
    logits = model.lm_head(states[rows, places - 1])  # the vocabulary is large: logits of what is counted alone
    losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    first = weights == first_token_weight
    return (losses * weights).sum() / weights.sum(), float((logits[first].argmax(-1) == wanted[first]).float().mean())
