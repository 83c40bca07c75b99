"""Chooses a report's prompts: held-out prompts, at most a given number per kind, in the settings that the model supports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...exporter.evaluation.evaluate import EVALUATION_FILES
from ...exporter.prompts.formats import LABELS
from ...exporter.prompts.labelled import PAIRED_LABELS, LabelledPrompt, find_file, read_prompts
from ...exporter.prompts.overlaps import require_held_out_of
from ...exporter.prompts.thinning import by_setting_and_label
from ...graphs.errors import GuardError, PromptsUnusable
from ...runtime.images.open_picture import open_image
from .subject import Subject


def choose_prompts(
    subject: Subject, path: Path | None, image: Path | None, most: int
) -> tuple[Path, list[LabelledPrompt]]:
    """Return the prompts file and the prompts to run, by setting and label; borderline prompts only if the file has some.

    Args:
        subject: the model of the report.
        path: labelled prompts; `None`: the file found beside the source or the guarded folder.
        image: a picture to show with every text prompt, in place of the file's own pictures.
        most: of each setting and label; more than that are thinned out evenly, because files are often sorted.

    Raises:
        PromptsUnusable: none are found or fit, one label is missing, or the guard was made from some.
    """
    if most < 2:
        raise GuardError(f"{most} prompts of each kind are too few; choose 2 or more")
    homes = [subject.folder] if subject.source is None else [subject.source.root, subject.folder]
    file = path or next(filter(None, (find_file(home, EVALUATION_FILES) for home in homes)), None)
    if file is None:
        raise PromptsUnusable(f"{subject.folder}: no prompts were given or found; give --prompts with labelled prompts")
    rows = read_prompts(file)
    sees = subject.guarded.sees and subject.unguarded.sees
    if image is not None and not sees:
        raise GuardError(f"--image {image} was given, but {subject.folder.name} takes no images; leave it out")
    if image is not None:
        open_image(image)  # before minutes of work
    rows = in_settings(rows, sees, image)
    require_held_out_of(subject.folder, subject.manifest, str(file), rows, "report")
    chosen = by_setting_and_label(rows, most, LABELS)
    for label in PAIRED_LABELS:
        if not any(row.label == label for row in chosen):
            raise PromptsUnusable(f"{file}: holds no {label} prompt that this model accepts; a report compares both")
    return file, chosen


def in_settings(rows: Sequence[LabelledPrompt], sees: bool, image: Path | None) -> list[LabelledPrompt]:
    """The prompts in the settings that the model has.

    Where the file has no blank-image prompts of its own, its text prompts are shown with a blank image too: the paper's
    figure 2 is about the same words without and with an image.
    """
    texts = [row for row in rows if row.setting == "text"]
    if not sees:
        return texts
    kept = [row for row in rows if image is None or row.setting != "image"]
    if not any(row.setting == "blank" for row in rows):
        kept += [replace(row, id=f"{row.id}-blank", setting="blank") for row in texts]
    if image is not None:
        kept += [replace(row, id=f"{row.id}-image", setting="image", image=image) for row in texts]
    return kept
