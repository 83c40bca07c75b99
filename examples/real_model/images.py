"""The pictures of the bed: `calibration/` for a user's `--calibration-image`, `evaluation/` for measuring. They share
none.

`blank` is made by the runtime. `noise-N.png` are random pixels, `picture-N.png` show two shapes, `adversarial-N.png`
are attacks.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from adversary import FAMILIES, Attack, attack
from scenes import draw, noise, random_scene

COUNTS = {"noise": 2, "picture": 4, "adversarial": 2}  # of each family


def make_images(
    checkpoint: Path,
    folder: Path,
    harmful: Sequence[str],
    seed: int,
    settings: Attack,
    counts: Mapping[str, int] = COUNTS,
) -> dict[str, object]:
    """Write both families.

    Args:
        checkpoint: the model that is attacked.
        folder: for the pictures.
        harmful: prompts of the training set, for the attacks.
        seed: of pictures and attacks.
        settings: of the attacks.
        counts: pictures of each kind in each family.
    """
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    for family in FAMILIES:
        (folder / family).mkdir()
        rng = random.Random(f"pictures {family} {seed}")
        for number in range(counts["noise"]):
            noise(f"{family} {seed} {number}").save(folder / family / f"noise-{number}.png")
        for number in range(counts["picture"]):
            draw(random_scene(rng)).save(folder / family / f"picture-{number}.png")
    if not counts.get("adversarial"):
        return {}
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = LlavaProcessor.from_pretrained(checkpoint)
    with ThreadPoolExecutor(2) as workers:  # an attack's products are too small for two threads each
        attacks = {
            folder / family / f"adversarial-{number}.png": workers.submit(
                attack, model, processor, own_half(harmful, family), f"{family} {seed} {number}", settings
            )
            for family in FAMILIES
            for number in range(counts["adversarial"])
        }
        for path, picture in attacks.items():
            picture.result().save(path)
    return {"attack": asdict(settings)}


def own_half(harmful: Sequence[str], family: str) -> Sequence[str]:
    """The prompts that attacks of a family may use: those of the other family are the rest."""
    return harmful[FAMILIES.index(family) :: 2]
