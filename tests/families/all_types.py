"""`make families`: every image-text-to-text type, one after the other, then docs/families.md.

    python tests/families/all_types.py RESULTS docs/families.md [TYPE ...]

RESULTS is a file of JSON lines, one a type; types that it has are not run again, so that a stopped run goes on where it was.
Each
type has a process of its own and a time limit: a crash or a loop in torch ends one row.
"""

from __future__ import annotations

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


def run_all(results: Path, names: Sequence[str]) -> None:
    """Run the types that the results lack, and add a line for each."""
    done = {row.type for row in read_rows(results)}
    for number, name in enumerate(names, 1):
        if name not in done:
            row = run_in_process(name)
            print(
                f"{number}/{len(names)} {name}: {'guarded' if row.guarded else row.reason} ({row.seconds:.0f} s)",
                flush=True,
            )
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(row)) + "\n")


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


def every_row(results: Path, names: Sequence[str]) -> list[TypeRow]:
    """A row for every type: those that were not run yet have that for their reason."""
    rows = read_rows(results)
    return rows + [TypeRow(name, reason="not run yet") for name in sorted({*names} - {row.type for row in rows})]


if __name__ == "__main__":
    results_file, page_file, *chosen = sys.argv[1:]
    run_all(Path(results_file), chosen or list(types()))
    Path(page_file).write_text(page(every_row(Path(results_file), list(types()))), encoding="utf-8")
