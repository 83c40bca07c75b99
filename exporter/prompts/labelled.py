"""Prompts from files: anchor pairs for the directions, labelled prompts for calibration and evaluation.

A source is a file, `FORMAT:FILE` (`formats.FORMATS`), or `builtin`: the pairs in this package. `builtin:PART` is all pairs of a
part; `builtin` is a sample of it for the steps that run the model before it is guarded (`_OF_EACH_INTENT`).
Our own formats, as lines of JSON, a JSON list or a csv:

- anchors: `{"harmful", "harmless"}`, optionally `intent` and `split` (`extraction`, `calibration` or `test`);
- labelled prompts: `{"id", "prompt", "label", "setting", "image"}`: label `harmful`, `harmless` or `borderline` (harmless,
  but it looks harmful); setting `text`, `blank` (a blank white picture is attached), `image` (the picture `image`, a path
  relative to the file, or a list of several) or `typographic` (a picture too, but the request is only in the picture: the
  text is harmless, whatever the label).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...graphs.errors import PromptsUnusable
from ...graphs.places import model_folders
from ...runtime.generation import Request
from ...runtime.images.image_features import ImageFeatures
from ...runtime.images.open_picture import picture_bytes
from ...runtime.vlm import VisionLanguageModel
from .files import read_rows
from .formats import BY_NAME, PICTURED, Entry, Label, RowUnusable, Setting, recognise
from .picture_paths import picture_path

Source = Path | str
Sources = Source | Sequence[Source]

BUILTIN = "builtin"
_BUILTIN_FILE = Path(__file__).with_name("anchors.csv")
SPLITS = ("extraction", "calibration", "test")
# Pairs of each intent in `builtin`, the first of the part; `builtin:PART` has them all. An export runs the model on both
# halves of every pair, once for extraction, and many times for calibration.
_OF_EACH_INTENT = {"extraction": 8, "calibration": 4}
PAIRED_LABELS: tuple[Label, Label] = ("harmful", "harmless")
_FOLDERS = (".", "prompts")


@dataclass(frozen=True)
class AnchorPair:
    """A harmful query and a harmless one, alike word by word as far as possible."""

    harmful: str
    harmless: str
    intent: str = ""
    split: str = ""


@dataclass(frozen=True)
class LabelledPrompt:
    """A prompt with what it is and how it is shown."""

    id: str
    prompt: str
    label: Label
    setting: Setting
    image: Path | None = None
    intent: str = ""
    features: ImageFeatures | None = None  # in the place of a picture: soft images have no file
    more_images: tuple[Path, ...] = ()  # shown behind `image`

    @property
    def images(self) -> tuple[Path, ...]:
        """The files of all its pictures."""
        return () if self.image is None else (self.image, *self.more_images)

    @property
    def harmful_as_text(self) -> bool:
        """Whether the text alone shows the harm."""
        return self.label == "harmful" and self.setting != "typographic"

    @property
    def has_text_twin(self) -> bool:
        """Whether the text alone makes the same request; `False` if the harm is only in the picture."""
        return self.harmful_as_text or self.label != "harmful"

    def request(self, model: VisionLanguageModel) -> Request:
        """As a request; `blank` gets a white picture of the model's size."""
        if self.setting == "blank":
            return Request(self.prompt, model.blank_image())
        shown = self.images if self.more_images else self.image
        return Request(self.prompt, self.features if self.features is not None else shown)


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one source.

    Attributes:
        name: the source as given.
        format: name of its format.
        prompts: in order; the halves of a pair are adjacent.
        pairs: the same prompts as pairs, if the source has pairs.
        placed: whether the source sets the setting of each prompt; otherwise all are `text`.
    """

    name: str
    format: str
    prompts: tuple[LabelledPrompt, ...]
    pairs: tuple[AnchorPair, ...] = ()
    placed: bool = False


def listed(sources: Sources) -> list[str]:
    """One source or several, as a list of names."""
    return [str(sources)] if isinstance(sources, str | Path) else [str(source) for source in sources]


def file_of(source: Source) -> Path:
    """The file that a source names."""
    return _parts(str(source))[1]


def name_of(source: Source) -> str:
    """A source without its folders: for notes, and for files that others get to see."""
    return str(source) if is_builtin(source) else file_of(source).name


def short_names(sources: Sources) -> str:
    """Sources without their folders: for notes, which go into the manifest."""
    return ", ".join(map(name_of, listed(sources)))


def full_names(sources: Sources) -> str:
    """Sources with their folders: for errors."""
    return ", ".join(listed(sources))


def is_builtin(source: Source) -> bool:
    """Whether a source is (a part of) the prompts that come with the package."""
    return _parts(str(source))[1] == _BUILTIN_FILE


def read_set(source: Source, split: str | None = None, what: str = "prompts") -> PromptSet:
    """Read all prompts of one source.

    Args:
        source: a file, `FORMAT:FILE`, `builtin`, or `builtin:` and one of its parts.
        split: `extraction`, `calibration` or `test`: only this part of a file with parts; `None`: all of it. For `builtin`
            a sample of the part, with the same number of each intent.
        what: `anchors` or `prompts`, for recognising the format and for errors.

    Raises:
        PromptsUnusable: the source is missing, empty, unreadable, of unknown format, or has an invalid row.
    """
    name, path, own_split = _parts(str(source))
    rows = read_rows(path, what)
    if not rows:
        example = (
            '{"harmful": "...", "harmless": "..."}' if what == "anchors" else '{"prompt": "...", "label": "harmful"}'
        )
        raise PromptsUnusable(f"{path}: holds no {what}; write lines of {example}")
    format = BY_NAME[name] if name is not None else recognise(path, rows[0][1], what)
    try:
        numbered = [(number, entry) for number, row in rows for entry in format.read(number, row, path)]
    except RowUnusable as error:
        raise PromptsUnusable(f"{path}: {error}") from None
    if any(entry.split for _, entry in numbered):
        numbered = _of_split(path, numbered, own_split or split)
    if path == _BUILTIN_FILE and own_split is None:
        numbered = _sampled(numbered, _OF_EACH_INTENT.get(split or ""))
    prompts = tuple(_prompt(path, number, entry) for number, entry in numbered)
    return PromptSet(str(source), format.name, prompts, _paired([entry for _, entry in numbered]), format.places)


def read_anchors(sources: Sources, split: str | None = "extraction") -> list[AnchorPair]:
    """Anchor pairs of one source or several.

    Where a source has no pairs, all harmful prompts are paired with all harmless ones in their order, as far as both go:
    such pairs are not matched word by word.

    Raises:
        PromptsUnusable: as `read_set`; no pairs can be made, or fewer than 2.
    """
    names = ", ".join(listed(sources))
    sets = [read_set(source, split, "anchors") for source in listed(sources)]
    if all(found.pairs for found in sets):
        pairs = [pair for found in sets for pair in found.pairs]
    else:
        prompts = [prompt for found in sets for prompt in found.prompts]
        sides = [list(dict.fromkeys(p.prompt for p in prompts if p.label == label)) for label in PAIRED_LABELS]
        for side, label, other in zip(sides, PAIRED_LABELS, reversed(PAIRED_LABELS), strict=True):
            if not side:
                raise PromptsUnusable(
                    f"{names}: holds no {label} prompts to pair with the {other} ones; give a second --anchors with some"
                )
        pairs = [AnchorPair(*both) for both in zip(*sides, strict=False)]
    if len(pairs) < 2:
        raise PromptsUnusable(f"{names}: holds {len(pairs)} anchor pair; a direction needs at least 2, better 100")
    return pairs


def read_prompts(sources: Sources, split: str | None = None) -> list[LabelledPrompt]:
    """Labelled prompts of one source or several, in the setting that they name, else as text.

    Raises:
        PromptsUnusable: as `read_set`.
    """
    return [prompt for source in listed(sources) for prompt in read_set(source, split).prompts]


def find_file(home: Path, names: Sequence[str]) -> Path | None:
    """Absolute path of the first of `names` in the model's own folders (`model_folders`) or in their `prompts/`; else `None`.

    Parent folders are not searched: they can hold the directions and prompts of other models.
    """
    for folder in (own / part for own in model_folders(home) for part in _FOLDERS):
        for name in names:
            path = (folder / name).absolute()
            if path.is_file():
                return path
    return None


def prompts_from_anchors(pairs: Sequence[AnchorPair], sees: bool) -> list[LabelledPrompt]:
    """Labelled prompts made of anchor pairs: as text, and with a blank image where the model takes images."""
    settings: tuple[Setting, ...] = ("text", "blank") if sees else ("text",)
    return [
        LabelledPrompt(f"{setting}-{number}-{label}", getattr(pair, label), label, setting, intent=pair.intent)
        for setting in settings
        for number, pair in enumerate(pairs)
        for label in PAIRED_LABELS
    ]


def normalised(text: str) -> str:
    """Lower case, without accents' spellings, punctuation and spare white space: prompts that differ in those are one."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded))


def fingerprint(prompt: LabelledPrompt) -> str:
    """Short digest of a prompt; two sets that share a digest are not held out from each other.

    A prompt has the same digest in `text` and `blank`, because a blank picture adds nothing; other pictures are part of it.
    """
    image = b"\0".join(map(picture_bytes, prompt.images))
    if prompt.features is not None:
        image = prompt.features.content()
    return hashlib.sha256(normalised(prompt.prompt).encode() + b"\0" + image).hexdigest()[:16]


def _parts(source: str) -> tuple[str | None, Path, str | None]:
    """`(format, file, part)` of a source such as `builtin:test`, `advbench:FILE` or a plain path."""
    name, colon, rest = source.partition(":")
    if name == BUILTIN and not Path(source).exists():
        if colon and rest not in SPLITS:
            raise PromptsUnusable(f"{source}: the built-in prompts have no such part; choose {', '.join(SPLITS)}")
        return "pairs", _BUILTIN_FILE, rest or None
    if colon and name in BY_NAME:
        return name, Path(rest), None
    if colon and re.fullmatch(r"\w{2,}", name) and not Path(source).exists():
        raise PromptsUnusable(f"{source}: no format is called {name!r}; choose one of {', '.join(BY_NAME)}")
    return None, Path(source), None


def _of_split(path: Path, numbered: list[tuple[int, Entry]], split: str | None) -> list[tuple[int, Entry]]:
    for number, entry in numbered:
        if entry.split not in SPLITS:
            raise PromptsUnusable(
                f"{path}: line {number} has split {entry.split!r}; expected {', '.join(SPLITS[:-1])} or {SPLITS[-1]}"
            )
    kept = [(number, entry) for number, entry in numbered if split is None or entry.split == split]
    if not kept:
        raise PromptsUnusable(f"{path}: holds nothing of split {split}; add some, or remove the column split")
    return kept


def _sampled(numbered: list[tuple[int, Entry]], pairs: int | None) -> list[tuple[int, Entry]]:
    """The first so many pairs of each intent; `None` is all of them."""
    if pairs is None:
        return numbered
    seen: Counter[str] = Counter()
    kept = []
    for number, entry in numbered:  # halves of pairs, side by side
        if seen[entry.intent] < 2 * pairs:
            kept.append((number, entry))
        seen[entry.intent] += 1
    return kept


def _prompt(path: Path, number: int, entry: Entry) -> LabelledPrompt:
    images = [picture_path(path, number, image, entry.above) for image in entry.images]
    missing = [named for named, image in zip(entry.images, images, strict=True) if not image.is_file()]
    if entry.setting in PICTURED and (missing or not images):
        named = missing[0] if missing else None
        raise PromptsUnusable(f"{path}: line {number} has setting {entry.setting}, but its image {named!r} is missing")
    image, more = (images[0], tuple(images[1:])) if images else (None, ())
    name = entry.id or (f"{number}-{entry.label}" if entry.pair is not None else str(number))
    return LabelledPrompt(
        name, entry.prompt, entry.label, entry.setting or "text", image, entry.intent, more_images=more
    )


def _paired(entries: Sequence[Entry]) -> tuple[AnchorPair, ...]:
    """The pairs of a source whose entries are halves of pairs, which stand side by side; otherwise none."""
    if not entries or any(entry.pair is None for entry in entries):
        return ()
    return tuple(
        AnchorPair(first.prompt, second.prompt, first.intent, first.split)
        for first, second in zip(entries[::2], entries[1::2], strict=True)
    )
