"""docs/coverage.md from what the matrix recorded: `python tests/zoo/coverage.py RESULTS docs/coverage.md [--check]`.

The document is written even when something failed (it then says what), and the exit code is 1: a graph without a record, a
check without an answer and a failure are all errors. `--check` writes nothing and compares the file with the results.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # as a script: its folder's parent is where `zoo` is imported from
    sys.path.insert(0, str(Path(__file__).parents[1]))

from zoo.cases import EXPORTED, PLACES, expected_checks
from zoo.records import CheckRecord, GraphRecord, Results, read_results, worst_first


@dataclass(frozen=True)
class Row:
    """One graph of the matrix, with all its answers."""

    graph: GraphRecord
    checks: tuple[CheckRecord, ...]

    @property
    def refused(self) -> bool:
        return bool(self.graph.refusal)

    @property
    def failures(self) -> list[CheckRecord]:
        return [check for check in worst_first(self.checks) if not check.ok or not check.compared]

    @property
    def works(self) -> bool:
        return not self.refused and not self.failures and not self.missing

    @property
    def missing(self) -> list[str]:
        """Checks without an answer; where no layers were found there is nothing else to ask."""
        if any(check.check == "anatomy" and not check.ok for check in self.checks):
            return []
        wanted = {("refusal", "")} if self.refused else expected_checks(self.graph.truth, self.graph.cached)
        return sorted(" ".join(key).strip() for key in wanted - {(check.check, check.guard) for check in self.checks})

    def of(self, name: str) -> list[CheckRecord]:
        return [check for check in self.checks if check.check == name]


def rows_of(results: Results) -> list[Row]:
    """Of the graphs that were described; by exporter, family and name."""
    rows = [Row(graph, tuple(results.checks.get(name, ()))) for name, graph in results.graphs.items()]
    return sorted(rows, key=lambda row: (row.graph.exporter, row.graph.family, row.graph.model))


def errors_in(results: Results, rows: Sequence[Row], names: Iterable[str]) -> list[str]:
    """Whatever the document must not hide."""
    names = {*names}
    found = [
        f"{name}: no record; its test did not run or did not get far" for name in sorted(names - {*results.graphs})
    ]
    found += [
        f"{name}: not in the zoo's table; empty the results and run `make zoo` again"
        for name in sorted({*results.names} - names)
    ]
    for row in rows:
        name = row.graph.model
        found += [f"{name}: no answer to {what}" for what in row.missing]
        found += [f"{name}: {' '.join(filter(None, (c.check, c.guard)))}: {failure(c)}" for c in row.failures]
    return found


def failure(check: CheckRecord) -> str:
    if not check.compared:
        return check.note or "nothing was compared"
    return f"{check.worst:.1e} where {check.limit:.0e} is allowed" + (f"; {check.note}" if check.note else "")


# The document


def document(results: Results, names: Iterable[str]) -> str:
    """The whole of docs/coverage.md."""
    rows = rows_of(results)
    errors = errors_in(results, rows, names)
    parts = [
        "# Coverage",
        "Tested graphs and their results. `make zoo` writes this file from its results; do not edit.",
        in_short(rows, errors),
        "## What works",
        what_works(rows),
        "## Rejected graphs and reasons",
        what_is_refused(rows),
    ]
    if errors:
        parts += ["## What does not work", "\n".join(f"- {error}" for error in errors)]
    parts += ["## Every graph", EXPLANATION, every_graph(rows), "## How it was made", how_it_was_made(results)]
    return "\n\n".join(parts) + "\n"


def in_short(rows: Sequence[Row], errors: Sequence[str]) -> str:
    works, refused = sum(row.works for row in rows), sum(row.refused for row in rows)
    families = len({row.graph.family for row in rows})
    exporters = len({package(row.graph.exporter) for row in rows})
    text = (
        f"{count(len(rows), 'graph')} of {count(families, 'family', 'families')} by {count(exporters, 'exporter')}: "
        f"{works} guarded and proved, {refused} rejected as expected"
    )
    return f"{text}, **{count(len(errors), 'error')}**." if errors else f"{text}."


def what_works(rows: Sequence[Row]) -> str:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if not row.refused:
            groups.setdefault((row.graph.exporter, row.graph.family), []).append(row)
    lines = []
    for (exporter, family), members in sorted(groups.items()):
        working = [row for row in members if row.works]
        weights = ", ".join(sorted({row.graph.weights for row in working})) or "-"
        lines.append((exporter, family, weights, f"{len(working)} of {len(members)}"))
    return table(("exporter", "family", "weights", "graphs that work"), lines)


def what_is_refused(rows: Sequence[Row]) -> str:
    lines = [(f"`{row.graph.model}`", row.graph.exporter, row.graph.refusal) for row in rows if row.refused]
    if not lines:
        return "None of these graphs."
    return table(("graph", "exporter", "error"), lines)


EXPLANATION = f"""Guards of rank 2 at the middle layer and at the last one, in mode `project` (no gate) and `restore` (a gate
that is open for some rows and closed for others), at the last token and at all tokens; padded prompts of different lengths,
then steps on the KV cache. Each figure is the largest difference of all of these, relative to the largest number and rounded
up to a power of ten.

- pattern: letters of [graphs.md](graphs.md). sum: an `Add`, or inside a fused skip-norm.
- states: hidden states of all layers against torch. prefill, decode: logits of the guarded graph against torch with the
  same guard as forward hooks. Float16 graphs are compared with torch in float32 on the same weights; for quantized graphs
  (-) torch has no equivalent computation.
- reference: the graph's guarded states against the numpy reference on its own unguarded states.
- closed gate: every output equals the unguarded graph's, bit for bit. "as written": exact when onnxruntime runs the graph
  as it is written; its optimiser places casts that round differently, by the stated difference.
- export: `vlmguard export` at these layers ({" and ".join(PLACES)}), with its own proof."""


def every_graph(rows: Sequence[Row]) -> str:
    columns = ("graph", "pattern", "weights", "stream", "layers", "sum", "states", "prefill", "decode", "reference",
               "closed gate", "export")  # fmt: skip
    lines = []
    for row in rows:
        graph = row.graph
        if row.refused:
            lines.append((f"`{graph.model}`", ", ".join(graph.patterns), graph.weights, "refused", *["-"] * 8))
            continue
        numbers = [worst(row.of(name)) for name in ("states", "prefill", "decode", "reference")]
        if not graph.cached:
            numbers[2] = "no cache"
        layers = str(graph.layers) if graph.layers == graph.expected else f"{graph.layers} of {graph.expected}"
        proofs = row.of("export")
        proved = f"{sum(check.ok for check in proofs)} of {len(EXPORTED)}"
        kinds = ", ".join("fused" if kind == "skip_norm" else kind for kind in graph.kinds)
        lines.append(
            (f"`{graph.model}`", ", ".join(graph.patterns), graph.weights, graph.stream, layers, kinds, *numbers,
             closed(row.of("closed")), proved)
        )  # fmt: skip
    return table(columns, lines)


def worst(checks: Sequence[CheckRecord]) -> str:
    if not checks:
        return "-"
    largest = max(check.worst for check in checks)
    return bound(largest) if all(check.ok for check in checks) else f"**{largest:.1e}**"


def closed(checks: Sequence[CheckRecord]) -> str:
    if not checks:
        return "-"
    if not all(check.ok for check in checks):
        return "**no**"
    moved = max(check.worst for check in checks)
    return f"as written; {bound(moved)}" if moved else "bit-exact"


def bound(value: float) -> str:
    """Rounded up to a power of ten: what another machine will see too."""
    return "0" if value == 0 else f"< 1e{math.floor(math.log10(value)) + 1}"


def how_it_was_made(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results.versions.items()))
    return (
        "`make zoo` exports tiny seeded random models with the exporters themselves (`tests/zoo`), runs the same checks "
        "on each graph (`tests/zoo/matrix.py`) on ONNX Runtime's CPU provider, and writes this file "
        "(`tests/zoo/coverage.py`). `make test` covers one graph per pattern.\n\n"
        f"Made with {versions}."
    )


# Words and tables


def package(exporter: str) -> str:
    return exporter.partition(" ")[0]


def count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    from zoo.table import ALL_MAKERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder that the tests wrote into")
    parser.add_argument("document", type=Path, help="docs/coverage.md")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the document says anything else")
    asked = parser.parse_args(arguments)
    try:
        results = read_results(asked.results)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 1
    text = document(results, ALL_MAKERS)
    errors = errors_in(results, rows_of(results), ALL_MAKERS)
    if not asked.check:
        asked.document.write_text(text, encoding="utf-8")
    elif not asked.document.is_file() or asked.document.read_text(encoding="utf-8") != text:
        errors.append(f"{asked.document}: differs from {asked.results}; write it again with `make zoo`")
    for error in errors:
        print(error, file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
