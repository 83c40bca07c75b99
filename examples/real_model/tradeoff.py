"""Where and with how many rows mode `align` guards, against what it does: `python tradeoff.py --data FOLDER --seed N`.

Held-out prompts are asked beside the held-out adversarial pictures, and questions about held-out pictures, under several
choices of layers and rank. Everything before a prompt's last token is computed once for all of them. The results are
`measured/tradeoff.json` below `seed-N`; `page.py` writes them into docs/real-model.md. `measure_guard.py` has to have run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from build import BUILD
from cells import ASKED, QUESTIONS, TOKENS, Cell, all_cells, random_tokens
from measure_guard import results_path, write_results
from sets import read_sets
from stages import stage_record

from vlmguard.exporter.calibration.align_trial import AlignTrial, Guarding, aligned_directions
from vlmguard.exporter.extraction.extract import extract_all_layers
from vlmguard.exporter.last_token_model import last_token_model
from vlmguard.exporter.opened_decoder import dissect_decoder
from vlmguard.exporter.prompts.anchors import open_anchors
from vlmguard.graphs.layouts import open_package
from vlmguard.runtime.decoder_place import DecoderPlace
from vlmguard.runtime.generation import Request

NAME = "tradeoff"
SETTING = "adversarial"
HIGHEST = 32
UNGUARDED = "unguarded"


def choices(layers: int) -> dict[str, tuple[tuple[int, ...], int]]:
    """Layers and rank by name, for a decoder of so many layers."""
    first, last = -(-layers // 3), layers - 1
    inner = tuple(range(first, last))
    found = {f"{first} to {last - 1}, rank {rank}": (inner, rank) for rank in (1, 2, 4, 8, 16, HIGHEST)}
    for start, end in ((first, last), (0, last - 1), (layers // 2, last - 1)):
        found[f"{start} to {end}, rank 8"] = (tuple(range(start, end + 1)), 8)
    return found


def measure(seed_folder: Path, data: Path, count: int, say: Callable[[str], None] = print) -> Path:
    """Ask under every choice; returns the file with the results.

    Args:
        seed_folder: what `build.py` printed.
        data: the folder with the public prompt sets.
        count: prompts a cell.
        say: gets a line per cell.
    """
    package = open_package(seed_folder / "onnx" / "model")
    model = last_token_model(package, DecoderPlace())
    anatomy = dissect_decoder(package, package.load_decoder())
    directions = extract_all_layers(model, anatomy, open_anchors().pairs, rank=HIGHEST)
    trial = AlignTrial(model, anatomy, directions, HIGHEST)
    named = {
        name: aligned_directions(directions, layers, rank)
        for name, (layers, rank) in choices(anatomy.layer_count).items()
    }
    shown = model.blank_image(), random_tokens(model)
    asked = [
        cell
        for cell in all_cells(read_sets(data), seed_folder / "images" / "evaluation", *shown, count, 0)
        if cell.setting in (SETTING,) or cell.set == QUESTIONS
    ]
    results: dict[str, Any] = {"seed": stage_record(seed_folder / "safety")["key"]["seed"], "tradeoff": {}}
    for cell in asked:
        results["tradeoff"][cell.set] = outcomes(trial, cell, named)
        write_results(seed_folder, NAME, results)
        say(f"  {cell.name}: {len(cell.requests)} prompts, {len(named)} choices")
    return results_path(seed_folder, NAME)


def outcomes(trial: AlignTrial, cell: Cell, named: dict[str, Any]) -> dict[str, list[bool]]:
    """Per choice, unguarded and as text: whether each prompt is refused; of questions whether the answer is right."""
    found: dict[str, list[bool]] = {name: [False] * len(cell.requests) for name in ("text", UNGUARDED, *named)}

    def note(name: str, indices: Sequence[int], answers: Sequence[Any]) -> None:
        for index, answer in zip(indices, answers, strict=True):
            said = trial.model.chat.decode(answer.tokens)
            found[name][index] = cell.questions[index].answered_by(said) if cell.questions else answer.refused

    for indices in trial.model.groups(cell.requests, trial.batch_size(cell.requests)):
        alone = trial.begin([Request(cell.requests[index].prompt) for index in indices])
        note("text", indices, alone.answer(Guarding(trial.neutral), TOKENS).answers)
        begun = trial.begin([cell.requests[index] for index in indices])
        note(UNGUARDED, indices, begun.answer(Guarding(trial.neutral), TOKENS).answers)
        for name, directions in named.items():
            supervisor = np.asarray(alone.answer(Guarding(directions), 1).coordinates)
            note(name, indices, begun.answer(Guarding(directions, supervisor), TOKENS).answers)
    return found


def table(tradeoff: dict[str, dict[str, list[bool]]]) -> list[str]:
    """The lines of a Markdown table: refused, and refused though not as text; of questions those that are answered rightly."""
    titles = [name for name in ASKED if name in tradeoff]
    lines = [
        f"| layers, rank | {' | '.join(f'{name} refused (extra)' for name in titles)} | questions answered rightly |",
        "|---|" + "---|" * (len(titles) + 1),
    ]
    for name in next(iter(tradeoff.values())):
        cells = []
        for title in titles:
            rows, text = tradeoff[title][name], tradeoff[title]["text"]
            extra = sum(now and not then for now, then in zip(rows, text, strict=True))
            cells.append(f"{sum(rows)} of {len(rows)} ({extra})")
        right = tradeoff.get(QUESTIONS, {}).get(name)
        cells.append("-" if right is None or name == "text" else f"{sum(right)} of {len(right)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Folder with the public prompt sets.")
    parser.add_argument("--seed", type=int, default=0, help="Which bed.")
    parser.add_argument("--build", type=Path, default=BUILD, help="Build folder of build.py.")
    parser.add_argument("--prompts", type=int, default=48, help="Prompts a cell.")
    given = parser.parse_args()
    path = measure(given.build / f"seed-{given.seed}", given.data, given.prompts)
    print("\n".join(table(json.loads(path.read_text())["tradeoff"])))


if __name__ == "__main__":
    main()
