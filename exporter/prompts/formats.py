"""Formats of public prompt sets, one row each: how to recognise a file, and how to read its rows.

A file is recognised by its columns; if several formats match, the one with the most columns wins. For plain lists without
labels the user names the label: `harmful:FILE`, `harmless:FILE` or `borderline:FILE`. The files keep their licences; none
of them is part of this project.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ...graphs.errors import PromptsUnusable
from .files import LINE, Row

Label = Literal["harmful", "harmless", "borderline"]
Setting = Literal["text", "blank", "image", "typographic"]
PICTURED: tuple[Setting, ...] = ("image", "typographic")  # those whose prompts name a picture of their own
LABELS: tuple[Label, ...] = get_args(Label)
SETTINGS: tuple[Setting, ...] = get_args(Setting)

# Columns that a plain list may keep its prompts in; the first that is there counts.
_TEXT_COLUMNS = (LINE, "prompt", "instruction", "goal", "Goal", "Behavior", "question", "Question", "query", "text")


@dataclass(frozen=True)
class Entry:
    """One prompt of a file.

    Attributes:
        prompt, label, intent: the text; `harmful`, `harmless` or `borderline`; the category.
        setting: how the prompt is shown, if the file has this column.
        images: paths of its pictures, relative to the file.
        above: number of folders between the file and its folder of pictures.
        id: the file's id of the prompt.
        split: its part of the file (`extraction`, `calibration`, `test`), if the file has parts.
        pair: number of its pair.
    """

    prompt: str
    label: Label
    intent: str = ""
    setting: Setting | None = None
    images: tuple[str, ...] = ()
    id: str | None = None
    split: str = ""
    pair: int | None = None
    above: int = 0


class RowUnusable(Exception):
    """A row lacks what its format requires; the message follows the file's name."""


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: the prefix in `name:FILE`.
        columns: a file with all of these columns has this format; empty: not recognised by columns.
        about: description for the user.
        read: `(number, row, file)` -> prompts of the row.
        file_name: a file with this name (lower case, without suffix) has this format.
        places: whether its rows have a setting.
    """

    name: str
    columns: frozenset[str]
    about: str
    read: Callable[[int, Row, Path], list[Entry]]
    file_name: str | None = None
    places: bool = False


def _pair(number: int, row: Row, path: Path) -> list[Entry]:
    halves: list[Entry] = []
    both: tuple[tuple[Label, Label], ...] = (("harmful", "harmless"), ("harmless", "harmful"))
    for label, other in both:
        text = row.get(label)
        if not isinstance(text, str) or not text.strip():
            raise RowUnusable(f"anchor {number} has no {label} prompt; pair each {other} one with one")
        halves.append(Entry(text.strip(), label, _word(row, "intent"), split=_word(row, "split"), pair=number))
    return halves


def _labelled(number: int, row: Row, path: Path) -> list[Entry]:
    text, setting = row.get("prompt"), row.get("setting", "text")
    label: Label | None = next((label for label in LABELS if label == row.get("label")), None)
    if not isinstance(text, str) or not text.strip():
        raise RowUnusable(f"line {number} has no prompt; give each line a prompt, a label and a setting")
    if label is None:
        expected = f"{', '.join(LABELS[:-1])} or {LABELS[-1]}"
        raise RowUnusable(f"line {number} has label {row.get('label')!r}; expected {expected}")
    if setting not in SETTINGS:
        raise RowUnusable(f"line {number} has setting {setting!r}; expected {', '.join(SETTINGS)}")
    # Only in settings with pictures: otherwise a picture would be shown with a prompt that counts as text.
    named = row.get("image") if setting in PICTURED else None
    images = tuple(map(str, named if isinstance(named, list) else [named] if named else []))
    return [
        Entry(text.strip(), label, _word(row, "intent"), setting, images, _optional(row, "id"), _word(row, "split"))
    ]


def _advbench(number: int, row: Row, path: Path) -> list[Entry]:
    return [Entry(_said(number, row, "goal"), "harmful")]


def _line(number: int, row: Row, path: Path) -> list[Entry]:
    return [Entry(_said(number, row, LINE), "harmful")]


def _harmbench(number: int, row: Row, path: Path) -> list[Entry]:
    """A contextual behaviour follows its context, as in HarmBench itself."""
    asked, context = _said(number, row, "Behavior"), _word(row, "ContextString")
    prompt = f"{context}\n\n---\n\n{asked}" if context else asked
    intent = _word(row, "SemanticCategory") or _word(row, "Category")
    name, image = str(row.get("BehaviorID") or number), row.get("ImageFileName")
    if not image:
        return [Entry(prompt, "harmful", intent, id=name)]
    places = ("", "images", "multimodal_behavior_images", "../multimodal_behavior_images")
    found = next((place for place in places if (path.parent / place / str(image)).is_file()), "")
    return [Entry(prompt, "harmful", intent, "image", (str(Path(found) / str(image)),), name, above=found.count(".."))]


def _jailbreakbench(number: int, row: Row, path: Path) -> list[Entry]:
    """Harmful and benign behaviours have the same columns; the benign ones are close to the harmful ones by intention."""
    label: Label = "borderline" if "benign" in path.name.lower() else "harmful"
    return [Entry(_said(number, row, "Goal"), label, _word(row, "Category"))]


def _xstest(number: int, row: Row, path: Path) -> list[Entry]:
    """Safe prompts that look harmful, and their contrasts that are; the second release marks the latter by type alone."""
    kind = _word(row, "type")
    unsafe = row["label"] == "unsafe" if row.get("label") in {"safe", "unsafe"} else kind.startswith("contrast_")
    label: Label = "harmful" if unsafe else "borderline"
    return [Entry(_said(number, row, "prompt"), label, kind.removeprefix("contrast_"), id=_optional(row, "id"))]


def _figstep(number: int, row: Row, path: Path) -> list[Entry]:
    """The question in words; the typographic pictures are not part of the table."""
    name = "-".join(str(row.get(part)) for part in ("dataset", "category_id", "task_id"))
    return [Entry(_said(number, row, "question"), "harmful", _word(row, "category_name"), id=name)]


def _mm_safetybench(number: int, row: Row, path: Path) -> list[Entry]:
    """The question as text; and, if the pictures are in their published folders, the rephrased question, whose subject is only
    in the picture."""
    scenario, name = path.stem, str(row.get("id", number))
    entries = [Entry(_said(number, row, "Question"), "harmful", scenario, "text", id=f"{name}-text")]
    picture = Path("imgs") / scenario / "SD_TYPO" / f"{name}.jpg"
    for place in (Path(), Path(".."), Path("../..")):
        if (path.parent / place / picture).is_file():
            prompt = _said(number, row, "Rephrased Question")
            shown = str(place / picture)
            above = len(place.parts)
            entries.append(
                Entry(prompt, "harmful", scenario, "typographic", (shown,), f"{name}-typographic", above=above)
            )
            break
    return entries


def _refusal_direction(number: int, row: Row, path: Path) -> list[Entry]:
    """`harmful_train.json`, `harmless_test.json`, ...: the label is in the file's name alone."""
    label: Label | None = next((label for label in LABELS if path.name.lower().startswith(label)), None)
    if label is None:
        raise RowUnusable(
            "its name begins neither with harmful nor with harmless, and nothing else determines the label; name it "
            "harmful:FILE or harmless:FILE"
        )
    return [Entry(_said(number, row, "instruction"), label, _word(row, "category"))]


def _plain(label: Label) -> Callable[[int, Row, Path], list[Entry]]:
    def read(number: int, row: Row, path: Path) -> list[Entry]:
        column = next((name for name in _TEXT_COLUMNS if name in row), None)
        if column is None and len(row) == 1:
            (column,) = row
        if column is None:
            raise RowUnusable(f"has columns {_listed(row)}, none of them is {_listed(_TEXT_COLUMNS[1:])}; rename one")
        return [Entry(_said(number, row, column), label, _word(row, "category") or _word(row, "intent"))]

    return read


# Who needs each row: the last three read any list of prompts, the first two are ours, the rest are published sets.
FORMATS = (
    Format("pairs", frozenset({"harmful", "harmless"}), "anchors: harmful, harmless (intent, split)", _pair),
    Format(
        "labelled", frozenset({"prompt", "label"}), "prompt, label (id, setting, image, intent)", _labelled, places=True
    ),
    Format("advbench", frozenset({"goal", "target"}), "AdvBench csv: harmful", _advbench),
    Format("malicious_instruct", frozenset(), "MaliciousInstruct txt: harmful", _line, file_name="maliciousinstruct"),
    Format(
        "harmbench", frozenset({"Behavior", "BehaviorID"}), "HarmBench csv: harmful, some with a picture", _harmbench
    ),
    Format(
        "jailbreakbench",
        frozenset({"Goal", "Target", "Behavior", "Category"}),
        "JailbreakBench csv: harmful; borderline if the file's name has `benign`",
        _jailbreakbench,
    ),
    Format("xstest", frozenset({"prompt", "type", "focus"}), "XSTest csv: borderline, and harmful contrasts", _xstest),
    Format(
        "figstep",
        frozenset({"category_id", "task_id", "category_name", "question"}),
        "FigStep SafeBench csv: harmful, as text",
        _figstep,
    ),
    Format(
        "mm_safetybench",
        frozenset({"Question", "Changed Question", "Rephrased Question"}),
        "MM-SafetyBench json: harmful; with imgs/SCENARIO/SD_TYPO also beside its pictures",
        _mm_safetybench,
        places=True,
    ),
    Format(
        "refusal_direction",
        frozenset({"instruction", "category"}),
        "refusal_direction json: harmful_*.json, harmless_*.json",
        _refusal_direction,
    ),
    Format("harmful", frozenset(), "a list of harmful prompts: txt, csv, json, jsonl", _plain("harmful")),
    Format("harmless", frozenset(), "a list of harmless prompts", _plain("harmless")),
    Format("borderline", frozenset(), "a list of harmless prompts that look harmful", _plain("borderline")),
)
BY_NAME: Mapping[str, Format] = {format.name: format for format in FORMATS}


def recognise(path: Path, row: Row, what: str) -> Format:
    """The format of a file, recognised by its first row.

    Args:
        path: the file.
        row: its first row.
        what: `anchors` or `prompts`: a file with half of the columns of our own format is read as that format, so that an
            error names the incomplete row.

    Raises:
        PromptsUnusable: unknown format, or a list without a label.
    """
    named = next((format for format in FORMATS if format.file_name == path.stem.lower()), None)
    if named is not None:
        return named
    fitting = [format for format in FORMATS if format.columns and format.columns <= row.keys()]
    if fitting:
        return max(fitting, key=lambda format: len(format.columns))
    own = BY_NAME["pairs" if what == "anchors" else "labelled"]
    if own.columns & row.keys():
        return own
    if LINE in row:
        raise PromptsUnusable(f"{path}: has no labels; name it harmful:FILE, harmless:FILE or borderline:FILE")
    raise PromptsUnusable(
        f"{path}: has columns {_listed(row)}, which are no known format; name it harmful:FILE, harmless:FILE or "
        "borderline:FILE, or see `vlmguard prompts`"
    )


def _said(number: int, row: Row, column: str) -> str:
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise RowUnusable(f"line {number} has no {column}; remove it, or fill it in")
    return text.strip()


def _word(row: Row, column: str) -> str:
    """Text of a cell; "" if it is empty or missing."""
    return str(row.get(column) or "").strip()


def _optional(row: Row, column: str) -> str | None:
    return str(row[column]) if column in row else None


def _listed(names: Any) -> str:
    return ", ".join(str(name) or "''" for name in names)
