"""docs/families.md from the rows of `all_types`: what works, then what does not and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from families.one_type import TypeRow

_HEAD = """# Model families

Every image-text-to-text type of transformers, from a small random checkpoint. `make families` writes this file; do not edit.

A type counts as guarded when its checkpoint is exported, the export agrees with torch (pictures of several sizes, a batch of
two prompts with padding, eight decode steps), its decoder layers are found, and a guarded folder is proved and verified.
*Picture* means that the light runtime prepares a picture and describes it without torch.
"""


def page(rows: Sequence[TypeRow]) -> str:
    """The document, types in alphabetical order."""
    rows = sorted(rows, key=lambda row: row.type)
    guarded = [row for row in rows if row.guarded]
    others = [row for row in rows if not row.guarded]
    seen = sum(row.picture.startswith("yes") for row in guarded)
    versions = ", ".join(sorted({row.transformers for row in rows if row.transformers}))
    lines = [
        _HEAD,
        f"{len(rows)} types (transformers {versions}): {len(guarded)} exported with parity, guarded and verified, "
        f"{seen} of them with a picture.\n",
        "| type | export | parity | layers | guard | picture |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_guarded(row) for row in guarded),
        "\n## Not guarded\n",
        "| type | parity | layers | reason |",
        "| --- | --- | --- | --- |",
        *(_other(row) for row in others),
    ]
    return "\n".join(lines) + "\n"


def _guarded(row: TypeRow) -> str:
    parity = f"{row.parity:.0e}" if row.parity is not None else "-"
    return f"| {row.type} | {row.export} | {parity} | {row.anatomy} | {row.guard}, verified | {_cell(row.picture)} |"


def _other(row: TypeRow) -> str:
    parity = f"{row.parity:.0e}" if row.parity is not None else "-"
    return f"| {row.type} | {parity} | {row.anatomy or '-'} | {_cell(row.reason) or '-'} |"


def _cell(text: str) -> str:
    """Text that a table of Markdown can hold."""
    flat = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return flat if len(flat) <= 240 else f"{flat[:240]}..."
