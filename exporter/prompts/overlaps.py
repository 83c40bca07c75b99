"""Finds prompts that are in two sets: prompts used for extraction or calibration must not be used for evaluation."""

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
    """Require that an earlier step used none of the prompts.

    Args:
        title: name of the source of the prompts.
        prompts: the prompts of this step.
        used: fingerprints of the prompts of the earlier step.
        how: the earlier use, for the error message.
        verb: the use now, for the error message.

    Raises:
        PromptsUnusable: the earlier step used some of them; the message has the number.
    """
    used = set(used)
    shared = sum(fingerprint(prompt) in used for prompt in prompts)
    if shared:
        raise PromptsUnusable(f"{title}: {shared} of {len(prompts)} prompts {how}; {verb} on held-out ones")


def require_held_out_of(
    folder: Path, manifest: Manifest, title: str, prompts: Sequence[LabelledPrompt], verb: str
) -> None:
    """Require that the guard in `folder` was neither calibrated on nor extracted from any of the prompts.

    Args:
        folder, manifest: the guarded folder.
        title, prompts, verb: as for `require_held_out`.

    Raises:
        PromptsUnusable: it used some of them; the message has the number.
        DirectionMismatch: the folder's directions cannot be read.
    """
    kept = [record.get("prompt_fingerprints", ()) for record in manifest.calibrations]
    calibrated = [mark for marks in kept for mark in marks]
    require_held_out(title, prompts, calibrated, "were calibrated on", verb)
    file = folder / DIRECTIONS_FILE
    anchors = (read_directions(file).anchors or {}) if file.is_file() else {}
    how = "are anchors that the directions were extracted from"
    require_held_out(title, prompts, anchors.get("fingerprints", ()), how, verb)
