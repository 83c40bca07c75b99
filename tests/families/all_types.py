"""`make families`: every image-text-to-text type, one after the other, then docs/families.md.

    python tests/families/all_types.py RESULTS PAGE [TYPE ...] [--all PROGRESS]

RESULTS is a file of JSON lines, one a type, sorted. A row stays there until its type is run again, so that a run of a few types
updates the page; with no type at all, only the page is written. `--all` runs every type that PROGRESS, a file of the same kind,
has no row for: a stopped run goes on where it was. Each type has a process of its own and a time limit: a crash or a loop in
torch ends one row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as a script: its folder's parent is where `families` is imported from
    sys.path.insert(0, str(Path(__file__).parents[1]))

from families.families_page import page
from families.one_type import TypeRow
from families.small_checkpoint import types

LIMIT_S = 600  # seconds a type


def run_all(results: Path, names: Sequence[str], progress: Path | None = None) -> None:
    """Run these types, and put each row in place of the one that the results have.

    Args:
        results: gets the rows.
        names: of the types.
        progress: types that this file has a row for are not run; it gets the new rows too.
    """
    done = {row.type for row in read_rows(progress)} if progress else set[str]()
    for number, name in enumerate(names, 1):
        if name not in done:
            row = run_in_process(name)
            print(
                f"{number}/{len(names)} {name}: {'guarded' if row.guarded else row.reason} ({row.seconds:.0f} s)",
                flush=True,
            )
            write_rows(results, [*read_rows(results), row])
            if progress:
                write_rows(progress, [*read_rows(progress), row])


def run_in_process(name: str) -> TypeRow:
    """The row of one type from a process of its own."""
    with tempfile.TemporaryDirectory(prefix=f"vlmguard-{name}-") as folder:
        command = [sys.executable, str(Path(__file__).with_name("one_type.py")), name, folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return TypeRow(name, reason=f"stopped after {LIMIT_S} s", seconds=LIMIT_S)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"type"')]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return TypeRow(name, reason=f"the process ended with {done.returncode}: {last[:300]}")
    return TypeRow(**json.loads(lines[-1]))


def read_rows(results: Path) -> list[TypeRow]:
    """The rows of a results file; the last line of a type counts."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    return list({row.type: row for row in (TypeRow(**json.loads(line)) for line in lines if line)}.values())


def write_rows(results: Path, rows: Sequence[TypeRow]) -> None:
    """Write one line a type, sorted; the last row of a type counts."""
    last = {row.type: row for row in rows}
    lines = [json.dumps(dataclasses.asdict(last[name])) for name in sorted(last)]
    results.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def every_row(results: Path, names: Sequence[str]) -> list[TypeRow]:
    """A row for every type: those that were not run yet have that for their reason."""
    rows = read_rows(results)
    return rows + [TypeRow(name, reason="not run yet") for name in sorted({*names} - {row.type for row in rows})]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run image-text-to-text types, and write the page of all results.")
    parser.add_argument("results", type=Path, help="file of JSON lines that has the last row of every type")
    parser.add_argument("page", type=Path, help="document to write")
    parser.add_argument("types", nargs="*", metavar="TYPE", help="type to run, whatever the results have of it")
    parser.add_argument("--all", type=Path, metavar="PROGRESS", help="run every type that this file has no row for")
    return parser.parse_args()


if __name__ == "__main__":
    given = _arguments()
    run_all(given.results, given.types)
    if given.all:
        run_all(given.results, list(types()), given.all)
    given.page.write_text(page(every_row(given.results, list(types()))), encoding="utf-8")
