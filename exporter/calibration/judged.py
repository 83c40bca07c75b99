"""The prompts that a guard is judged by: some harmful and harmless texts, each alone and beside images.

The yardstick is the model's own language model: with an image the guarded model should refuse what the text-only model
refuses, and nothing else. So every text is asked alone, and again in each setting:

- `blank` and `noise`: a white picture, and random pixels;
- `image`: the picture that a calibration prompt names;
- `calibration image`: the user's pictures (`--calibration-image`), dealt out among the texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ...runtime.generation import Request
from ...runtime.images.images import open_image
from ...runtime.vlm import VisionLanguageModel
from ..prompts.labelled import LabelledPrompt

MOST_PER_LABEL = 12  # prompts of each setting
_MOST_TEXTS = 24  # harmful ones that are asked alone, to find those that are refused
USERS_IMAGES = "calibration image"
_SEED = 0


@dataclass(frozen=True)
class Text:
    """One text.

    Attributes:
        prompt: the text.
        harmful: whether the text itself shows harm.
    """

    prompt: str
    harmful: bool


@dataclass(frozen=True)
class Setting:
    """Texts beside images.

    Attributes:
        name: of the setting.
        texts: index of each row's text.
        requests: each row's text with its image.
    """

    name: str
    texts: tuple[int, ...]
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class JudgedPrompts:
    """What is asked.

    Attributes:
        texts: asked alone.
        settings: the same texts beside images.
        source: where the prompts are from.
        prompts: the labelled prompts that were taken.
    """

    texts: tuple[Text, ...]
    settings: tuple[Setting, ...]
    source: str
    prompts: tuple[LabelledPrompt, ...]

    def shown(self, setting: Setting) -> int:
        """The most prompts that `chosen` asks in a setting."""
        harmful = sum(self.texts[at].harmful for at in setting.texts)
        return min(harmful, MOST_PER_LABEL) + len(setting.texts) - harmful

    def chosen(self, setting: Setting, refused: Sequence[bool]) -> Setting:
        """The setting with the harmful texts that are refused alone, `MOST_PER_LABEL` at most, and all harmless ones.

        Args:
            refused: whether each text is.
        """
        harmful = [row for row, at in enumerate(setting.texts) if self.texts[at].harmful and refused[at]]
        harmless = [row for row, at in enumerate(setting.texts) if not self.texts[at].harmful]
        rows = [*harmful[:MOST_PER_LABEL], *harmless]
        return Setting(
            setting.name, tuple(setting.texts[row] for row in rows), tuple(setting.requests[row] for row in rows)
        )

    def labelled(self, harmful: bool) -> list[int]:
        """Indices of the texts with one label."""
        return [number for number, text in enumerate(self.texts) if text.harmful == harmful]


def judged_prompts(
    prompts: Sequence[LabelledPrompt], model: VisionLanguageModel, images: Sequence[Path], source: str
) -> JudgedPrompts:
    """Choose texts and settings from calibration prompts.

    Args:
        prompts: labelled; prompts whose harm is in the picture alone are left out.
        model: takes images.
        images: the user's pictures.
        source: where the prompts are from.
    """
    judged = [prompt for prompt in prompts if prompt.label != "harmful" or prompt.harmful_as_text]
    shared = _spread(prompt for prompt in judged if prompt.setting in ("text", "blank"))
    pictured = _spread(prompt for prompt in judged if prompt.setting == "image" and prompt.image is not None)
    texts = list(dict.fromkeys(Text(prompt.prompt, prompt.label == "harmful") for prompt in (*shared, *pictured)))
    place = {text: number for number, text in enumerate(texts)}
    rows = [place[Text(prompt.prompt, prompt.label == "harmful")] for prompt in shared] or list(range(len(texts)))
    blank = model.blank_image()
    beside: list[tuple[str, list[int], list[Image.Image | Path | None]]] = [
        ("blank", rows, [blank] * len(rows)),
        ("noise", rows, [_noise(blank.size, number) for number in range(len(rows))]),
    ]
    if pictured:
        own = [place[Text(prompt.prompt, prompt.label == "harmful")] for prompt in pictured]
        beside.append(("image", own, [prompt.image for prompt in pictured]))
    if images:
        beside.append((USERS_IMAGES, rows, [images[number % len(images)] for number in range(len(rows))]))
    settings = tuple(
        Setting(name, tuple(own), tuple(Request(texts[at].prompt, image) for at, image in zip(own, shown, strict=True)))
        for name, own, shown in beside
    )
    return JudgedPrompts(tuple(texts), settings, source, (*shared, *pictured))


def readable_images(paths: Sequence[Path | str]) -> tuple[Path, ...]:
    """The user's pictures, absolute; raises `GuardError` for one that cannot be opened."""
    for path in paths:
        open_image(Path(path))
    return tuple(Path(path).absolute() for path in paths)


def beside_images(prompts: Sequence[LabelledPrompt], images: Sequence[Path]) -> list[LabelledPrompt]:
    """The prompts, and each text-only one of them once more beside one of the user's pictures."""
    alone = [prompt for prompt in prompts if prompt.setting == "text"] if images else []
    shown = [
        replace(prompt, id=f"{prompt.id}-image", setting="image", image=images[number % len(images)])
        for number, prompt in enumerate(alone)
    ]
    return [*prompts, *shown]


def _spread(prompts: Iterable[LabelledPrompt]) -> list[LabelledPrompt]:
    """Some of each label, each text once, from the beginning of the set to its end."""
    unique = list({(prompt.prompt, prompt.label == "harmful"): prompt for prompt in prompts}.values())
    chosen = []
    for harmful, most in ((True, _MOST_TEXTS), (False, MOST_PER_LABEL)):
        kind = [prompt for prompt in unique if (prompt.label == "harmful") == harmful]
        at = np.linspace(0, len(kind) - 1, min(most, len(kind))).round().astype(int)
        chosen += [kind[number] for number in at]
    return chosen


def _noise(size: tuple[int, int], number: int) -> Image.Image:
    """A picture of random pixels, another one for each number."""
    pixels = np.random.default_rng([_SEED, number]).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)
