"""Prompts that are in two sets at once: what was extracted from or calibrated on says nothing when it is asked again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from ...graphs.directions import DIRECTIONS_FILE, read_directions
from ...graphs.errors import PromptsUnusable
from ...graphs.manifest import Manifest
from .labelled import LabelledPrompt, PromptSet, fingerprint


@dataclass(frozen=True)
class Overlap:
    """Prompts that two sets share (`prompts.fingerprint`).

    Attributes:
        first, second: names of the sets.
        shared: how many different prompts.
        conflicting: how many of these are harmful in one set and not in the other.
        example: one of them, as the first set has it.
    """

    first: str
    second: str
    shared: int
    conflicting: int
    example: str


def overlaps(sets: Sequence[PromptSet]) -> list[Overlap]:
    """Every two sets that share prompts."""
    marked = [(found.name, {fingerprint(prompt): prompt for prompt in found.prompts}) for found in sets]
    return [
        Overlap(
            first,
            second,
            len(shared),
            sum((ours[mark].label == "harmful") != (theirs[mark].label == "harmful") for mark in shared),
            ours[shared[0]].prompt,
        )
        for (first, ours), (second, theirs) in combinations(marked, 2)
        if (shared := [mark for mark in ours if mark in theirs])
    ]


def require_held_out(title: str, prompts: Sequence[LabelledPrompt], used: Iterable[str], how: str, verb: str) -> None:
    """None of the prompts was used by an earlier step.

    Args:
        title: where the prompts are from.
        used: fingerprints of the prompts of the earlier step.
        how: what that step did with them, for the sentence.
        verb: what they are wanted for now.

    Raises:
        PromptsUnusable: some were, with their count.
    """
    used = set(used)
    shared = sum(fingerprint(prompt) in used for prompt in prompts)
    if shared:
        raise PromptsUnusable(f"{title}: {shared} of {len(prompts)} prompts {how}; {verb} on held-out ones")


def require_held_out_of(
    folder: Path, manifest: Manifest, title: str, prompts: Sequence[LabelledPrompt], verb: str
) -> None:
    """No prompt is one that the guard in `folder` was made from: neither a calibration prompt nor an anchor.

    Args:
        folder, manifest: the guarded folder.
        title, verb: as for `require_held_out`.

    Raises:
        PromptsUnusable: some are, with their count.
        DirectionMismatch: the folder's directions cannot be read.
    """
    kept = [(record or {}).get("prompt_fingerprints", ()) for record in (manifest.calibration, manifest.choice)]
    calibrated = [mark for marks in kept for mark in marks]
    require_held_out(title, prompts, calibrated, "were calibrated on", verb)
    file = folder / DIRECTIONS_FILE
    anchors = (read_directions(file).anchors or {}) if file.is_file() else {}
    how = "are anchors that the directions were extracted from"
    require_held_out(title, prompts, anchors.get("fingerprints", ()), how, verb)
