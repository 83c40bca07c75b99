"""Prompts from files: anchor pairs for the directions, labelled prompts for calibration and evaluation.

Anchors, `.jsonl` (or a `.json` list) of `{"harmful": "...", "harmless": "..."}`, or `.csv` with those two columns.
Labelled prompts, `.jsonl` of `{"id", "prompt", "label", "setting", "image"}`: label `harmful` or `harmless`; setting
`text`, `blank` (a white picture is attached) or `image` (the picture `image`, a path relative to the file).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..graphs.errors import PromptsUnusable
from ..runtime.vlm import Request, VisionLanguageModel

Label = Literal["harmful", "harmless"]
Setting = Literal["text", "blank", "image"]
LABELS: tuple[str, ...] = get_args(Label)
SETTINGS: tuple[str, ...] = get_args(Setting)
_FOLDERS = (".", "prompts", "..", "../prompts")
_LARGEST_FILE = 256 << 20  # bytes


@dataclass(frozen=True)
class AnchorPair:
    """A harmful query and a harmless one, alike word by word as far as possible."""

    harmful: str
    harmless: str


@dataclass(frozen=True)
class LabelledPrompt:
    """A prompt with what it is and how it is shown."""

    id: str
    prompt: str
    label: Label
    setting: Setting
    image: Path | None = None

    def request(self, model: VisionLanguageModel) -> Request:
        """As a request; `blank` gets a white picture of the model's size."""
        if self.setting == "blank":
            return Request(self.prompt, model.blank_image())
        return Request(self.prompt, self.image)


def read_anchors(path: Path | str) -> list[AnchorPair]:
    """Anchor pairs of a file.

    Raises:
        PromptsUnusable: missing, empty, unreadable, or a line without its partner.
    """
    path = Path(path)
    pairs = []
    for number, row in _rows(path, "anchors"):
        texts = [row.get(label) for label in LABELS]
        for label, text, other in zip(LABELS, texts, reversed(LABELS), strict=True):
            if not isinstance(text, str) or not text.strip():
                raise PromptsUnusable(f"{path}: anchor {number} has no {label} prompt; pair each {other} one with one")
        pairs.append(AnchorPair(str(texts[0]).strip(), str(texts[1]).strip()))
    if not pairs:
        raise PromptsUnusable(f'{path}: holds no anchors; write lines of {{"harmful": "...", "harmless": "..."}}')
    if len(pairs) < 2:
        raise PromptsUnusable(f"{path}: holds {len(pairs)} anchor pair; a direction needs at least 2, better 100")
    return pairs


def read_prompts(path: Path | str) -> list[LabelledPrompt]:
    """Labelled prompts of a file.

    Raises:
        PromptsUnusable: missing, empty, unreadable, unknown label or setting, or an image that is not there.
    """
    path = Path(path)
    prompts = []
    for number, row in _rows(path, "prompts"):
        text, label, setting = row.get("prompt"), row.get("label"), row.get("setting", "text")
        if not isinstance(text, str) or not text.strip():
            raise PromptsUnusable(
                f"{path}: line {number} has no prompt; give each line a prompt, a label and a setting"
            )
        if label not in LABELS:
            raise PromptsUnusable(f"{path}: line {number} has label {label!r}; expected {' or '.join(LABELS)}")
        if setting not in SETTINGS:
            raise PromptsUnusable(f"{path}: line {number} has setting {setting!r}; expected {', '.join(SETTINGS)}")
        # Only where the setting says so: a picture beside a `text` prompt would be shown, and counted as text.
        image = path.parent / str(row["image"]) if setting == "image" and row.get("image") else None
        if setting == "image" and (image is None or not image.is_file()):
            raise PromptsUnusable(
                f"{path}: line {number} has setting image, but its image {row.get('image')!r} is missing"
            )
        prompts.append(LabelledPrompt(str(row.get("id", number)), text.strip(), label, setting, image))
    if not prompts:
        raise PromptsUnusable(f'{path}: holds no prompts; write lines of {{"prompt": "...", "label": "harmful"}}')
    return prompts


def find_file(home: Path, names: Sequence[str]) -> Path | None:
    """A prompts file that comes with a model: in its folder, in `prompts/`, or one level up."""
    for folder in _FOLDERS:
        for name in names:
            path = (home / folder / name).resolve()
            if path.is_file():
                return path
    return None


def prompts_from_anchors(pairs: Sequence[AnchorPair], sees: bool) -> list[LabelledPrompt]:
    """Labelled prompts made of anchor pairs: as text, and with a blank image where the model takes images."""
    settings: tuple[Setting, ...] = ("text", "blank") if sees else ("text",)
    return [
        LabelledPrompt(f"{setting}-{number}-{label}", getattr(pair, label), label, setting)
        for setting in settings
        for number, pair in enumerate(pairs)
        for label in ("harmful", "harmless")
    ]


def fingerprint(prompt: LabelledPrompt) -> str:
    """Short digest of what the model would see; two sets that share one are not held out from each other."""
    image = prompt.image.read_bytes() if prompt.image is not None else prompt.setting.encode()
    return hashlib.sha256(prompt.prompt.encode() + b"\0" + image).hexdigest()[:16]


def _rows(path: Path, what: str) -> list[tuple[int, dict[str, Any]]]:
    """`(line or record number from 1, record)`"""
    if not path.is_file():
        raise PromptsUnusable(f"{path}: no such {what} file; give one with lines of JSON, or a csv")
    if path.stat().st_size > _LARGEST_FILE:
        raise PromptsUnusable(f"{path}: {path.stat().st_size} bytes is too large for {what}; give a smaller file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptsUnusable(f"{path}: is not readable text ({error}); save it as UTF-8") from None
    try:
        if path.suffix.lower() == ".csv":
            return [(number, dict(row)) for number, row in enumerate(csv.DictReader(io.StringIO(text)), 1)]
        if path.suffix.lower() == ".json":
            rows = list(enumerate(json.loads(text), 1))
        else:
            rows = [(n, json.loads(line)) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    except csv.Error as error:
        raise PromptsUnusable(f"{path}: is not a csv that can be read ({error}); save it again as UTF-8") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise PromptsUnusable(f"{path}: is not lines of JSON ({error}); one object a line") from None
    for number, row in rows:
        if not isinstance(row, dict):
            raise PromptsUnusable(f"{path}: line {number} is {type(row).__name__}, expected an object")
    return rows
