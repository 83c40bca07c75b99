"""The table of docs/runtimes.md, from what the integrations wrote (`build/integrations/*.json`, form: `replay.py`).

    python -m integrations.results           # write the table; exit 1 if a runtime that ran does not agree
    python -m integrations.results --check   # compare, write nothing

A folder of `integrations/` whose result is not there stands in the table as "not run". No figure was typed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from integrations.replay import BUILD, Agreement

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "runtimes.md"
BEGIN, END = "<!-- begin: integrations/results.py -->", "<!-- end: integrations/results.py -->"
MODES = ("project", "steer", "supervise", "restore", "combined", "align")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="compare with the page; write nothing")
    check = options.parse_args().check
    results = read_results()
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    new = before + "\n".join([BEGIN, *table(results), END]) + after
    if check:
        print("docs/runtimes.md is up to date" if new == page else "docs/runtimes.md has other results; run results.py")
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    differing = [one["runtime"] for found in results.values() for one in found or () if not _agrees(one)]
    if differing:
        print(f"not the same as onnxruntime on the CPU: {', '.join(differing)}", file=sys.stderr)
    return int(bool(differing))


def read_results(build: Path = BUILD, folder: Path = HERE) -> dict[str, list[Mapping[str, Any]] | None]:
    """Integration -> what it wrote, one entry per runtime; `None`: it was not run."""
    names = sorted(path.parent.name for path in folder.glob("*/run.sh"))
    return {name: list(_read(build / f"{name}.json")) or None for name in names}


def _read(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        yield from content if isinstance(content, list) else [content]


def table(results: Mapping[str, list[Mapping[str, Any]] | None]) -> list[str]:
    """Markdown: a row per runtime."""
    columns = [
        "runtime",
        "version",
        "modes that work",
        "precision",
        "pictures",
        "same tokens",
        "largest difference",
        "command",
        "note",
    ]
    lines = ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name, found in results.items():
        lines += [_row(one) for one in found or ()] or [
            f"| {name} |  | not run |  |  |  |  | `make integration NAME={name}` |  |"
        ]
    return [*lines, ""]


def _row(result: Mapping[str, Any]) -> str:
    agreements = {mode: Agreement(**result["modes"][mode]) for mode in MODES if mode in result["modes"]}
    working = [mode for mode, agreement in agreements.items() if agreement.ok]
    differing = [mode for mode in agreements if mode not in working]
    modes = "all six" if len(working) == len(MODES) else ", ".join(f"`{mode}`" for mode in working) or "none"
    if differing:
        modes += f"; DIFFERENT: {', '.join(f'`{mode}`' for mode in differing)}"
    same = sum(agreement.tokens for agreement in agreements.values() if agreement.same_tokens)
    tokens = f"{same} of {sum(agreement.tokens for agreement in agreements.values())}"
    worst = max((agreement.largest_difference for agreement in agreements.values()), default=float("nan"))
    cells = [
        result["runtime"],
        result["version"],
        modes,
        result["precision"],
        "yes" if result["pictures"] else "no",
        tokens,
        f"{worst:.1e}",
        f"`{result['command']}`",
        result["note"],
    ]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _agrees(result: Mapping[str, Any]) -> bool:
    return bool(result["modes"]) and all(Agreement(**one).ok for one in result["modes"].values())


if __name__ == "__main__":
    sys.exit(main())
