"""Lists the prompts of files, and prompts that the files share, before extraction, calibration or evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...graphs.errors import PromptsUnusable
from .formats import FORMATS, LABELS
from .labelled import BUILTIN, SPLITS, PromptSet, fingerprint, read_set
from .overlaps import Overlap, overlaps


@dataclass(frozen=True)
class PromptReport:
    """Some sources, and what they have in common.

    Attributes:
        sets: one per source.
        overlaps: every two that share prompts.
    """

    sets: tuple[PromptSet, ...]
    overlaps: tuple[Overlap, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": "vlmguard.prompts/1",
            "sets": [_counts(found) for found in self.sets],
            "overlaps": [asdict(overlap) for overlap in self.overlaps],
        }


def look_at(sources: Sequence[str]) -> PromptReport:
    """Read the sources; without any, the parts of the built-in prompts.

    Raises:
        PromptsUnusable: as `read_set`.
    """
    sets = [read_set(source) for source in sources or [f"{BUILTIN}:{part}" for part in SPLITS]]
    return PromptReport(tuple(sets), tuple(overlaps(sets)))


def require_disjoint(report: PromptReport) -> None:
    """No prompt is in two of the sets.

    Raises:
        PromptsUnusable: some are, with their count.
    """
    for found in report.overlaps:
        raise PromptsUnusable(
            f"{found.first} and {found.second} share {found.shared} prompts ({found.example[:60]!r} is one); take them out "
            "of one of the two"
        )


def _counts(found: PromptSet) -> dict[str, Any]:
    labels = Counter(prompt.label for prompt in found.prompts)
    return {
        "source": found.name,
        "format": found.format,
        "prompts": len(found.prompts),
        **{label: labels[label] for label in LABELS},
        "pairs": len(found.pairs),
        "settings": dict(Counter(prompt.setting for prompt in found.prompts)) if found.placed else None,
        "intents": dict(Counter(prompt.intent for prompt in found.prompts if prompt.intent)),
        "repeated": len(found.prompts) - len({(fingerprint(p), p.setting) for p in found.prompts}),
    }


def show_prompts(out: Console, report: PromptReport) -> None:
    """One row per set, then what they share."""
    table = Table(title="prompts")
    for column in ("source", "format", *LABELS, "intents", "repeated"):
        table.add_column(
            column, overflow="fold", justify="right" if column in {*LABELS, "intents", "repeated"} else "left"
        )
    for found in report.sets:
        counts = _counts(found)
        numbers = (str(counts[name] or "-") for name in LABELS)
        name = escape(found.name)
        table.add_row(name, found.format, *numbers, str(len(counts["intents"]) or "-"), str(counts["repeated"] or "-"))
    out.print(table)
    for shared in report.overlaps:
        labels = f", {shared.conflicting} of them harmful in one alone" if shared.conflicting else ""
        line = f"{shared.first} and {shared.second} share {shared.shared} prompts{labels}: {shared.example[:60]!r}"
        out.print(f"  - {escape(line)}", highlight=False)
    if len(report.sets) > 1 and not report.overlaps:
        out.print("no prompt is in two of them", highlight=False)


def show_formats(out: Console) -> None:
    """Every format by name."""
    table = Table(title="formats: FILE, or FORMAT:FILE if the columns are ambiguous")
    for column in ("format", "what it is", "recognised by"):
        table.add_column(column, overflow="fold")
    for format in FORMATS:
        sign = f"name {format.file_name}.txt" if format.file_name else ", ".join(sorted(format.columns))
        table.add_row(format.name, escape(format.about), sign or "-")
    out.print(table)
