"""docs/families.md from the rows of `all_types`: what works, then what does not and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from families.shipped_types import shippers

if TYPE_CHECKING:
    from families.one_type import TypeRow

_HEAD = """# Model families

Every image-text-to-text type of transformers, from a small random checkpoint. `make families` writes this file; do not edit.

A type counts as guarded when its checkpoint is exported, the export agrees with torch (pictures of several sizes, a batch of
two prompts with padding, eight decode steps), its decoder layers are found, and a guarded folder is proved and verified.
*Picture* means that the light runtime prepares a picture and describes it without torch; *with torchvision* means that
transformers has the image processor for torchvision only, which the user then installs with torch (docs/pictures.md).

FastVLM, Gemma 3n and PerceptionLM have vision encoders of timm: install `timm` and `torchvision` to export their checkpoints.
`make families` installs both, in the versions of `requirements/families.txt`.
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
        *_shipped(rows),
    ]
    return "\n".join(lines) + "\n"


def _shipped(rows: Sequence[TypeRow]) -> list[str]:
    """The types that runtimes ship: how many are guarded, and which."""
    known = [(row, shippers(row.type)) for row in rows if shippers(row.type)]
    if not known:
        return []
    return [
        "\n## Shipped by transformers.js, onnxruntime-genai or OpenVINO\n",
        f"{len(known)} types, {sum(row.guarded for row, _ in known)} of them guarded.\n",
        "Sources: transformers.js's registry.js, the architectures of onnxruntime-genai's model builder, optimum-intel's list",
        "of supported models and OpenVINO GenAI's table of VLMs (`tests/families/shipped_types.py`).\n",
        "| type | shipped by | guarded |",
        "| --- | --- | --- |",
        *(f"| {row.type} | {by} | {'yes' if row.guarded else 'no'} |" for row, by in known),
    ]


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
