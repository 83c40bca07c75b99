"""What the matrix found, one JSON object a line: `test_matrix.py` writes it, `coverage.py` makes docs/coverage.md of it.

Two kinds of lines: `{"graph": ...}` describes a graph, `{"check": ...}` is one comparison. Each test process writes a file
of its own into the folder that `VLMGUARD_ZOO_RESULTS` names; without it nothing is written.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

RESULTS = "VLMGUARD_ZOO_RESULTS"
# Whatever has a say in what a graph of the zoo looks like, and the runtime that runs it.
PACKAGES = (
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-genai",
    "onnxscript",
    "optimum-onnx",
    "torch",
    "transformers",
)


@dataclass(frozen=True)
class GraphRecord:
    """One graph of the zoo as it was found.

    Attributes:
        model: its name in the zoo.
        family, exporter: what was exported, and by what.
        weights: how the decoder's matrices are stored: a dtype, or a quantization.
        stream: dtype of the residual stream.
        patterns: letters of the catalogue of patterns in docs/graphs.md.
        layers, expected: residual sites found, and layers that its config has.
        kinds: how the layers' sums are written, `add` or `skip_norm`.
        cached: whether the graph decodes with a KV cache.
        truth: `torch`, or `reference` where no torch model multiplies by the graph's own (quantized) weights.
        refusal: the sentence, where a refusal is the right answer.
    """

    model: str
    family: str
    exporter: str
    weights: str
    stream: str = ""
    patterns: tuple[str, ...] = ()
    layers: int = 0
    expected: int = 0
    kinds: tuple[str, ...] = ()
    cached: bool = False
    truth: str = ""
    refusal: str = ""


@dataclass(frozen=True)
class CheckRecord:
    """One comparison on one graph: `Check` of the product, and what it was made on.

    Attributes:
        model: name of the graph.
        check: what was compared, one of those that `zoo.cases.expected_checks` names.
        guard: which guard, as `Case.name` spells it; "" for checks of the unguarded graph.
        compared, worst, limit, ok, note: as in `vlmguard.graphs.proof.structure.Check`.
    """

    model: str
    check: str
    guard: str
    compared: int
    worst: float
    limit: float
    ok: bool
    note: str = ""


@dataclass
class Ledger:
    """Appends records to this process's file; with `path=None` it only checks that they can be written."""

    path: Path | None

    @classmethod
    def of_this_process(cls) -> Ledger:
        folder = os.environ.get(RESULTS)
        if not folder:
            return cls(None)
        ledger = cls(Path(folder) / f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')}-{os.getpid()}.jsonl")
        Path(folder).mkdir(parents=True, exist_ok=True)
        ledger._write("versions", versions())
        return ledger

    def graph(self, record: GraphRecord) -> None:
        self._write("graph", asdict(record))

    def check(self, record: CheckRecord) -> None:
        self._write("check", asdict(record))

    def _write(self, kind: str, content: dict) -> None:
        line = json.dumps({kind: content}, sort_keys=True, allow_nan=True)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


@dataclass
class Results:
    """Everything that the processes of one run wrote."""

    versions: dict[str, str] = field(default_factory=dict)
    graphs: dict[str, GraphRecord] = field(default_factory=dict)
    checks: dict[str, list[CheckRecord]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return sorted({*self.graphs, *self.checks})


def read_results(folder: Path) -> Results:
    """Raises `ValueError` where there is nothing, or where two runs with different packages are mixed."""
    results = Results()
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            ((kind, content),) = json.loads(line).items()
            if kind == "versions":
                if results.versions not in ({}, content):
                    raise ValueError(f"{folder}: results of several environments; empty it and run `make zoo` again")
                results.versions = content
            elif kind == "graph":
                record = GraphRecord(**content | {key: tuple(content[key]) for key in ("patterns", "kinds")})
                results.graphs[record.model] = record
            else:
                record = CheckRecord(**content)
                results.checks.setdefault(record.model, []).append(record)
    if not results.names:
        raise ValueError(f"{folder}: no results; run `make zoo`")
    return results


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of the installed ones among `packages`, without the build's local suffix (`+cpu`)."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def worst_first(records: Sequence[CheckRecord]) -> list[CheckRecord]:
    """By how near each is to its limit, failures first."""
    return sorted(records, key=lambda r: (r.ok, -(r.worst / r.limit if r.limit else r.worst), r.check, r.guard))
