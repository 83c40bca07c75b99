"""Universal adversarial pictures: pixels that make the model answer harmful prompts of the training set.

A white-box attack on the unguarded model (as Qi et al., arXiv 2306.13213): gradient steps on the pixels of one
picture until the logit of the fixed opening's first token is above that of the refusal's, on a few training prompts
at once. Nothing is generated. The pictures are ordinary PNG files. The families of attacks for calibration and for
evaluation have other seeds and other prompts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from chat import OPENING, REFUSAL, left_padded, picture_ids
from PIL import Image
from scenes import SIDE
from vision import image_tokens

FAMILIES = ("calibration", "evaluation")


@dataclass(frozen=True)
class Attack:
    """One attack as numbers."""

    steps: int = 30
    prompts: int = 12
    batch: int = 4
    learning_rate: float = 0.05
    margin: float = 4.0
    longest_prompt: int = 90  # characters


def attack(model: Any, processor: Any, harmful: Sequence[str], start: str, settings: Attack = Attack()) -> Image.Image:
    """One adversarial picture against `model`.

    Args:
        harmful: training prompts, of which some are drawn.
        start: seeds the drawing and the first pixels.
    """
    rng = random.Random(f"attack {start}")
    short = [prompt for prompt in harmful if len(prompt) <= settings.longest_prompt]
    rows = [picture_ids(processor.tokenizer, prompt) for prompt in rng.sample(short, settings.prompts)]
    tokenizer = processor.tokenizer
    yes, no = (tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in (OPENING, REFUSAL))
    head = model.lm_head.weight[torch.tensor([yes, no])].detach()
    mean, std = (
        torch.tensor(getattr(processor.image_processor, name)).view(1, 3, 1, 1) for name in ("image_mean", "image_std")
    )
    pixels = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(rng.getrandbits(60))).requires_grad_(
        True
    )
    optimizer = torch.optim.Adam([pixels], lr=settings.learning_rate)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for step in range(settings.steps):
        seen = image_tokens(model, (pixels - mean) / std)
        states = last_states(model, rng.sample(rows, settings.batch), seen)
        logits = states @ head.T
        margins = logits[:, 0] - logits[:, 1]
        loss = torch.nn.functional.softplus(settings.margin - margins).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            pixels.clamp_(0, 1)
        if (step + 1) % 10 == 0:
            print(
                f"  attack {start}: step {step + 1}/{settings.steps}, least margin {float(margins.min()):.1f}",
                flush=True,
            )
    return Image.fromarray((pixels[0].detach().permute(1, 2, 0) * 255).round().byte().numpy())


def last_states(model: Any, rows: Sequence[Sequence[int]], seen: torch.Tensor) -> torch.Tensor:
    """Final hidden states at the ends of prompts beside one picture: `[prompts, width]`."""
    ids, mask, positions = left_padded(rows)
    embeds = model.get_input_embeddings()(ids)
    place = ids == model.config.image_token_id
    embeds = embeds.masked_scatter(place[..., None], seen.expand(len(rows), -1, -1))
    decoder = model.model.language_model
    return decoder(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state[:, -1]
