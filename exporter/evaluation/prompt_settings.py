"""Chooses an evaluation's prompts and the settings of each: as text, with a blank picture, with another picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...graphs.errors import PromptsUnusable
from ..prompts.formats import Setting
from ..prompts.labelled import LabelledPrompt, PromptSet, Sources, listed, read_set

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def shown_prompts(sources: Sources, images: Sequence[Path | str] = ()) -> list[LabelledPrompt]:
    """The prompts of some sources, each in the settings to run.

    Prompts of a source with settings keep them. All others run as text, with a blank picture, and with the given pictures in
    turn. Sources with splits contribute their split `test`.

    Args:
        sources: sources of labelled prompts.
        images: picture files, or folders with pictures.

    Raises:
        PromptsUnusable: as `read_set`; a picture is missing.
    """
    pictures = _pictures(images)
    read = [read_set(name, "test") for name in listed(sources)]
    if pictures and all(found.placed for found in read):
        names = ", ".join(listed(sources))
        raise PromptsUnusable(f"{names}: sets the picture of each prompt, so --image has no effect; leave it out")
    sets = [_shown(found, pictures) for found in read]
    if len(sets) == 1:
        return sets[0]
    # ids are unique in their own set only
    return [replace(row, id=f"{number}-{row.id}") for number, rows in enumerate(sets, 1) for row in rows]


def _shown(found: PromptSet, pictures: Sequence[Path]) -> list[LabelledPrompt]:
    if found.placed:
        return list(found.prompts)
    settings: list[Setting] = ["text", "blank"]
    if pictures:
        settings.append("image")
    return [
        replace(
            prompt,
            id=f"{prompt.id}-{setting}",
            setting=setting,
            image=pictures[number % len(pictures)] if setting == "image" else None,
        )
        for setting in settings
        for number, prompt in enumerate(found.prompts)
    ]


def _pictures(images: Sequence[Path | str]) -> list[Path]:
    found: list[Path] = []
    for path in map(Path, images):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
            if not inside:
                raise PromptsUnusable(f"{path}: holds no pictures ({', '.join(_SUFFIXES)}); name another folder")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise PromptsUnusable(f"{path}: no such picture; name a file, or a folder of them")
    return found
